"""Rules of the `launch` group beyond types and what every way of starting a job has."""

from __future__ import annotations

from orchestrator.config.launch_schema import KubernetesLaunch, LaunchConfig, RayLaunch, SkypilotLaunch
from orchestrator.config.validate_model import out_of_range
from orchestrator.errors import ConfigError

_LEAST = {
    KubernetesLaunch: {"slices": 1, "network_devices": 1, "keep_seconds": 0},
    SkypilotLaunch: {"disk_gb": 1},
    RayLaunch: {"cpus": 0},
}


def check_launch(launch: LaunchConfig) -> list[ConfigError]:
    """List the numbers of the group that are out of range.

    Args:
        launch: the group.
    """
    found = [
        out_of_range(f"launch.{key}", value, f"{least} or more")
        for key, least in _LEAST.get(type(launch), {}).items()
        if (value := getattr(launch, key)) is not None and not least <= value < 1 << 31
    ]
    if isinstance(launch, RayLaunch):
        found += [
            out_of_range(f"launch.resources.{name}", value, "more than 0")
            for name, value in launch.resources.items()
            if not 0 < value < 1 << 31
        ]
    return found
