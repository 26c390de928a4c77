"""What a run has measured, in place of what the planner would assume; each figure with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.planner.estimate.goodput import FailureOptions
from orchestrator.planner.fleet import Fleet
from orchestrator.planner.quantity import Value, given
from orchestrator.planner.search import Candidate
from orchestrator.planner.spec import ModelShape

_DEGREES = ("replicate", "pipeline", "fsdp", "expert", "context", "tensor")


@dataclass(frozen=True)
class OwnFigure:
    """One figure.

    Attributes:
        value: in the unit of what it replaces.
        source: how it was measured, with how much there was to measure.
    """

    value: float
    source: str


@dataclass(frozen=True)
class MeasuredRun:
    """A run and its figures; None where it has not measured one.

    Attributes:
        name: of the run.
        chip: key of the catalogue; None where the run did not know it.
        chips: of the job.
        shape: of the model.
        seq_len: tokens of a sequence.
        batch_tokens: of a step.
        layout: degrees by mesh axis.
        step: seconds.
        stall: seconds that a save stopped the step.
        restart: seconds from a failure to the next step.
        rate: failures per chip and day.
        watts: per chip.
        notes: what is said of it beside a plan.
    """

    name: str
    chip: str | None
    chips: int
    shape: ModelShape
    seq_len: int
    batch_tokens: int
    layout: Mapping[str, int] = field(default_factory=dict)
    step: OwnFigure | None = None
    stall: OwnFigure | None = None
    restart: OwnFigure | None = None
    rate: OwnFigure | None = None
    watts: OwnFigure | None = None
    notes: tuple[str, ...] = ()

    def powered(self, fleet: Fleet) -> Fleet:
        """Return the fleet with the power that was measured, where its chips are those of the run.

        Args:
            fleet: the chips. A power that the user gave for it stays.
        """
        if self.watts is None or not self._same_chip(fleet) or fleet.entry.watts_per_chip is not None:
            return fleet
        return replace(fleet, power=given("server power per chip", self.watts.value, "W", self.watts.source))

    def step_of(self, fleet: Fleet, best: Candidate) -> Value | None:
        """Return the step that was measured, where the plan is that of the run; else None.

        Args:
            fleet: the chips.
            best: the layout.
        """
        if self.step is None or not self._same_job(fleet, best) or not self._same_layout(best):
            return None
        return given("step", self.step.value, "s", self.step.source)

    def failures_of(self, fleet: Fleet, best: Candidate, options: FailureOptions) -> FailureOptions:
        """Return the options with what was measured, where it is comparable and the user gave nothing else.

        How long a restart takes is a matter of software and storage, and taken always; failures are those of a kind of
        chip, and a stall that of a model on so many of them.

        Args:
            fleet: the chips.
            best: the layout.
            options: of the user.
        """
        taken = {"restart_seconds": self.restart}
        taken |= {"failures_per_chip_day": self.rate} if self._same_chip(fleet) else {}
        taken |= {"save_stall_seconds": self.stall} if self._same_job(fleet, best) else {}
        new = {name: one for name, one in taken.items() if one is not None and getattr(options, name) is None}
        sources = {**options.sources, **{name: one.source for name, one in new.items()}}
        numbers: dict[str, Any] = {name: one.value for name, one in new.items()}
        return replace(options, sources=sources, **numbers)

    def notes_on(self, fleet: Fleet, best: Candidate) -> list[str]:
        """Return what was taken from the run, and why the rest was not.

        Args:
            fleet: the chips.
            best: the layout.
        """
        found = list(self.notes)
        if not self._same_chip(fleet):
            chip = self.chip or "a chip that is not in the catalogue"
            found.append(f"of {self.name}, on {chip}, the restart alone is taken: other figures are of its chips")
        elif not self._same_job(fleet, best):
            found.append(f"step and stall of {self.name} are not taken: it has another model, batch or number of chips")
        elif self.step is not None and not self._same_layout(best):
            degrees = " ".join(f"layout.{axis}={self.layout.get(axis, 1)}" for axis in _DEGREES)
            found.append(f"the step of {self.name} is not taken, its layout is another one: {degrees}")
        return found

    def _same_chip(self, fleet: Fleet) -> bool:
        return self.chip == fleet.cluster.chip.key

    def _same_job(self, fleet: Fleet, best: Candidate) -> bool:
        job = best.job
        theirs = (self.shape, self.seq_len, self.batch_tokens, self.chips)
        return self._same_chip(fleet) and theirs == (
            replace(job.model, name=self.shape.name),
            job.seq_len,
            job.global_batch_tokens,
            fleet.cluster.chips,
        )

    def _same_layout(self, best: Candidate) -> bool:
        return all(getattr(best.plan, axis) == self.layout.get(axis, 1) for axis in _DEGREES)
