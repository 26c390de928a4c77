"""Rules of the `islands` group beyond types."""

from __future__ import annotations

from orchestrator.config.islands_schema import IslandsConfig
from orchestrator.config.optimizers import LARGEST
from orchestrator.config.validate_model import out_of_range
from orchestrator.errors import ConfigError

_COUNTS = {
    "inner_steps": (1, 10**9),
    "fragments": (1, 1 << 14),
    "overlap_steps": (0, 10**9),
    "retained_mib": (1, 1 << 30),
}
_NOT_NEGATIVE = ("grace_seconds", "stale_weight", "patience_seconds")


def check_islands(islands: IslandsConfig) -> list[ConfigError]:
    """List the numbers of the group that are out of range, where their bounds are their own.

    Args:
        islands: the group.
    """
    found = [
        out_of_range(f"islands.{key}", value, f"{least} to {largest}")
        for key, (least, largest) in _COUNTS.items()
        if not least <= (value := getattr(islands, key)) <= largest
    ]
    found += [
        out_of_range(f"islands.{key}", value, f"0 to {LARGEST:g}")
        for key in _NOT_NEGATIVE
        if not 0 <= (value := getattr(islands, key)) <= LARGEST
    ]
    if not 0 < islands.timeout_seconds <= LARGEST:
        found.append(out_of_range("islands.timeout_seconds", islands.timeout_seconds, "more than 0"))
    lr, momentum, mix = islands.outer.lr, islands.outer.momentum, islands.overlap_mix
    if lr != "auto" and not 0 < lr <= 10:
        found.append(out_of_range("islands.outer.lr", lr, "auto, or more than 0 and at most 10"))
    if momentum != "auto" and not 0 <= momentum < 1:
        found.append(out_of_range("islands.outer.momentum", momentum, "auto, or 0 or more and less than 1"))
    if mix is not None and not 0 <= mix <= 1:
        found.append(out_of_range("islands.overlap_mix", mix, "null, or 0 to 1"))
    return found
