"""Replica groups of torchft's on forked ranks: a run whose groups are killed and started again.

The launcher's own `Groups` watches over them, with supervisors that fork their ranks with everything imported. So a
start costs a second in place of ten.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.run_checkpoints import committed
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.distributed.local_processes import Ended
from orchestrator.distributed.replica_group import ReplicaGroup
from orchestrator.distributed.world import World
from orchestrator.launch.group_launcher import Groups, Limits
from tests.lab.ranks import preload
from tests.lab.runs import TINY, read_rows, resolved_run, small_config

_FORK = multiprocessing.get_context("fork")


class Forked:
    """A group's supervisor, as `subprocess.Popen` is one: its process forks the ranks, and kills all with one."""

    def __init__(self, group: ReplicaGroup, size: int, data: dict[str, Any], run_dir: Path, pace: float):
        self.group = group
        self.ranks = _FORK.Array("i", size)
        self._process = _FORK.Process(target=self._supervise, args=(size, data, run_dir, pace))
        self._process.start()
        self.pid: int = self._process.pid or 0

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> None:
        self._process.join()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def _supervise(self, size: int, data: dict[str, Any], run_dir: Path, pace: float) -> None:
        with tempfile.TemporaryDirectory(prefix="group-", ignore_cleanup_errors=True) as folder:
            store = f"file:{folder}/store" if size > 1 else ""
            worlds = [World(rank, size, rank, size, store, engine="test") for rank in range(size)]
            ranks = [_FORK.Process(target=_rank, args=(world, self.group, data, run_dir, pace)) for world in worlds]
            for number, rank in enumerate(ranks):
                rank.start()
                self.ranks[number] = rank.pid
            signal.signal(signal.SIGTERM, lambda *unused: [os.kill(rank.pid, signal.SIGTERM) for rank in ranks])
            while not any(rank.exitcode for rank in ranks) and any(rank.exitcode is None for rank in ranks):
                time.sleep(0.02)
            codes = [rank.exitcode for rank in ranks]
            if any(code and code < 0 for code in codes):
                for rank in ranks:
                    rank.kill()
            for rank in ranks:
                rank.join()
            codes = [rank.exitcode or 0 for rank in ranks]
        os._exit(1 if min(codes) < 0 else max(codes))


def _rank(world: World, group: ReplicaGroup, data: dict[str, Any], run_dir: Path, pace: float) -> None:
    code = 1
    with open(run_dir / f"log-{group.number}", "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(group.environment())
    try:
        import torch

        from orchestrator.launch.rejoining import end_with_supervisor, from_newest
        from orchestrator.launch.run import work
        from orchestrator.output import printing

        torch.set_num_threads(1)
        _slow_down(pace)
        end_with_supervisor()
        config = from_dict(RunConfig, data)
        whole = World(size=config.hardware.devices)
        with printing():
            code = work(from_newest(resolved_run(config, whole, run_dir)), world)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException as error:
        import traceback

        code = getattr(error, "exit_code", 1)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _slow_down(seconds: float) -> None:
    from orchestrator.training.callbacks.copy_watch import CopyWatch

    watch = CopyWatch.on_train_batch_end

    def slowly(self: CopyWatch, *arguments: Any) -> None:
        time.sleep(seconds)
        watch(self, *arguments)

    CopyWatch.on_train_batch_end = slowly  # type: ignore[method-assign]


class Killer:
    """Kills ranks of a run's groups, a group after the other, each when all take part.

    Args:
        run: whose.
        kills: how many.
        between: steps that all take part in before the next kill.

    Attributes:
        waits: seconds from each kill to the first step that the other group has completed.
        back: seconds from each kill to the first step of both.
        problem: why it gave up.
    """

    def __init__(self, run: GroupRun, kills: int, between: int = 5):
        self._run, self._kills, self._between = run, kills, between
        self.waits: list[float] = []
        self.back: list[float] = []
        self.problem = ""

    def __call__(self) -> None:
        for number in range(self._kills):
            if not self._await(lambda: self._together() >= self._between):
                return
            group = (number + 1) % 2
            victim, at, begin = self._run.current(group), self._last(), time.monotonic()
            os.kill(victim.ranks[number // 2 % len(victim.ranks)], signal.SIGKILL)
            if not self._await(lambda at=at: self._last() > at + 1):  # one may have been completed before
                return
            self.waits.append(time.monotonic() - begin)
            if not self._await(lambda group=group, old=victim: self._run.joined(group, old)):
                return
            self.back.append(time.monotonic() - begin)

    def _steps(self) -> list[dict[str, Any]]:
        return [row for row in self._run.rows() if "replica_groups" in row]

    def _last(self) -> int:
        return max((row["step"] for row in self._steps()), default=0)

    def _together(self) -> int:
        """How many of the last steps both groups have completed."""
        return len(list(itertools.takewhile(lambda row: row["replica_groups"] == 2, reversed(self._steps()))))

    def _await(self, condition: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self._run.ended is None:
            if condition():
                return True
            time.sleep(0.05)
        self.problem = f"kill {len(self.back) + 1}: {self._run.ended}, step {self._last()}"
        return False


class GroupRun:
    """A run of replica groups, watched over by a thread.

    Args:
        config: of the run; `hardware.devices` is a number.
        run_dir: is made.
        restarts: of a group, in a row.
        pace: seconds that each step takes longer, so that a group comes back while the run goes on.
    """

    def __init__(self, config: RunConfig, run_dir: Path, restarts: int = 1000, pace: float = 0.0):
        os.environ.setdefault("RUST_LOG", "error")
        preload()
        import orchestrator.strategies.replica_groups  # noqa: F401

        run_dir.mkdir(parents=True)
        self.started: list[Forked] = []
        self.ended: Ended | None = None
        self._pace, self._data, self._dir, self._count = pace, to_dict(config), run_dir, int(config.layout.replicate)
        self._size = int(config.hardware.devices) // self._count
        address = run_dir / "lighthouse"
        self._lighthouse = _FORK.Process(target=_keep_lighthouse, args=(address,))
        self._lighthouse.start()
        # A fork copies what its thread alone holds, so all of them are made in this one.
        self.groups = Groups(self._count, self._start, Limits(restarts, 0.05, self._newest), str(address))

    def _start(self, group: ReplicaGroup) -> Any:
        self.started.append(Forked(group, self._size, self._data, self._dir, self._pace))
        return self.started[-1]

    def _newest(self) -> Path | None:
        return next(iter(committed(self._dir / "checkpoints")), None)

    def logs(self) -> str:
        """What the ranks have printed."""
        return "\n".join(path.read_text()[-5000:] for path in sorted(self._dir.glob("log-*")))

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl so far."""
        return read_rows(self._dir) if (self._dir / "metrics.jsonl").exists() else []

    def joined(self, number: int, instead_of: Forked) -> bool:
        """Whether a group that was started anew has come into the run."""
        now = self.current(number)
        return now is not instead_of and now.group.joined_file.exists()

    def current(self, number: int) -> Forked:
        """The newest start of a group."""
        return next(one for one in reversed(self.started) if one.group.number == number)

    def run(self, meanwhile: Any = lambda: None) -> Ended:
        """Watch in this thread until the end; `meanwhile` is called in another one."""
        thread = threading.Thread(target=meanwhile, daemon=True)
        thread.start()
        try:
            self.ended = self.groups.run()
            return self.ended
        finally:
            self.groups.kill()
            self._lighthouse.kill()
            self._lighthouse.join()
            thread.join(10)


def _keep_lighthouse(address: Path) -> None:
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind="0.0.0.0:0", min_replicas=1, join_timeout_ms=60000, heartbeat_timeout_ms=1500)
    address.with_suffix(".new").write_text(f"http://127.0.0.1:{server.address().rpartition(':')[2]}")
    address.with_suffix(".new").rename(address)
    threading.Event().wait()


@dataclass(frozen=True)
class Found:
    """What a run has come to whose groups were killed in turn.

    Attributes:
        waits: seconds from each kill to the next step of the other group.
        back: seconds from each kill until the group was back.
        tokens: of all steps.
        skipped: of these, tokens that were not trained on.
        loss: the last validation loss.
        whole_loss: that of the same run without kills.
    """

    waits: list[float]
    back: list[float]
    tokens: int
    skipped: int
    loss: float
    whole_loss: float


def kill_in_turn(folder: Path, kills: int, steps: int, pace: float, words: Sequence[str]) -> Found:
    """Train two groups, without kills and with them, and see that nothing was lost but what is counted.

    Args:
        folder: for both runs.
        kills: of one rank each.
        steps: of a run.
        pace: seconds that each step of the killed run takes longer.
        words: of the configuration, with the layout of a group.

    Raises:
        AssertionError: something was lost, or restarted that was not killed.
    """
    common = [*TINY, *words, "layout.replicate=2", f"train.max_steps={steps}", "checkpoint.every_steps=50"]
    size = 4 if "layout.fsdp=2" in words else 2
    common += [f"hardware.devices={size}", "hardware.timeout_seconds=60", "launch.fault_tolerance=torchft"]
    config = small_config(folder, *common)
    whole = GroupRun(config, folder / "whole")
    assert whole.run().code == 0, whole.logs()
    run = GroupRun(config, folder / "killed", pace=pace)
    killer = Killer(run, kills)
    ended = run.run(killer)
    assert ended.code == 0, f"{ended}\n{run.logs()}"
    assert not killer.problem, f"{killer.problem}\n{run.logs()}"
    assert len(run.started) == 2 + kills, "who was not killed was started again"
    rows = [row for row in run.rows() if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, steps + 1)), "each step is recorded once"
    tokens = config.train.global_batch_tokens
    missed = list(itertools.accumulate((2 - int(row["replica_groups"])) * tokens // 2 for row in rows))
    assert [row["skipped_tokens"] for row in rows] == missed
    record = json.loads((folder / "killed" / "run.json").read_text())
    assert (record["status"], len(record["legs"])) == ("finished", 1)
    changes = record["legs"][0]["replica_groups"]["changes"]
    came = [change for change in changes if change["came"]]
    assert [change["came"] for change in came] == [[1 - number % 2] for number in range(kills)]
    assert all(len(change["present"]) == 2 for change in came)
    for path in committed(folder / "killed" / "checkpoints"):
        Checkpoint(path).verify()
    losses = [next(row["val_loss"] for row in reversed(one.rows()) if "val_loss" in row) for one in (run, whole)]
    return Found(killer.waits, killer.back, tokens * steps, missed[-1], *losses)
