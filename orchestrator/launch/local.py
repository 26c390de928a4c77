"""Start the processes of a job on this machine and watch over them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from orchestrator.hardware.world import World

_GRACE_SECONDS = 15.0  # a process whose peer died cannot save: its collectives fail
_POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1


def run_local(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
    """Run `command` once per entry of `environments` and wait for all.

    A signal to this process is passed on once to each; when one process fails the others are ended. The
    processes have sessions of their own, so that a Ctrl-C reaches them through here alone.

    Returns:
        0, or the exit code of the first process that failed (128 + n for a signal n).
    """
    with tempfile.TemporaryDirectory(prefix="orchestrator-") as folder:
        store = f"file:{Path(folder) / 'store'}" if len(environments) > 1 else ""
        processes: list[subprocess.Popen[bytes]] = []
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def forward(number: int, frame: FrameType | None) -> None:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)

        for number in handlers:
            signal.signal(number, forward)
        try:
            for rank, extra in enumerate(environments):
                world = World(rank, len(environments), rank, len(environments), store)
                env = {**os.environ, **extra, **world.environment()}
                processes.append(
                    subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=_die_with_parent)
                )
            return _wait(processes)
        finally:
            _end(processes)
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if failed:
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(_POLL_SECONDS)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask what still runs to stop, then make it."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _die_with_parent() -> None:
    # Without it a killed launcher leaves its workers training. They are asked to save and stop.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
