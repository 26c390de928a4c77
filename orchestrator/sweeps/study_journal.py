"""The file of a study: Optuna's journal, one line per event, safe on file systems of clusters."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from optuna.storages import JournalStorage

JOURNAL = "study.journal"
STUDY = "sweep"
"""The name of the one study in a journal."""


def open_journal(folder: Path) -> JournalStorage:
    """Open the journal of a sweep's folder, which is made where there is none.

    Args:
        folder: of the sweep.

    Raises:
        MissingExtraError: Optuna is not installed.
        ConfigError: the file cannot be written, or is none.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ModuleNotFoundError as error:
        raise MissingExtraError("optuna", "sweeps", "a sweep by Optuna") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    # Absolute: the lock is a symbolic link to it, and one that leads nowhere is waited for without an end.
    path = folder.absolute() / JOURNAL
    try:
        folder.mkdir(parents=True, exist_ok=True)
        backend = JournalFileBackend(str(path))
        _mend(path)
        return JournalStorage(backend)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the study of the sweep cannot be read: {error}",
            got=path,
            fix="set hydra.sweeper.name to begin another one",
        ) from error


def _mend(path: Path) -> None:
    """Cut a last line that a killed process has not completed: whatever came behind it could not be read."""
    from optuna.storages.journal import JournalFileSymlinkLock

    with open(path, "rb") as file:
        if not file.seek(0, os.SEEK_END):
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
    lock = JournalFileSymlinkLock(str(path))  # another process may be writing that line
    lock.acquire()
    try:
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    finally:
        lock.release()
