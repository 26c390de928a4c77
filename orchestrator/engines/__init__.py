"""Launch engines: what each takes is rendered, checked offline, and submitted by the engine's own client."""

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.engines.engine import Engine, EngineStatus, Rendered
    from orchestrator.engines.engine_job import EngineJob
    from orchestrator.engines.engine_table import engine_of
    from orchestrator.engines.submission import Submission
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "engines.engine": ["Engine", "EngineStatus", "Rendered"],
            "engines.engine_table": ["engine_of"],
            "engines.engine_job": ["EngineJob"],
            "engines.submission": ["Submission"],
        },
    )

__all__ = ["Engine", "EngineJob", "EngineStatus", "Rendered", "Submission", "engine_of"]
