"""The figures of a layout: speed, days, failures and cost, as values that know their derivation."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.chips.catalogue import Catalogue
from orchestrator.planner.estimate.goodput import FailureOptions, Goodput, goodput
from orchestrator.planner.estimate.money import bill
from orchestrator.planner.estimate.work import model_flops_per_token
from orchestrator.planner.explain import AXES, PARTS, link_of, parts
from orchestrator.planner.fleet import Fleet, inter_bandwidth
from orchestrator.planner.quantity import Value, derive, given, of_figure
from orchestrator.planner.search import Candidate

SPEED = ("step", "speed", "per_chip", "mfu", "memory", "ideal_days")
RUN = ("goodput", "days", "mtbf", "interruptions", "interval", "stall", "spares")
BILL = ("cost", "cost_per_trillion", "energy", "power")
FIGURES = (*SPEED, *RUN, *BILL)
"""Short names of all figures of a plan."""


def speed_figures(
    fleet: Fleet, best: Candidate, tokens: Value, catalogue: Catalogue, step: Value | None = None
) -> dict[str, Value]:
    """Return the figures of a step, and of the run if nothing ever failed.

    Args:
        fleet: the chips.
        best: the layout.
        tokens: of the run.
        catalogue: of chips.
        step: seconds of one, where that was measured; None: as predicted.
    """
    job = best.job
    step = step or _step(fleet, best, catalogue)
    batch = given("tokens per step", float(job.global_batch_tokens), "tokens", "the batch")
    speed = derive(
        "tokens per second", "tokens/s", "tokens per step / step", lambda b, s: b / s, batch, step, falling=(1,)
    )
    formula = "tokens per second / chips at work"
    per_chip = derive(
        "tokens per second and chip", "tokens/s", formula, lambda t, n: t / n, speed, _working(fleet, best)
    )
    arithmetic = model_flops_per_token(job.model, job.seq_len)
    flops = given("arithmetic per token", arithmetic, "FLOP", "6 N + attention, nothing computed twice")
    peak = of_figure(
        f"{job.precision} peak per chip", fleet.cluster.chip.peak_flops(job.precision), "FLOP/s", catalogue
    )
    formula = "tokens per second and chip x arithmetic per token / peak"
    mfu = derive("MFU", "ratio", formula, lambda t, f, p: t * f / p, per_chip, flops, peak)
    formula = "tokens / tokens per second / 86400"
    ideal = derive("days without failures", "days", formula, lambda n, t: n / t / 86400, tokens, speed, falling=(1,))
    memory = given("memory per device", best.memory.total, "byte", "memory model")
    return dict(zip(SPEED, (step, speed, per_chip, mfu, memory, ideal), strict=True))


def goodput_of(fleet: Fleet, best: Candidate, step: Value, failures: FailureOptions) -> Goodput:
    """Return what failures make of the time; a fleet's own rate goes before the general one.

    Args:
        fleet: the chips.
        best: the layout.
        step: seconds of one.
        failures: rates, and how the job recovers.
    """
    if fleet.entry.failures_per_chip_day is not None:
        failures = replace(failures, failures_per_chip_day=fleet.entry.failures_per_chip_day)
    state = best.memory.parameters + best.memory.optimizer
    working = _working(fleet, best)
    return goodput(fleet.cluster.chip, working, state, step, best.plan.data_parallel, failures)


def run_figures(fleet: Fleet, ideal: Value, kept: Goodput, tokens: Value) -> dict[str, Value]:
    """Return the figures of the run with its failures: days, saves, cost and energy.

    Args:
        fleet: the chips.
        ideal: seconds of the run without failures.
        kept: share of the time that is kept.
        tokens: of the run.
    """
    formula = "days without failures / goodput"
    days = derive("days", "days", formula, lambda d, g: d / g, ideal, kept.fraction, falling=(1,))
    formula = "days x 86400 / time between failures"
    count = derive("interruptions", "failures", formula, lambda d, m: d * 86400 / m, days, kept.mtbf, falling=(1,))
    costs = bill(fleet, days, tokens)
    run = (kept.fraction, days, kept.mtbf, count, kept.interval, kept.stall, kept.spares)
    money = (costs.run, costs.per_trillion, costs.energy, costs.megawatts)
    return dict(zip((*RUN, *BILL), (*run, *money), strict=True))


def _working(fleet: Fleet, best: Candidate) -> Value:
    chips = best.plan.devices // fleet.cluster.chip.logical_devices_per_chip
    return given("chips at work", float(chips), "chips", "the layout")


def _step(fleet: Fleet, best: Candidate, catalogue: Catalogue) -> Value:
    """Return the step as the sum of its parts; marked where it goes over a network whose rate is an estimate."""
    network = inter_bandwidth(fleet, catalogue)
    values = []
    for name, seconds in parts(best.time).items():
        if seconds <= 0:
            continue
        over = link_of(name, best.plan, fleet.cluster) if name in AXES else ""
        outside = over.startswith("the network")
        source = "time model" + (f"; over {over}" if over else "") + (f" at {network} per chip" if outside else "")
        values.append(given(PARTS[name], seconds, "s", source, estimated=outside and network.estimated))
    formula = "sum of what a device waits for"
    if best.time.estimated:
        formula += f"; nobody has measured {', '.join(best.time.estimated)} of this chip"
    step = derive("step", "s", formula, lambda *seconds: sum(seconds), *values, estimated=bool(best.time.estimated))
    return replace(step, bound=1) if best.time.unknown else step
