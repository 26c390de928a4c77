"""A fault campaign: a run of several ranks is killed again and again, at random moments and within saves.

After each kill: no checkpoint that was committed before is gone but by pruning, every directory with a manifest passes
all checks, and the run goes on from the newest. At the end the weights are bitwise those of a run that nobody killed.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from orchestrator.checkpoint import storage
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import MANIFEST
from orchestrator.checkpoint.run_checkpoints import committed, newest_valid, remove_uncommitted
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.distributed.world import World
from tests.lab.ranks import preload
from tests.lab.runs import TINY, resolved_run, small_config
from tests.lab.tensors import read_all

RANKS = 2
COMMON = (*TINY, "checkpoint.every_steps=2", "hardware.timeout_seconds=60")
_EXPERTS = ("model.moe.experts=4", "model.moe.mlp_dim=32", "model.moe.balance_loss=0.01", "model.moe.balance_bias=true")
KINDS = {
    "dense": ("model.dropout=0.1", "layout.fsdp=2"),
    "experts": (*_EXPERTS, "layout.expert=2", "layout.fsdp=1"),
    "pipeline": ("model.layers=2", "layout.pipeline=2", "layout.fsdp=1", "train.micro_batch_size=1"),
}
"""What is trained, over two ranks each."""
_MAX_SECONDS = 4.0
_MAX_OPERATIONS = 200
_ATTEMPT_SECONDS = 240.0


@dataclass
class Tally:
    """What has happened so far.

    Attributes:
        kills: attempts that were ended by SIGKILL.
        within_saves: of these, kills that left a directory without a manifest: the save was under way.
        restarts_from_zero: attempts that found no checkpoint yet.
        checked: checkpoints that were opened and hashed.
        finished: runs that came to their end, each compared with the uninterrupted one.
    """

    kills: int = 0
    within_saves: int = 0
    restarts_from_zero: int = 0
    checked: int = 0
    finished: int = 0
    moments: list[str] = field(default_factory=list)


def campaign(
    folder: Path, kills: int, steps: int, seed: int, report: Callable[[Tally], object], kind: str = "dense"
) -> Tally:
    """Kill until there were `kills`, and let the last run end.

    Args:
        steps: of a run; where one ends before there were enough kills, another is begun.
        report: told after each attempt.
        kind: one of `KINDS`.

    Raises:
        AssertionError: something was lost, or taken for what it is not.
    """
    preload()
    config = small_config(folder, *COMMON, *KINDS[kind], f"train.max_steps={steps}")
    chance, tally = random.Random(seed), Tally()
    reference = folder / "reference"
    assert _attempt(config, reference, None, None, chance) == "ended"
    wanted = read_all(committed(reference / "checkpoints")[0])
    number = 0
    while tally.kills < kills or tally.finished == 0:
        number += 1
        run_dir = folder / f"run-{number}"
        _until_the_end(config, run_dir, kills, chance, tally, report)
        newest = committed(run_dir / "checkpoints")[0]
        assert Checkpoint(newest).step == steps
        found = read_all(newest)
        assert found.keys() == wanted.keys()
        different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
        assert not different, f"{number}: {different[:5]} differ from the uninterrupted run"
        tally.finished += 1
        report(tally)
        shutil.rmtree(run_dir)
    return tally


def _until_the_end(
    config: RunConfig, run_dir: Path, kills: int, chance: random.Random, tally: Tally, report: Callable[[Tally], object]
) -> None:
    best = 0
    while True:
        parent = run_dir / "checkpoints"
        remove_uncommitted(parent)
        complaints: list[str] = []
        newest = newest_valid(parent, True, complaints.append)
        assert not complaints, complaints
        step = Checkpoint(newest).step if newest else 0
        assert step >= best, f"the commit of step {best} is lost: the newest is of step {step}"
        tally.restarts_from_zero += newest is None
        moment = _moment(chance) if tally.kills < kills else None
        outcome = _attempt(config, run_dir, newest, moment, chance)
        for path in committed(parent):
            Checkpoint(path).verify()
            tally.checked += 1
            best = max(best, Checkpoint(path).step)
        if outcome == "ended":
            return
        assert moment, f"nobody killed it: {outcome}"
        tally.kills += 1
        tally.within_saves += any(not (path / MANIFEST).exists() for path in parent.glob("step-*"))
        tally.moments.append(outcome)
        report(tally)


def _moment(chance: random.Random) -> tuple[str, float, int]:
    """When and whom: after so many seconds, or at the n-th operation on files of one rank."""
    if chance.random() < 0.4:
        return "seconds", chance.uniform(0.0, _MAX_SECONDS), -1
    return "operation", chance.randint(1, _MAX_OPERATIONS), chance.randrange(RANKS)


def _attempt(
    config: RunConfig,
    run_dir: Path,
    resume_from: Path | None,
    moment: tuple[str, float, int] | None,
    chance: random.Random,
) -> str:
    """Train with forked ranks until the end or the kill. Returns `ended` or how it was killed."""
    run_dir.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        worlds = [World(rank, RANKS, rank, RANKS, f"file:{folder}/store", engine="test") for rank in range(RANKS)]
        log = run_dir / "log"
        processes = [
            context.Process(target=_rank, args=(world, to_dict(config), run_dir, resume_from, moment, log))
            for world in worlds
        ]
        for process in processes:
            process.start()
        try:
            return _watch(processes, moment, chance, log)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _watch(processes: list[Any], moment: tuple[str, float, int] | None, chance: random.Random, log: Path) -> str:
    begin = time.monotonic()
    deadline = moment[1] if moment and moment[0] == "seconds" else _ATTEMPT_SECONDS
    while True:
        codes = [process.exitcode for process in processes]
        if all(code == 0 for code in codes):
            return "ended"
        if moment and -signal.SIGKILL in codes:
            # The others notice at their own pace; the machine gives them anything from nothing to a moment.
            time.sleep(chance.choice([0.0, 0.0, 0.05, 0.5]))
            return f"operation {moment[1]} of rank {moment[2]}"
        assert not any(codes), f"a rank ended with {codes}:\n{log.read_text() if log.exists() else ''}"
        if time.monotonic() - begin > deadline:
            assert deadline < _ATTEMPT_SECONDS, "the run hangs"
            victims = processes if chance.random() < 0.5 else [chance.choice(processes)]
            for process in victims:
                process.kill()
            if all(process.join() or process.exitcode == 0 for process in victims):
                continue  # they were faster
            time.sleep(chance.choice([0.0, 0.0, 0.05, 0.5]))
            return f"after {deadline:.2f} s, {len(victims)} of {len(processes)} ranks"
        time.sleep(0.002)


def _rank(
    world: World,
    config: dict[str, Any],
    run_dir: Path,
    resume_from: Path | None,
    moment: tuple[str, float, int] | None,
    log: Path,
) -> None:
    code = 1
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        from orchestrator.launch.run import work

        torch.set_num_threads(1)
        if moment and moment[0] == "operation" and moment[2] == world.rank:
            _die_at(int(moment[1]))
        code = work(resolved_run(from_dict(RunConfig, config), world, run_dir, resume_from), world)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _die_at(operation: int) -> None:
    """Kill this process in front of its n-th operation on the files of a checkpoint."""
    left = [operation]

    def counted(action: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return action(*args, **options)

        return run

    for owner, name in (
        (storage._Flushed, "write"),
        (os, "fsync"),
        (Path, "rename"),
        (Path, "mkdir"),
        (Path, "unlink"),
        (shutil, "rmtree"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))
