"""A campaign of mutants: checkpoints, stores, configurations and tokenizers that are no longer what was written.

Each is changed in one to three places, half of those that have hashes with hashes that fit again, and tried with a
verb that reads it, in a process of its own that is forked when all is imported. What must hold, whatever was changed:

- the process ends by itself, with exit code 0, 1, 2 (or 3, where numbers are not finite), without a traceback;
- it takes at most 60 s of processor time and 1.5 GB;
- what is refused is refused with one message;
- with the hashes as they were written, `verify` finds every change.

A verb may succeed: with the same output as on what was written, or because the changed value is one that may be.
The mutants are made by a seed and kept nowhere.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from orchestrator.checkpoint.format import MANIFEST, _digest
from orchestrator.checkpoint.storage import PIECE_BYTES
from tests.lab.ranks import preload
from tests.lab.runs import small_overrides

CPU_SECONDS, WALL_SECONDS, PEAK_BYTES = 60, 150, 1_500_000_000
MODEL = ("model.dim=16", "model.layers=2", "model.heads=2", "model.kv_heads=1", "model.mlp_dim=24")
SHORT = (
    *("train.max_steps=2", "train.seq_len=16", "train.global_batch_tokens=32", "train.eval_tokens=32"),
    *("train.sample.tokens=1", "checkpoint.every_steps=2", "optim.schedule.warmup_steps=1"),
)
TEXT = ("data.tokenizer.kind=bpe", "data.tokenizer.vocab_size=300")
# A value in place of another, by kind: none, wrong types, signs, sizes, no numbers, depth, control characters, paths.
JUNK: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 1 << 31, (1 << 62) + 1, (1 << 63) - 1, 1 << 64, 10**30, -(1 << 62)),
    *(
        0.5,
        1e-320,
        1e38,
        1e300,
        float("nan"),
        float("inf"),
        "",
        "x",
        "auto",
        "-1",
        "a" * 5000,
        "\x1b[31m",
        "a\nb",
        "\0",
    ),
    *("\ud800", "\u202e", "../../x", "/etc/passwd", "/dev/zero", "${oc.env:HOME}", "!!python/name:os.system"),
    *([], {}, [[]], [None], {"a": {}}, [0] * 2000, {"x": [1, {"y": None}]}),
)
HASHED = ("state.json", "config.yaml", "history.json", "handover.json", "sums.json", "tokenizer.json")


@dataclass
class Base:
    """What is mutated, as it was written."""

    folder: Path
    checkpoint: Path
    store: Path
    overrides: list[str]
    outputs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Use:
    """How one verb ended on one mutant."""

    kind: str
    verb: str
    code: int
    seconds: float
    peak_bytes: int
    text: str
    wrong: str = ""


@dataclass
class Tally:
    mutants: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[Use] = field(default_factory=list)
    most_seconds: float = 0.0
    most_bytes: int = 0

    def add(self, use: Use) -> None:
        outcome = use.wrong or ("succeeded" if use.code == 0 else f"refused ({use.code})")
        self.outcomes[use.verb, outcome] += 1
        self.most_seconds, self.most_bytes = max(self.most_seconds, use.seconds), max(self.most_bytes, use.peak_bytes)
        if use.wrong:
            self.wrong.append(use)


def campaign(folder: Path, count: int, seed: int, report: Callable[[Tally], object], first: int = 0) -> Tally:
    """Make the mutants `first` to `first + count - 1` of a seed below `folder` and try each.

    Args:
        report: called with the tally after each.
    """
    preload()
    base, tally = _base(folder), Tally()
    for number in range(first, first + count):
        chance = random.Random(f"{seed}/{number}")
        kind = ("checkpoint", "checkpoint", "store", "configuration", "tokenizer")[number % 5]
        place = folder / "mutant"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for use in _KINDS[kind](base, place, chance):
            tally.add(use)
        tally.mutants += 1
        report(tally)
    return tally


def _base(folder: Path) -> Base:
    overrides = [*small_overrides(folder, *MODEL, *TEXT, *SHORT), "name=base"]
    code, *_, text = run(["train", *overrides], folder / "log")
    assert code == 0, text
    (checkpoint,) = folder.glob("runs/base/*/checkpoints/step-*")
    store = folder / "store"
    words = ["data", "prepare", f"input={folder / 'corpus'}", f"output={store}", "tokenizer=bytes", "progress=false"]
    code, *_, text = run([*words, "workers=1"], folder / "log")
    assert code == 0, text
    return Base(folder, checkpoint, store, overrides)


def run(words: list[str], log: Path) -> tuple[int, float, int, bool, str]:
    """One verb in a forked process. Returns exit code (below 0: the signal), CPU seconds, peak, late, output."""
    child = os.fork()
    if child == 0:
        _child(words, log)
    deadline, late = time.monotonic() + WALL_SECONDS, False
    while True:
        found, status, used = os.wait4(child, os.WNOHANG)
        if found:
            break
        if time.monotonic() > deadline and not late:
            late = True
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    text = log.read_text(errors="replace")
    code = os.waitstatus_to_exitcode(status)
    return code, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, late, text


def _child(words: list[str], log: Path) -> None:
    code = 99
    try:
        os.setsid()
        handle = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_CPU, (2 * CPU_SECONDS, 2 * CPU_SECONDS))
        # The one process of a job: the verb starts no others.
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
        import torch

        from orchestrator.cli import main

        torch.set_num_threads(1)
        code = main(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _judge(kind: str, verb: str, words: list[str], log: Path, same: str | None, found: bool = False) -> Use:
    """Run a verb, and say what is wrong with how it ended.

    Args:
        same: what it printed on what was written; None where a success is one whatever it prints.
        found: a success is wrong.
    """
    code, seconds, peak, late, text = run(words, log)
    told = len(re.findall(r"^(?:error|damaged|wrong): ", text, re.M))
    wrong = ""
    if late:
        wrong = "no end"
    elif "Traceback (most recent" in text or "defect of orchestrator" in text:
        wrong = "traceback"
    elif code not in (0, 1, 2, 3):
        wrong = f"ended with {code}"
    elif seconds > CPU_SECONDS or peak > PEAK_BYTES:
        wrong = "too much time" if seconds > CPU_SECONDS else "too much memory"
    elif code and (not told or (told > 1 and "error: " in text)) and verb != "diff":
        wrong = "no one message"
    elif "\x1b" in text or "\x00" in text:
        wrong = "a control character was printed"
    elif code == 0 and (found or (same is not None and _plain(text) != same)):
        wrong = "a change was not found"
    return Use(kind, verb, code, seconds, peak, text[-3000:], wrong)


def _plain(text: str) -> str:
    """Output without what differs from use to use: paths, times and rates."""
    return re.sub(r"/\S+|[\d.,]+ tokens/s|\d+:\d\d|[\d.]+ ?[GMk]B|\d{8}-\d{6}", "~", text)


# --- what is changed


def _change_tree(data: Any, chance: random.Random) -> Any:
    """Replace, remove, double or rename values of a tree of JSON or YAML, in one to three places."""
    root = [copy.deepcopy(data)]
    for _ in range(chance.randint(1, 3)):
        spots: list[tuple[Any, Any]] = []
        stack: list[Any] = [root]
        while stack and len(spots) < 3000:
            value = stack.pop()
            for key in list(value) if isinstance(value, dict) else range(len(value)):
                spots.append((value, key))
                if isinstance(value[key], (dict, list)):
                    stack.append(value[key])
        where, key = chance.choice(spots)
        action = chance.randrange(8)
        if action == 0 and where is not root:
            del where[key]
        elif action == 1 and isinstance(where, dict):
            where[str(chance.choice(JUNK))[:300]] = where.pop(key)
        elif action == 2 and isinstance(where[key], int):
            where[key] += chance.choice([-1, 1, 1 << 40])
        elif action == 3:
            for _ in range(chance.choice([10, 1500])):
                where[key] = [where[key]]
        else:
            where[key] = copy.deepcopy(chance.choice(JUNK))
    return root[0]


def _dump(name: str, data: Any, chance: random.Random) -> bytes:
    if name.endswith(".yaml"):
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=False)
    else:
        text = json.dumps(data)
    if chance.random() < 0.1 and text.count("\n") > 2:
        lines = text.splitlines()
        text = "\n".join([*lines, chance.choice(lines)])  # a key twice
    return text.encode("utf-8", "surrogatepass")


def _change_content(path: Path, chance: random.Random) -> str:
    """Change a file's bytes, by its structure or not. Returns how."""
    content = path.read_bytes()
    structured = path.suffix in (".json", ".yaml") or path.suffix == ".safetensors"
    if structured and chance.random() < 0.75:
        try:
            path.write_bytes(_structured(path.name, content, chance))
            return "values"
        except (RecursionError, ValueError, yaml.YAMLError):
            pass  # deeper than Python writes
    how = chance.choice(["truncate", "extend", "flip", "flip", "zeros", "empty"])
    at = chance.randrange(len(content)) if content else 0
    changed = {
        "truncate": content[:at],
        "extend": content + b"\0" * chance.choice([1, 100, 70_000]),
        "flip": content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :],
        "zeros": content[:at] + b"\0" * min(64, len(content) - at) + content[at + 64 :],
        "empty": b"",
    }[how]
    if changed == content:
        changed += b"x"
    path.write_bytes(changed)
    return how


def _structured(name: str, content: bytes, chance: random.Random) -> bytes:
    if name.endswith(".safetensors"):
        length = int.from_bytes(content[:8], "little")
        text = json.dumps(_change_tree(json.loads(content[8 : 8 + length]), chance)).encode("utf-8", "surrogatepass")
        return len(text).to_bytes(8, "little") + text + content[8 + length :]
    data = yaml.safe_load(content) if name.endswith(".yaml") else json.loads(content)
    return _dump(name, _change_tree(data, chance), chance)


def _change_kind(path: Path, outside: Path, chance: random.Random) -> str:
    """Put what is no plain file in place of one, or take it away."""
    how = chance.choice(["link", "link to itself", "pipe", "device", "folder", "missing", "sparse"])
    content = path.read_bytes()
    path.unlink()
    if how == "link":
        outside.write_bytes(content)
        path.symlink_to(outside)
    elif how == "link to itself":
        path.symlink_to(path)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "device":
        path.symlink_to("/dev/zero")
    elif how == "folder":
        path.mkdir()
    elif how == "sparse":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    return how


def _resign(directory: Path, name: str) -> None:
    """The hashes of a file, and the manifest's digest, as whoever wrote them would have made them."""
    path = directory / MANIFEST
    data = json.loads(path.read_text())
    if name != MANIFEST and isinstance(data.get("files"), dict):
        content = (directory / name).read_bytes()
        pieces = [content[at : at + PIECE_BYTES] for at in range(0, len(content), PIECE_BYTES)]
        hashed = [[len(piece), hashlib.sha256(piece).hexdigest()] for piece in pieces]
        data["files"][name] = {"bytes": len(content), "pieces": hashed}
    data["digest"] = _digest({key: value for key, value in data.items() if key != "digest"})
    path.write_bytes(json.dumps(data).encode("utf-8", "surrogatepass"))


# --- the kinds of mutants


def _uses_of_checkpoint(base: Base, path: Path, place: Path) -> dict[str, list[str]]:
    quiet = "progress=false"
    new = [f"runs_dir={place / 'runs'}", "name=mutant"]
    return {
        "verify": ["checkpoint", "verify", f"path={path}", quiet],
        "inspect": ["checkpoint", "inspect", f"path={path}"],
        "diff": ["checkpoint", "diff", f"a={path}", f"b={base.checkpoint}", quiet],
        "export": ["checkpoint", "export", f"path={path}", f"output={place / 'out'}", quiet],
        "generate": ["generate", "prompt=def", f"checkpoint={path}", "tokens=2", "temperature=0", "hardware=cpu"],
        "resume": ["train", f"resume={path}", "train.max_steps=3", *new],
        "init_from": [*["train", *base.overrides[:-1], f"train.init_from={path}", "train.max_steps=1"], *new],
    }


def _checkpoint(base: Base, place: Path, chance: random.Random, files: tuple[str, ...] = ()) -> Iterator[Use]:
    path = place / base.checkpoint.name
    shutil.copytree(base.checkpoint, path)
    names = files or tuple(sorted(file.name for file in path.iterdir()))
    name, anew = chance.choice(names), chance.random() < 0.5
    if chance.random() < 0.15:
        how, anew = _change_kind(path / name, place / "outside", chance), False
    else:
        how = _change_content(path / name, chance)
        if anew:
            try:
                _resign(path, name)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
                anew = False
    kind = f"{name} {how}{' anew' if anew else ''}"
    uses = _uses_of_checkpoint(base, path, place)
    for verb in ("verify", chance.choice([verb for verb in uses if verb != "verify"])):
        same = None
        if not anew and verb in ("inspect", "generate"):
            if verb not in base.outputs:
                words = _uses_of_checkpoint(base, base.checkpoint, base.folder)[verb]
                base.outputs[verb] = _plain(run(words, base.folder / "log")[4])
            same = base.outputs[verb]
        # With the hashes that were written every change is found; elsewhere a value may be one that is allowed.
        yield _judge(kind, verb, uses[verb], place / "log", same, found=verb == "verify" and not anew)


def _tokenizer(base: Base, place: Path, chance: random.Random) -> Iterator[Use]:
    if chance.random() < 0.5:
        yield from _checkpoint(base, place, chance, ("tokenizer.json",))
        return
    path = place / "tokenizer.json"
    shutil.copy(base.checkpoint / "tokenizer.json", path)
    how = _change_kind(path, place / "outside", chance) if chance.random() < 0.1 else _change_content(path, chance)
    words = ["data", "prepare", f"input={base.folder / 'corpus' / '00.txt'}", f"output={place / 'out'}"]
    words += [f"tokenizer={path}", "progress=false", "workers=1"]
    yield _judge(f"own tokenizer {how}", "prepare", words, place / "log", None)


def _store(base: Base, place: Path, chance: random.Random) -> Iterator[Use]:
    path = place / "store"
    shutil.copytree(base.store, path)
    name = chance.choice([*["index.json"] * 3, *sorted(file.name for file in path.iterdir())])
    how = _change_kind(path / name, place / "outside", chance) if chance.random() < 0.2 else ""
    how = how or _change_content(path / name, chance)
    words = ["data", "inspect", f"path={path}", "verify=true"]
    yield _judge(f"store {name} {how}", "data inspect", words, place / "log", None)
    train = [
        word for word in base.overrides[:-1] if not word.startswith(("data.sources", "data.tokenizer", "runs_dir"))
    ]
    words = ["train", *train, f"data.sources=[{{path:'{path}',weight:1}}]", f"runs_dir={place / 'runs'}"]
    yield _judge(f"store {name} {how}", "train", [*words, "train.max_steps=1", "name=mutant"], place / "log", None)


def _configuration(base: Base, place: Path, chance: random.Random) -> Iterator[Use]:
    """An option of the user's own; it is composed and checked. What it allows may be larger than this machine."""
    group = chance.choice(["model", "optim", "data", "experiment"])
    stored = yaml.safe_load((base.checkpoint / "config.yaml").read_text())
    data = stored[group] if group != "experiment" else {"train": stored["train"], "seed": 1}
    (place / group).mkdir()
    option = place / group / "mutant.yaml"
    option.write_text(yaml.safe_dump(data, sort_keys=False))
    how = _change_kind(option, place / "outside", chance) if chance.random() < 0.1 else _change_content(option, chance)
    header = b"# @package _global_\n" if group == "experiment" else b""
    if option.is_file() and option.stat().st_size < 1 << 20:
        option.write_bytes(header + option.read_bytes())
    words = ["train", "--config-dir", str(place), f"{group}=mutant", "resume=/nowhere"]
    yield _judge(f"option {group} {how}", "compose", words, place / "log", None, found=True)


_KINDS = {"checkpoint": _checkpoint, "store": _store, "configuration": _configuration, "tokenizer": _tokenizer}
