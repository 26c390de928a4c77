"""Where the processes of a job are, line by line: their Python stacks, and what the flight recorder of torch kept.

A process registers once, when it starts. Then a signal makes the C handler of `faulthandler` write its stacks, whatever
the interpreter is doing. A suspended process (SIGSTOP) writes when it is continued.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

SIGNAL = getattr(signal, "SIGUSR2", None)  # none on Windows
RECORDED_COLLECTIVES = 200
_WAIT_SECONDS, _POLL_SECONDS = 1.5, 0.05
_kept: list[IO[str]] = []  # open as long as the process lives: the handler writes to its number


def register(store: Path, rank: int) -> None:
    """Let this process write its stacks when it is asked to by `collect`, and let torch record its collectives.

    Args:
        store: the file where the processes meet; stacks are left beside it.
        rank: of this process.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDED_COLLECTIVES))
    if SIGNAL is not None:
        with contextlib.suppress(OSError):
            _kept.append(open(_text(store, rank), "w"))  # noqa: SIM115
            faulthandler.register(SIGNAL, file=_kept[-1], all_threads=True)


def write_own(folder: Path, rank: int, head: str) -> None:
    """Write this process's stacks, and what its flight recorder kept, into a folder. What fails is left out.

    Args:
        folder: is made.
        rank: of this process.
        head: the first line.
    """
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"rank-{rank}.txt", "w") as file:
            file.write(f"{head}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        if recorded := flight_record():
            (folder / f"rank-{rank}.json").write_text(recorded)


def flight_record() -> str:
    """Return the last collectives of this process as JSON; empty where its backend records none."""
    with contextlib.suppress(Exception):
        from torch._C import _distributed_c10d

        text = vars(_distributed_c10d)["_dump_fr_trace_json"]()
        return text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    return ""


def wanted(store: Path) -> bool:
    """Whether the launcher asks for the flight record of this process.

    Args:
        store: the file where the processes meet.
    """
    return os.path.exists(_flag(store))


def leave_record(store: Path, rank: int) -> None:
    """Leave the flight record of this process for the launcher.

    Args:
        store: the file where the processes meet.
        rank: of this process.
    """
    with contextlib.suppress(OSError):
        _record(store, rank).write_text(flight_record())


def collect(store: Path, pids: Mapping[int, int], suspended: Sequence[int], folder: Path, heads: Sequence[str]) -> None:
    """Make all processes write where they are, and keep it in `folder`: `rank-R.txt`, and `rank-R.json` where recorded.

    It takes four seconds at most. Those that are suspended are continued for it, after the others have written all they
    have: then the job goes on, and may even end, until its processes are ended.

    Args:
        store: the file where the processes meet.
        pids: of the processes that live, by rank.
        suspended: ranks that are.
        folder: is made; a full disk is no error.
        heads: the first line for each rank.
    """
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        _flag(store).touch()
    others = [rank for rank in pids if rank not in suspended]
    for ranks, numbers in ((others, (SIGNAL,)), (suspended, (SIGNAL, getattr(signal, "SIGCONT", None)))):
        for rank in ranks:
            for number in numbers:
                # To a process that has not registered the signal would be the end.
                if number is not None and _text(store, rank).exists() and rank in pids:
                    with contextlib.suppress(OSError):
                        _signal(pids[rank], number)
        there = [rank for rank in ranks if rank in pids and _text(store, rank).exists()]
        _await([_text(store, rank) for rank in there], 0.5)
        _await([_record(store, rank) for rank in there], _WAIT_SECONDS)
    for rank, head in enumerate(heads):
        said = _read(_text(store, rank)) or "it has written no stacks: it had just started, or its host does not let it"
        with contextlib.suppress(OSError):
            (folder / f"rank-{rank}.txt").write_text(f"{head}\n\n{said}")
            if recorded := _read(_record(store, rank)):
                (folder / f"rank-{rank}.json").write_text(recorded)


def _signal(pid: int, number: int) -> None:
    """Send a signal to a process: one that asks for its stacks to its main thread.

    Any thread may take one that is sent to a suspended process. The main thread, whose place is looked for, would then
    have gone on by the time that the stacks are written.
    """
    to_thread = getattr(ctypes.CDLL(None), "tgkill", None) if sys.platform == "linux" and number == SIGNAL else None
    if to_thread is None:
        os.kill(pid, number)
    else:
        to_thread(pid, pid, number)


def _await(paths: Sequence[Path], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not all(_read(path) for path in paths) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")
    return ""


def _text(store: Path, rank: int) -> Path:
    return store.with_name(f"{store.name}-stacks-{rank}")


def _record(store: Path, rank: int) -> Path:
    return store.with_name(f"{store.name}-flight-{rank}")


def _flag(store: Path) -> Path:
    return store.with_name(f"{store.name}-record")
