"""Starting a run: decide once, start the processes, and bring the run to its end.

`start` settles the configuration, finds the run that is meant and starts its processes; `run` is what each process
does; `worker` is the entry point of a process that was started here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.launch.canary import run_check
    from orchestrator.launch.objective import start_and_score
    from orchestrator.launch.start import Outcome, launch
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "launch.canary": ["run_check"],
            "launch.objective": ["start_and_score"],
            "launch.start": ["Outcome", "launch"],
        },
    )

__all__ = [
    "Outcome",
    "launch",
    "run_check",
    "start_and_score",
]
