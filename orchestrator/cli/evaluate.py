"""`evaluate`: tasks of lm-eval, or the loss on texts, with the model of a checkpoint on any layout."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.atomic_files import write_atomically
from orchestrator.config.options import describe_options, option, parse_options
from orchestrator.errors import ConfigError, ConfigErrors, UserError
from orchestrator.installing import how_to_install

if TYPE_CHECKING:
    from orchestrator.config.compose import Composed

_PROGRAM = "python -m orchestrator evaluate"
_HELP = """usage: {program} [checkpoint=...] tasks=NAMES | data=FILES [key=value ...] [group=option ...]

Evaluate the model of a checkpoint where it is placed, on any layout and hardware, without an export. hardware and
layout are those of `train`; without a word on them the model is on the devices that are found.

Options
{options}

Examples
  {program} tasks=arc_easy,hellaswag download=true
  {program} checkpoint=runs/mine/20260102-030405 tasks=my_tasks/ limit=100 output=results.json
  {program} data='texts/*.md' hardware.devices=4 layout.fsdp=2 layout.tensor=2

Exits with 0 where everything was evaluated."""


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of `evaluate`; each says in its `help` what it is."""

    checkpoint: str = option("latest", help="latest, a run, a checkpoint, or a Hugging Face directory (hf:DIRECTORY)")
    tasks: tuple[str, ...] = option((), help="tasks and groups of lm-eval, YAML files of tasks, or folders of them")
    include: tuple[str, ...] = option((), help="folders of YAML files, whose tasks can be named")
    data: str | None = option(None, help="or files, a folder or a token store: loss, perplexity and bits per byte")
    split: Literal["train", "validation"] | None = option(None, help="of a token store; none: what it holds out")
    limit: float | None = option(None, help="documents of each task or of the data; below 1: a part of each task")
    num_fewshot: int | None = option(None, help="examples in front of each question; none: as the task says")
    output: str | None = option(None, help="a new file, or a folder for one, with the results in lm-eval's schema")
    samples: bool = option(False, help="write each document with what the model made of it, too")
    batch_tokens: int = option(8192, help="tokens of a batch on each device, about")
    max_length: int | None = option(None, help="tokens that the model is given at most; none: all that it takes")
    add_bos_token: bool | None = option(None, help="BOS in front of texts; none: as the model was trained")
    apply_chat_template: bool = option(False, help="ask as a user, by the model's chat template")
    fewshot_as_multiturn: bool = option(True, help="examples are turns of that conversation")
    system_instruction: str | None = option(None, help="in front of each question")
    bootstrap: int = option(100000, help="resamplings for standard errors; 0: no errors")
    download: bool = option(False, help="tasks may fetch data that is not on this machine")
    task_code: bool = option(False, help="run the Python that files of tasks name; only of files that you trust")
    json: bool = option(False, help="print JSON")


def main(argv: list[str]) -> int:
    """Run the verb. Returns the exit status.

    Args:
        argv: the words after the verb.

    Raises:
        UserError: wrong options, or a checkpoint, a task or data that cannot be used.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(_HELP.format(program=_PROGRAM, options=describe_options(EvaluateOptions)))
        return 0
    from orchestrator.config.compose import run_composed

    own = [word for word in argv if word.partition("=")[0] in EvaluateOptions.__dataclass_fields__]
    options = parse_options(EvaluateOptions, [_unbracketed(word) for word in own])
    if problems := list(_problems(options)):
        raise ConfigErrors(problems)
    words = [word for word in argv if word not in own]
    return run_composed(words, "orchestrator evaluate", lambda composed: _evaluate(composed, options))


def _unbracketed(word: str) -> str:
    """Take `tasks=[a,b]`, as Hydra writes a list, for `tasks=a,b`."""
    key, _, value = word.partition("=")
    listed = key in ("tasks", "include") and value.startswith("[") and value.endswith("]")
    return f"{key}={value[1:-1]}" if listed else word


def _problems(options: EvaluateOptions) -> Iterator[UserError]:
    if bool(options.tasks) == (options.data is not None):
        got = "both" if options.tasks else "neither"
        yield ConfigError("say what is to be evaluated", got=got, allowed="tasks=NAMES, or data=FILES")
    if options.limit is not None and options.limit <= 0:
        yield ConfigError("a limit is a number of documents", got=f"limit={options.limit:g}", allowed="above 0")
    if options.data is not None and options.limit is not None and options.limit % 1:
        yield ConfigError("of texts a whole number is read", got=f"limit={options.limit:g}", allowed="1 and more")
    for name, least in (("batch_tokens", 1), ("max_length", 1), ("num_fewshot", 0), ("bootstrap", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            yield ConfigError(f"{name} is out of range", got=f"{name}={value}", allowed=f"{least} or more")
    if options.output is not None and options.output.endswith(".json") and Path(options.output).exists():
        yield ConfigError("there is such a file already", got=f"output={options.output}", fix="name a new one")
    if options.samples and options.output is None:
        yield ConfigError("samples are written into a file", got="samples=true without output", fix="add output=DIR")


def _evaluate(composed: Composed, options: EvaluateOptions) -> int:
    from orchestrator.config.convert import to_dict
    from orchestrator.launch.model_job import open_job

    if options.tasks:
        _need_harness()
    job = open_job(composed, options.checkpoint, also=("data",) if options.data else ())
    if job.speaks:
        print(f"checkpoint {job.checkpoint.directory}", file=sys.stderr)
    common = {key: getattr(options, key) for key in ("batch_tokens", "max_length", "add_bos_token")}
    if options.tasks:
        keys = ("include", "limit", "num_fewshot", "bootstrap", "download", "task_code", "system_instruction")
        more = ("apply_chat_template", "fewshot_as_multiturn", "samples")
        request = {"names": options.tasks, **{key: getattr(options, key) for key in (*keys, *more)}}
        result = job.run("evaluate", {**common, "tasks": request})
    else:
        limit = None if options.limit is None else int(options.limit)
        about = {"path": options.data, "split": options.split, "limit": limit}
        result = job.run("loss", {**common, **about, "data": to_dict(composed.config.data)})
    if result is None:
        return 0  # another process speaks
    written = _write(result, options)
    if options.json:
        print(json.dumps({key: value for key, value in result.items() if key != "samples"}, indent=2))
    else:
        print("\n".join([*(table(result) if options.tasks else _loss_lines(result)), *written]))
    return 0


def _need_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "tasks need lm-eval, which is not installed",
            got="no package lm_eval",
            fix=f"{how_to_install('eval')}; the loss on texts needs nothing more: data=FILES",
        )


def _write(result: Mapping[str, Any], options: EvaluateOptions) -> list[str]:
    """Write results, and samples by task. Returns lines that say so."""
    if options.output is None:
        return []
    path = Path(options.output)
    if path.suffix != ".json":
        path = path / f"results_{time.strftime('%Y-%m-%dT%H-%M-%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = result.get("samples") or {}
    lines = [f"results    {path}"]
    for name, rows in samples.items() if options.samples else ():
        beside = path.with_name(f"samples_{name.replace('/', '_')}_{path.stem.removeprefix('results_')}.jsonl")
        write_atomically(beside, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        lines.append(f"samples    {beside}")
    kept = {key: value for key, value in result.items() if key != "samples"}
    write_atomically(path, json.dumps(kept, indent=2, ensure_ascii=False))
    return lines


def table(result: Mapping[str, Any]) -> list[str]:
    """Return the results of tasks as lines of a table.

    Args:
        result: with lm-eval's own keys.
    """
    rows = [("task", "version", "shots", "filter", "metric", "value", "error")]
    entries = {**result["results"], **result.get("groups", {})}
    for name, values in entries.items():
        first = (name, str(result["versions"].get(name, "")), str(result["n-shot"].get(name, "")))
        for key, value in sorted(values.items()):
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            rows.append((*first, kind, metric, shown, f"{error:.4f}" if isinstance(error, float) else ""))
            first = ("", "", "")
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _loss_lines(result: Mapping[str, Any]) -> list[str]:
    per_byte, documents = result["bits_per_byte"], f"document{'s' if result['documents'] != 1 else ''}"
    rows = [
        ("data", f"{result['data']}, {result['documents']:,} {documents}, {result['tokens']:,} tokens"),
        ("loss", f"{result['loss']:.4f} nats per token"),
        ("perplexity", f"{result['perplexity']:.2f}"),
        ("bits", f"{per_byte:.4f} per byte of {result['bytes']:,}" if per_byte else "per byte: unknown"),
    ]
    return [f"{name:<10} {text}" for name, text in rows]
