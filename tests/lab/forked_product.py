"""The product's launcher, or torchrun's agent, with all imports made: forked from this process, and their workers too.

What is forked runs the same code as the command line does, but for the start of Python: launcher, supervisor and guard,
or torch's elastic agent; then the worker's entry point. So a start costs no imports.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.lab.ranks import preload

_WORKER = "orchestrator.launch.worker"
STEP_LOG = "CAMPAIGN_STEPS"
"""Variable: the folder where workers leave their process numbers and a line for each step."""
HURRY, STEP_SECONDS = "hurry", 0.04
"""Until there is a file of that name in the folder a step takes so much longer: time for faults."""


class ForkedTemplate:
    """What `ProcessTemplate` uses of `subprocess.Popen`, of a template that is forked with its imports made."""

    def __init__(self, number: int, environment: Mapping[str, str]):
        self.pid = os.fork()
        if self.pid == 0:
            _be_template(number, environment)

    def wait(self, timeout: float | None = None) -> int:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            raise subprocess.TimeoutExpired("template", timeout or 0.0)
        return os.waitstatus_to_exitcode(status)


def fork_launcher(words: list[str], environment: Mapping[str, str], log: Path, enter: Callable[[], object]) -> int:
    """Start `orchestrator train` with these words. Returns its process number.

    Args:
        words: of the command line.
        environment: variables beside those of this process.
        log: for what it and its workers print.
        enter: called first in the new process.
    """
    return _fork(lambda: _launch(words), environment, log, enter)


def fork_agent(words: list[str], environment: Mapping[str, str], log: Path, processes: int, restarts: int) -> int:
    """Start torch's elastic agent, whose workers are `orchestrator train` with these words. Returns its number.

    Args:
        words: of the command line.
        environment: variables beside those of this process.
        log: for what is printed.
        processes: workers.
        restarts: how often the agent starts them again.
    """
    return _fork(lambda: _agent(words, processes, restarts), environment, log, lambda: None)


def preload_all() -> None:
    """Import what launcher, agent and workers would."""
    import importlib

    import torch

    from orchestrator.observe import gemm

    preload()
    for name in (
        "orchestrator.launch.start",
        "orchestrator.launch.run",
        _WORKER,
        "orchestrator.report.run_report",
        "orchestrator.launch.missing_ranks",
        "torch.distributed.launcher.api",
        "s3fs",
    ):
        importlib.import_module(name)
    torch.set_num_threads(1)
    # Where no peak is published it is measured; that is not what is tested.
    gemm.measure_gemm_flops.__defaults__ = (0.01,)
    gemm._CPU_SHAPES = ()  # type: ignore[assignment]


def _fork(action: Callable[[], int], environment: Mapping[str, str], log: Path, enter: Callable[[], object]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        _settle(log, environment)
        enter()
        code = action()
    except BaseException:
        traceback.print_exc()
    _end(code)


def _settle(log: Path, environment: Mapping[str, str]) -> None:
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # Where a test runner has put something else in their places.
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)


def _end(code: int) -> NoReturn:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _launch(words: list[str]) -> int:
    from unittest import mock

    from orchestrator.config.compose import compose
    from orchestrator.errors import UserError
    from orchestrator.launch.start import launch
    from orchestrator.output import printing
    from orchestrator.runs.time_book import process_began

    start = subprocess.Popen

    def popen(command: Sequence[str], **options: Any) -> Any:
        if _WORKER in command and command[-2] == "template":
            return ForkedTemplate(int(command[-1]), options["env"])
        return start(command, **options)

    with printing(), mock.patch.object(subprocess, "Popen", popen):
        try:
            return launch(compose(words), began=process_began()).code  # as the command line does
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code


def _agent(words: list[str], processes: int, restarts: int) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        1,
        1,
        processes,
        run_id=f"campaign-{os.getpid()}",
        rdzv_endpoint="localhost:0",
        rdzv_backend="c10d",
        rdzv_configs={"timeout": 60},
        max_restarts=restarts,
        monitor_interval=0.1,
        start_method="fork",
    )
    try:
        elastic_launch(config, _of_agent)(words)
    except ChildFailedError as error:
        print(f"agent: {error}", file=sys.stderr)
        return 1
    return 0


def _of_agent(words: list[str]) -> None:
    """A worker of torchrun's: a program of its own, which nothing tells when its agent has gone."""
    import ctypes

    from orchestrator.config.compose import compose
    from orchestrator.errors import UserError
    from orchestrator.launch.start import launch
    from orchestrator.output import printing
    from orchestrator.runs.time_book import process_began

    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # PR_SET_PDEATHSIG, which torch sets for functions and not for programs
    _leave_number(os.environ["RANK"])
    code = 1
    try:
        with printing(), _steps_logged():
            code = launch(compose(words), began=process_began()).code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    if code:  # else the agent waits for a value
        _end(code)


def _be_template(number: int, environment: Mapping[str, str]) -> NoReturn:
    from orchestrator.distributed.process_template import serve
    from orchestrator.launch import worker

    def work() -> NoReturn:
        _leave_number(os.environ["ORCHESTRATOR_RANK"])
        with _steps_logged():
            worker.run_process(["train"])
        raise AssertionError("unreachable")

    try:
        os.setsid()
        # Of what this process has inherited nothing may outlive it, and what is done at the end of a test is not its.
        os.closerange(3, number)
        os.closerange(number + 1, 4096)
        atexit._clear()
        os.environ.clear()
        os.environ.update(environment)
        serve(number, work)
    except BaseException:
        traceback.print_exc()
    _end(1)


def _leave_number(rank: str) -> None:
    folder = Path(os.environ[STEP_LOG])
    temporary = folder / f".pid-{rank}-{os.getpid()}"
    temporary.write_text(json.dumps([os.getpid(), time.monotonic()]))
    temporary.rename(folder / f"pid-{rank}")


@contextlib.contextmanager
def _steps_logged() -> Any:
    """Write a line for each step that this process completes: its number, the time, and the process."""
    from orchestrator.distributed import standing

    rank = os.environ.get("ORCHESTRATOR_RANK") or os.environ["RANK"]
    file = os.open(Path(os.environ[STEP_LOG]) / f"steps-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    hurry = Path(os.environ[STEP_LOG]) / HURRY

    def heard() -> None:
        os.write(file, (json.dumps([standing.here.step, time.monotonic(), os.getpid()]) + "\n").encode())
        if not hurry.exists():
            time.sleep(STEP_SECONDS)

    standing.here.heard.append(heard)
    yield
