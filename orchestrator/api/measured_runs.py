"""Read what a run has measured, for `plan measured=RUN`. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.observe.time_figures import TimeFigures, figures_of, poisson_interval
from orchestrator.observe.time_spans import read_book
from orchestrator.planner.estimate.goodput import restart_goodput
from orchestrator.planner.measured_run import MeasuredRun, OwnFigure
from orchestrator.planner.spec import ModelShape
from orchestrator.report.run_data import number
from orchestrator.runs.listing import find_run
from orchestrator.runs.run_directory import read_run
from orchestrator.training.resolved import Resolved, read_resolved

_DAY = 86400.0
_CPU = "cpu-generic"  # of the catalogue


def read_measured(where: str, runs_dir: str = "runs") -> MeasuredRun:
    """Return the figures of a run.

    Args:
        where: `latest`, a run directory, or the name of a run.
        runs_dir: where `latest` and names look.

    Raises:
        CheckpointError: there is no such run.
        ConfigError: it has measured nothing, or what it is cannot be read.
    """
    run_dir = find_run(where, runs_dir)
    resolved, facts = read_resolved(run_dir), read_run(run_dir)
    figures, devices = figures_of(read_book(run_dir)), resolved.devices
    if figures is None:
        raise ConfigError(
            "the run has measured nothing: it has no time book, or completed no step",
            got=f"measured={where}",
            fix="name a run that has trained, of this version or a later one",
        )
    name, config = f"{run_dir.parent.name}/{run_dir.name}", resolved.config
    vocab = config.model.vocab_size
    return MeasuredRun(
        name=name,
        chip=_chip(resolved),
        chips=devices,
        shape=ModelShape.of(config.model, vocab if isinstance(vocab, int) else None),
        seq_len=config.train.seq_len,
        batch_tokens=config.train.global_batch_tokens,
        layout=resolved.layout.as_dict(),
        step=_mean(figures.step_seconds, f"{figures.steps:,} steps", name),
        stall=_mean(figures.stall_seconds, f"{figures.saves:,} saves", name),
        restart=_mean(figures.restart_seconds, f"{figures.restarts:,} restarts", name),
        rate=_rate(figures, devices, name),
        watts=_watts(facts.get("legs", ()), devices, name),
        notes=_notes(figures, devices, name),
    )


def _chip(resolved: Resolved) -> str | None:
    return resolved.chip or (_CPU if resolved.config.hardware.target == "cpu" else None)


def _mean(value: float | None, of: str, name: str) -> OwnFigure | None:
    return None if value is None else OwnFigure(value, f"measured: mean of {of} of {name}")


def _rate(figures: TimeFigures, devices: int, name: str) -> OwnFigure | None:
    """Return failures per chip and day; None where none was seen: then the published rate is the better guess."""
    if not figures.failures:
        return None
    days = figures.seconds * devices / _DAY
    low, high = poisson_interval(figures.failures)
    text = f"{figures.failures} failures in {days:.3g} chip-days (95%: {low / days:.3g} to {high / days:.3g} a day)"
    return OwnFigure(figures.failures / days, f"measured: {text} of {name}")


def _watts(legs: Sequence[Any], devices: int, name: str) -> OwnFigure | None:
    """Return the mean power per chip of the legs whose devices were all counted: GPUs, else CPUs with their memory."""
    joules = seconds = 0.0
    for leg in legs:
        energy = leg.get("energy") if isinstance(leg, Mapping) else None
        if not isinstance(energy, Mapping) or leg.get("hosts") != 1:
            continue
        parts, counted = energy.get("joules"), energy.get("counted")
        spent = number(energy.get("seconds"))
        if isinstance(parts, Mapping) and isinstance(counted, Mapping) and spent:
            if "gpu" in parts and counted.get("gpu") != devices:
                continue
            joules += sum(number(value) or 0.0 for value in parts.values())
            seconds += spent
    if not joules or not seconds:
        return None
    return OwnFigure(joules / seconds / devices, f"measured: {joules:,.0f} J in {seconds:,.0f} s of {name}")


def _notes(figures: TimeFigures, devices: int, name: str) -> tuple[str, ...]:
    text = f"{name} measured a goodput of {figures.goodput:.1%}"
    known = (figures.interval_seconds, figures.stall_seconds, figures.mtbf_seconds, figures.restart_seconds)
    if None not in known:
        kept = figures.expected(restart_goodput(*(value or 0.0 for value in known)))
        text += f"; its failures, saves and restarts let expect {kept:.1%}"
    elif not figures.failures:
        high = poisson_interval(0)[1] / (figures.seconds * devices / _DAY)
        text += f"; it has not failed (95%: at most {high:.3g} a chip-day), so the published rate is taken"
    return (text,)
