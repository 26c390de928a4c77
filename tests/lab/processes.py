"""The processes of a run that a launcher has started, by their ranks."""

from __future__ import annotations

import contextlib
import re

import psutil


def ranks_below(pid: int) -> dict[int, psutil.Process]:
    """The ranks that live below process `pid`. The system shows them as `rank-0`, `rank-1` and so on."""
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and (match := re.fullmatch(r"rank-(\d+)", process.name())):
                    found[int(match[1])] = process
    return found
