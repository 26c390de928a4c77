"""The processes of a job: which one this is, how they are started, and what they decide together.

`world` reads the environment of the engine that started them; `local_processes` starts them on one machine;
`coordinator` votes, broadcasts and exchanges small values between them on their CPUs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.distributed.coordinator import ProcessCoordinator, Vote
    from orchestrator.distributed.exchange import Coordinator, SingleProcess
    from orchestrator.distributed.heartbeat import Beat
    from orchestrator.distributed.local_processes import run_local
    from orchestrator.distributed.world import World, detect
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "distributed.coordinator": ["ProcessCoordinator", "Vote"],
            "distributed.exchange": ["Coordinator", "SingleProcess"],
            "distributed.heartbeat": ["Beat"],
            "distributed.local_processes": ["run_local"],
            "distributed.world": ["World", "detect"],
        },
    )

__all__ = [
    "Beat",
    "Coordinator",
    "ProcessCoordinator",
    "SingleProcess",
    "Vote",
    "World",
    "detect",
    "run_local",
]
