"""Runs on disk: the directory of a run, its identity and record, and how one is found, resumed or started from.

No torch and no device: the launcher uses this package before it starts a process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.runs.listing import newest_run
    from orchestrator.runs.pruning import prune_checkpoints
    from orchestrator.runs.record import Record
    from orchestrator.runs.run_directory import RunPaths, read_history
    from orchestrator.runs.shared_folder import check_shared
    from orchestrator.runs.stored_model import find_checkpoint, model_of, tokenizer_of
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "runs.listing": ["newest_run"],
            "runs.pruning": ["prune_checkpoints"],
            "runs.record": ["Record"],
            "runs.run_directory": ["RunPaths", "read_history"],
            "runs.shared_folder": ["check_shared"],
            "runs.stored_model": ["find_checkpoint", "model_of", "tokenizer_of"],
        },
    )

__all__ = [
    "Record",
    "RunPaths",
    "check_shared",
    "find_checkpoint",
    "model_of",
    "newest_run",
    "prune_checkpoints",
    "read_history",
    "tokenizer_of",
]
