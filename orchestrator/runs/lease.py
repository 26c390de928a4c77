"""Hold a run's checkpoints in an object store for one process. No torch.

A store knows no locks, and a holder may be dead. So each holder makes an object of the next number, which of several
writers one succeeds in making, and rewrites it every few seconds. One that has not changed for a while is a dead
holder's, and the next number may be made. No clocks are compared. A holder that was only silent finds the next number
when it comes back: it ends, and commits nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from orchestrator.atomic_files import write_atomically
from orchestrator.checkpoint.format import parse_json
from orchestrator.checkpoint.storage import AnyPath, children, claim, put_last, read_bounded, remove_file, there
from orchestrator.checkpoint.store_timeouts import briefly
from orchestrator.errors import FAILED, CheckpointError, SaveError, shown
from orchestrator.output import tell

_EXPIRY_SECONDS = 20.0  # a lease that was not renewed for so long is a dead holder's
_PATIENCE_SECONDS = 60.0
_BEATS = 4  # of a holder, at least, until its lease expires
_JOIN_SECONDS = 5.0
TAKEN = ".lease"  # file of the run directory: the lease that was last taken from it
_NAME = re.compile(r"lease-(\d{8})\.json")
_BYTES = 1 << 9


def take_lease(
    checkpoints: AnyPath, run_dir: Path, patient: bool, peers_wait_seconds: float
) -> contextlib.AbstractContextManager[None]:
    """Take the checkpoints of a run in a store; within the context they are held. The caller holds the run directory.

    Args:
        checkpoints: the prefix of the run's checkpoints.
        run_dir: the run's directory: a lease that was last taken from it is that of a predecessor, which is dead.
        patient: wait for a living holder for a while, instead of refusing as soon as it gives a sign of life.
        peers_wait_seconds: other processes of the job wait for this one so long; it must not wait as long itself.

    Raises:
        CheckpointError: another process holds them.
        OSError: the store does not answer.
    """
    lease = _Lease(checkpoints, run_dir, min(_EXPIRY_SECONDS, peers_wait_seconds / 3))
    lease.take(min(_PATIENCE_SECONDS, peers_wait_seconds / 2) if patient else 0)
    return _held(lease)


@contextlib.contextmanager
def _held(lease: _Lease) -> Iterator[None]:
    beating = threading.Thread(target=lease.beat, name="lease", daemon=True)
    beating.start()
    try:
        yield
    finally:
        lease.ended.set()
        beating.join(_JOIN_SECONDS)
        lease.release()


def fence(checkpoints: AnyPath, run_dir: Path) -> Callable[[], None]:
    """Return what is asked before a checkpoint is committed: whether this job still holds them.

    Args:
        checkpoints: the prefix of the run's checkpoints.
        run_dir: the run's directory, from which the lease was taken.
    """

    def check() -> None:
        with contextlib.suppress(FileNotFoundError):
            number = int(json.loads((run_dir / TAKEN).read_text())["number"])
            if there(_path(checkpoints, number + 1)):
                raise SaveError("another process has gone on with this run", got=checkpoints)

    return check


class _Lease:
    def __init__(self, checkpoints: AnyPath, run_dir: Path, expiry_seconds: float):
        self.checkpoints, self.run_dir, self.expiry_seconds = checkpoints, run_dir, expiry_seconds
        self.ended = threading.Event()
        self.number, self.beats, self.token = 0, 0, uuid.uuid4().hex

    def content(self, released: bool = False) -> bytes:
        about = {"token": self.token, "host": socket.gethostname(), "pid": os.getpid(), "beats": self.beats}
        # Of one size, as a reader asks for it first.
        state = {"expiry_seconds": self.expiry_seconds, "released": released}
        return json.dumps({**about, **state}).encode().ljust(_BYTES)

    def take(self, patience_seconds: float) -> None:
        """Make the next lease when the last one is free."""
        deadline = time.monotonic() + patience_seconds
        while True:
            last, holder = self._last()
            if last and not self._is_free(holder):
                tell(f"waiting    {_who(holder)} has held the checkpoints of this run: is it there still?")
                self._await_end(last, holder, deadline)
            self.number = last + 1
            if claim(_path(self.checkpoints, self.number), self.content()) == self.content():
                break  # else another one was faster
        write_atomically(self.run_dir / TAKEN, json.dumps({"number": self.number, "token": self.token}))
        if last:
            with contextlib.suppress(OSError):
                remove_file(_path(self.checkpoints, last))

    def _last(self) -> tuple[int, Mapping[str, Any]]:
        numbers = [int(match[1]) for path in children(self.checkpoints) if (match := _NAME.fullmatch(path.name))]
        if not numbers:
            return 0, {}
        return max(numbers), self._read(max(numbers))

    def _read(self, number: int) -> Mapping[str, Any]:
        try:
            found = parse_json(read_bounded(_path(self.checkpoints, number), 1 << 16))
        except (FileNotFoundError, ValueError, CheckpointError):
            return {}  # nobody's: it is waited for whether somebody renews it
        return found if isinstance(found, dict) else {}

    def _is_free(self, holder: Mapping[str, Any]) -> bool:
        if holder.get("released") is True:
            return True
        try:
            ours = json.loads((self.run_dir / TAKEN).read_text())
        except (OSError, ValueError):
            return False
        return isinstance(ours, dict) and ours.get("token") == holder.get("token")

    def _await_end(self, number: int, holder: Mapping[str, Any], deadline: float) -> None:
        """Wait until a holder has released its lease, or has not renewed it for long enough.

        Raises:
            CheckpointError: it is alive when the time is over.
        """
        last, changed, expiry = holder, time.monotonic(), _expiry(holder)
        while time.monotonic() - changed < expiry:
            time.sleep(expiry / 20)
            found = self._read(number)
            if self._is_free(found) or there(_path(self.checkpoints, number + 1)):
                return
            if found != last:
                last, changed = found, time.monotonic()
                if changed > deadline:
                    raise CheckpointError(
                        "another process is training this run",
                        got=f"{_who(found)}, which keeps its checkpoints in {self.checkpoints}",
                        fix="wait for it, stop it, or start a new run",
                    )
        tell(f"waiting    over: {_who(holder)} has given no sign of life for {expiry:.3g} s")

    def beat(self) -> None:
        """Renew the lease until the end."""
        while not self.ended.wait(self.expiry_seconds / _BEATS):
            self.beats += 1
            with contextlib.suppress(Exception):  # a store that does not answer: it is asked again, and others are, too
                if briefly(lambda: there(_path(self.checkpoints, self.number + 1))):
                    self._lost()
                self._put(self.content())

    def _lost(self) -> NoReturn:
        text = "error: another process has gone on with this run, after this one had given no sign of life for a while"
        tell(f"{text}\n  got:     {self.checkpoints}", level=logging.ERROR)
        # At once, and without a save: what is there belongs to the other one.
        os._exit(FAILED)

    def release(self) -> None:
        """Let go of the checkpoints. Where the store does not take that, the next one waits."""
        with contextlib.suppress(Exception):
            self._put(self.content(released=True))

    def _put(self, content: bytes) -> None:
        briefly(lambda: put_last(_path(self.checkpoints, self.number), content))


def _path(checkpoints: AnyPath, number: int) -> AnyPath:
    return checkpoints / f"lease-{number:08d}.json"


def _expiry(holder: Mapping[str, Any]) -> float:
    """How long a holder may be silent, by its own word."""
    seconds = holder.get("expiry_seconds")
    return min(float(seconds), _PATIENCE_SECONDS) if isinstance(seconds, (int, float)) else _EXPIRY_SECONDS


def _who(holder: Mapping[str, Any]) -> str:
    return f"process {shown(holder.get('pid', '?'), 10)} on {shown(holder.get('host', '?'), 60)}"
