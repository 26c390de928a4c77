"""What the host's CPU makes of the small training, in a process of its own: the other side of both handovers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.certify.certificate import Case
from orchestrator.certify.fixture import SAVED_STEP, STEPS, batch, only, with_layout
from orchestrator.certify.measuring import Found, attempt, farthest
from orchestrator.certify.recorded import recorded
from orchestrator.certify.trial import Trial
from orchestrator.checkpoint.reference import Handover
from orchestrator.distributed.world import World
from orchestrator.hardware.target_table import get_target
from orchestrator.sharding.layout import Layout
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.training.facts import provenance
from orchestrator.training.handover_check import check_handover, measure
from orchestrator.training.job import make_strategy
from orchestrator.training.resolved import Resolved

_FILE = "host.json"


@dataclass(frozen=True)
class HostSide:
    """The host's results, for all ranks to read.

    Attributes:
        first: its checkpoint after one step.
        middle: its checkpoint after `SAVED_STEP` steps.
        parts: loss and gradient norm of each part of the first batch, by the number of parts.
    """

    first: Path
    middle: Path
    parts: Mapping[int, Sequence[tuple[float | None, float | None]]]

    @classmethod
    def read(cls, folder: Path) -> HostSide:
        """Read what `work_before` has written.

        Args:
            folder: that all processes see.
        """
        data = json.loads((folder / _FILE).read_text())
        parts = {int(count): [tuple(pair) for pair in pairs] for count, pairs in data["parts"].items()}
        return cls(folder / data["first"], folder / data["middle"], parts)


def work_before(resolved: Resolved, folder: Path, parts: Sequence[int]) -> Case:
    """Train on the CPU, save twice, and measure parts of a batch. Before the devices.

    Args:
        resolved: the training.
        folder: that all processes see.
        parts: numbers of parts that the layouts cut a batch into.

    Returns:
        Whether this CPU computes what was recorded.
    """
    with _alone(resolved) as (own, parallel):
        trial = Trial(own, parallel)
        measured = {count: [_part(trial, parallel, part, count) for part in range(count)] for count in sorted({*parts})}
        trial.run(1)
        first = trial.save(folder / "host")
        trial.run(SAVED_STEP - 1)
        middle = trial.save(folder / "host")
        trial.run(STEPS - SAVED_STEP)
        names = {"first": first, "middle": middle}
        data = {**{key: str(path.relative_to(folder)) for key, path in names.items()}, "parts": measured}
        (folder / _FILE).write_text(json.dumps(data))

        def compare() -> Found:
            return farthest(trial.losses, recorded().losses), ""

        return attempt(parallel, "host_cpu", "", compare)


def work_after(resolved: Resolved, saved: Mapping[str, Path]) -> list[Case]:
    """Load on the CPU what the devices have saved. After the devices.

    Args:
        resolved: the training.
        saved: the checkpoint of each layout.
    """
    with _alone(resolved) as (own, parallel):
        return [
            attempt(parallel, "handover_out", layout, lambda path=path: _hand_over(own, parallel, path))  # type: ignore[misc]
            for layout, path in saved.items()
        ]


def excess(result: Handover) -> Found:
    """Return how far a handover check is from its tolerances: 1 is at the limit.

    Args:
        result: of the check.
    """
    parts = [one.difference / one.tolerance if one.tolerance else 2.0 * one.difference for one in result.differences]
    return max(parts, default=float("inf")), str(result).partition(" (changed")[0]


def _hand_over(own: Resolved, parallel: ParallelStrategy, path: Path) -> Found:
    trial = Trial(own, parallel)
    checkpoint = trial.load(path)
    return excess(check_handover(checkpoint, trial.model, trial.optimizer, parallel, provenance(parallel)))


def _part(trial: Trial, parallel: ParallelStrategy, part: int, parts: int) -> tuple[float | None, float | None]:
    found = measure(trial.model, parallel, only(batch(0), part, parts))
    return found.loss, found.grad_norm


@contextmanager
def _alone(resolved: Resolved) -> Iterator[tuple[Resolved, ParallelStrategy]]:
    """Within it this process is a job of its own, on its CPU."""
    hardware = replace(
        resolved.config.hardware,
        target="cpu",
        devices=1,
        precision="fp32",
        runtime="auto",
        simulate=None,
        compile=False,
    )
    own = replace(resolved, config=replace(with_layout(resolved.config, Layout()), hardware=hardware), devices=1)
    parallel = make_strategy(own, get_target("cpu"), World())
    parallel.join()
    try:
        yield own, parallel
    finally:
        parallel.leave()
