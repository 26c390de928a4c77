"""The product as a user starts it: a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

TIMEOUT_SECONDS = 240


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "orchestrator", *words]


def run(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run to the end; the exit code is for the test to judge."""
    environment = {**os.environ, **(env or {})}
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment)


def start(*words: str) -> subprocess.Popen[str]:
    """Start in a session of its own, so that a test's signals reach only it."""
    return subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for `condition`; a process that ends before is a failure."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"ended early with {process.returncode}:\n{process.communicate()[0]}")
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"nothing happened in {TIMEOUT_SECONDS} s:\n{process.communicate()[0]}")
        time.sleep(0.02)


def kill_all(process: subprocess.Popen[str]) -> None:
    """kill -9 of the launcher and of every worker, in one go."""
    import psutil

    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    process.wait()


def only_run(runs_dir: Path) -> Path:
    """The one run directory there is."""
    found: Sequence[Path] = list(runs_dir.glob("*/*/config.yaml"))
    assert len(found) == 1, found
    return found[0].parent
