"""End the processes of a job when the one that started them is gone: `process_guard.py PID ...`.

Standard input is a pipe whose other end the launcher holds. Its end of file says that the launcher has gone, however it
went. What still runs then is asked to save and stop (SIGTERM). A process that is stopped (SIGSTOP) acts on no signal
but SIGCONT and SIGKILL, so it is continued first; what is there after `GRACE_SECONDS` is killed.
"""

import contextlib
import os
import signal
import sys
import time

GRACE_SECONDS = 90.0
_POLL_SECONDS = 0.5


class _Process:
    """A process that is not our child; by a handle, where the system has such, so that its number cannot be reused."""

    def __init__(self, pid: int):
        self._pid, self._handle = pid, None
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                self._handle = os.pidfd_open(pid)

    def send(self, number: int) -> bool:
        """Send a signal (0: none). Returns whether the process is there."""
        try:
            if self._handle is not None:
                signal.pidfd_send_signal(self._handle, number)
            else:
                os.kill(self._pid, number)
        except OSError:
            return False
        return True


def main(pids: list[int]) -> None:
    """Wait until standard input closes, as it does when the parent dies, then end the processes `pids`.

    They get SIGTERM, and SIGKILL after `GRACE_SECONDS`.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    processes = [_Process(pid) for pid in pids]
    while os.read(0, 4096):
        pass
    for process in processes:
        process.send(signal.SIGTERM)
        process.send(signal.SIGCONT)
    deadline = time.monotonic() + GRACE_SECONDS
    while any(process.send(0) for process in processes):
        if time.monotonic() > deadline:
            for process in processes:
                process.send(signal.SIGKILL)
            return
        time.sleep(_POLL_SECONDS)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
