"""The table of launch engines."""

from __future__ import annotations

import importlib

from orchestrator.engines.engine import Engine

ENGINES: dict[str, str] = {
    "kubernetes": "orchestrator.engines.kubernetes_engine:KubernetesEngine",
    "ray": "orchestrator.engines.ray_engine:RayEngine",
    "skypilot": "orchestrator.engines.skypilot_engine:SkypilotEngine",
    "slurm": "orchestrator.engines.slurm_engine:SlurmEngine",
    "torchrun": "orchestrator.engines.torchrun_engine:TorchrunEngine",
    "ssh": "orchestrator.engines.ssh_engine:SshEngine",
}
"""Option of the `launch` group -> module:class."""


def engine_of(name: str) -> Engine:
    """Return the engine of that name.

    Args:
        name: a key of `ENGINES`.
    """
    module, _, attribute = ENGINES[name].partition(":")
    engine: Engine = getattr(importlib.import_module(module), attribute)()
    return engine
