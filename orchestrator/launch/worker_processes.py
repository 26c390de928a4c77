"""Processes of this machine that work in a folder of their launcher's, and what becomes of their errors."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator import stopping
from orchestrator.distributed.local_processes import run_local
from orchestrator.errors import LostPeerError, RunFailedError, UserError, error_from_dict, error_to_dict
from orchestrator.output import tell

ERROR = "error.json"
"""File of the launcher's folder: the error that has ended the processes."""


def run_workers(words: Sequence[str], environments: Sequence[Mapping[str, str]], folder: Path, what: str) -> None:
    """Run workers to their end.

    Args:
        words: arguments of `launch.worker`.
        environments: variables of each process.
        folder: where they leave an error.
        what: they are, for messages: `the job`.

    Raises:
        UserError: that one has left, or as they ended without a word.
    """
    ended = run_local(
        [sys.executable, "-m", "orchestrator.launch.worker", *words], [dict(each) for each in environments]
    )
    stopping.check()
    if ended.code and (folder / ERROR).exists():
        raise error_from_dict(json.loads((folder / ERROR).read_text()))
    if ended.code:
        got = "; ".join(ended.problems) or f"exit code {ended.code}"
        raise RunFailedError(f"{what} was ended before it had a result", got=got, fix="see above")


def leave_error(folder: Path, rank: int, error: UserError) -> int:
    """Leave the error of a worker for its launcher. All ranks meet the same problem; one says so.

    Args:
        folder: of the launcher.
        rank: of this process.
        error: that ends it.

    Returns:
        The exit code of the process.
    """
    if rank == 0:
        (folder / ERROR).write_text(json.dumps(error_to_dict(error)))
    elif isinstance(error, LostPeerError):
        tell(str(error), level=logging.ERROR)
    return error.exit_code
