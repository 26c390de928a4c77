"""The process that ends the others when the one that started them is gone."""

from __future__ import annotations

import signal
import subprocess
import sys

from orchestrator.distributed.local_processes import _guarded


def test_a_guard_that_was_killed_is_started_again_and_does_its_work():
    command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(command) as watched, _guarded([watched]) as guard:
        first = guard.process
        guard.keep()
        assert guard.process is first
        first.kill()
        first.wait()
        guard.keep()
        assert guard.process is not first
        assert guard.process.poll() is None
        assert watched.poll() is None
        assert guard.process.stdin is not None
        guard.process.stdin.close()  # as when this process dies
        assert watched.wait(10) == -signal.SIGTERM
