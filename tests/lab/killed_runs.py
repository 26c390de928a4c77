"""Real runs on forked ranks that a test kills, suspends and stops at a step it names, and what a clock outside says."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.run_checkpoints import newest_valid
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.distributed import standing
from orchestrator.distributed.world import World
from orchestrator.observe.time_spans import read_life
from tests.lab.ranks import preload
from tests.lab.runs import resolved_run

_PATIENCE_SECONDS = 120.0


class Attempt:
    """One start of a run, on forked ranks of this machine.

    Attributes:
        processes: of its ranks.
    """

    def __init__(self, processes: list[Any], run_dir: Path, log: Path):
        self.processes, self._run_dir, self._log = processes, run_dir, log
        self._begun = time.time()

    def until_step(self, step: int) -> None:
        """Wait until rank 0 has said that it has completed `step` steps."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not ((life := read_life(self._run_dir)) and life.t > self._begun and (life.entry.step or 0) >= step):
            assert all(process.is_alive() for process in self.processes), self._log.read_text()
            assert time.monotonic() < deadline, f"step {step} never came:\n{self._log.read_text()}"
            time.sleep(0.02)

    def kill(self, *ranks: int) -> None:
        """Kill ranks; all of them where none is named."""
        self.signal(signal.SIGKILL, *ranks)

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to ranks; to all of them where none is named."""
        for rank in ranks or range(len(self.processes)):
            os.kill(self.processes[rank].pid, number)

    def codes(self) -> list[int]:
        """Wait for all ranks, and return how they ended."""
        for process in self.processes:
            process.join(_PATIENCE_SECONDS)
            assert process.exitcode is not None, f"it hangs:\n{self._log.read_text()}"
        return [process.exitcode for process in self.processes]


@contextlib.contextmanager
def attempt(config: RunConfig, run_dir: Path, ranks: int = 1, pause: float = 0.0) -> Iterator[Attempt]:
    """Start a run, or go on from its newest checkpoint; ranks that are left at the end of the block are killed.

    With `pause` a step takes so many seconds longer, which cost no processor.
    """
    preload()
    run_dir.mkdir(parents=True, exist_ok=True)
    resume = newest_valid(run_dir / "checkpoints", True, lambda text: None)
    context, log = multiprocessing.get_context("fork"), run_dir.with_name(f"{run_dir.name}.log")
    with tempfile.TemporaryDirectory(prefix="killed-") as folder:
        store = f"file:{folder}/store" if ranks > 1 else ""
        worlds = [World(rank, ranks, rank, ranks, store, engine="test") for rank in range(ranks)]
        arguments = (to_dict(config), run_dir, resume, log, pause)
        processes = [context.Process(target=_rank, args=(world, *arguments)) for world in worlds]
        started = Attempt(processes, run_dir, log)
        for process in processes:
            process.start()
        try:
            yield started
        finally:
            for process in processes:
                process.kill()
                process.join()


def _rank(world: World, config: dict[str, Any], run_dir: Path, resume: Path | None, log: Path, pause: float) -> None:
    code = 1
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        import torch

        from orchestrator.launch.run import work
        from orchestrator.observe import gemm

        torch.set_num_threads(1)
        if pause:
            standing.here.heard.append(lambda: time.sleep(pause))
        gemm.measure_gemm_flops.__defaults__ = (0.01,)
        gemm._CPU_SHAPES = ()
        code = work(resolved_run(from_dict(RunConfig, config), world, run_dir, resume), world)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)
