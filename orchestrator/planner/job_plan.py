"""Plan a job on a fleet: search the layouts, then compute days and cost of the best one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from orchestrator.chips.catalogue import Catalogue
from orchestrator.errors import ConfigError
from orchestrator.planner.estimate.goodput import FailureOptions, Goodput
from orchestrator.planner.estimate.memory import device_capacity
from orchestrator.planner.estimate.optimizer_memory import least_moments
from orchestrator.planner.estimate.work import parameters
from orchestrator.planner.evidence.calibration import COMPILED, calibration
from orchestrator.planner.explain import layout_text
from orchestrator.planner.figures import goodput_of, run_figures, speed_figures
from orchestrator.planner.fleet import Fleet, FleetEntry, resolve_fleet
from orchestrator.planner.measured_run import MeasuredRun
from orchestrator.planner.quantity import Value
from orchestrator.planner.search import LEADERS, Batch, Candidate, Estimators, SearchResult, Space, search
from orchestrator.planner.slices import is_tpu, legal_shapes
from orchestrator.planner.spec import JobSpec

if TYPE_CHECKING:
    from orchestrator.planner.exchange_terms import ExchangeTerms
    from orchestrator.planner.target_loss import TargetLoss

MOST_CHIPS = 2**20
BATCH_LEAST, BATCH_MOST, BATCH_PER_CHIP = 2**22, 2**26, 1024
"""Tokens of a step where the user leaves the batch open: so many per chip, which is what Llama 3 405B had on 16,384
chips (arXiv 2407.21783), within these bounds."""


_SHORTEST_RUN_HOURS = 1.0  # of a fleet that a budget sizes: clouds reserve and bill large fleets by the hour at best


@dataclass(frozen=True)
class Request:
    """A job to be planned.

    Attributes:
        job: its batch is `batch_tokens`; where that is None, it follows the fleet.
        tokens: of the run.
        space: what the search may choose.
        widest: the same without what the user fixed; `restricted` says that in words.
        failures: rates, and how the job recovers.
        estimators: of memory and time.
        measured: a run whose figures replace what would be assumed; None: there is none.
        target: the loss that decides model and tokens; None: they were given.
        exchange: how islands exchange, where the job is planned on islands.
    """

    job: JobSpec
    tokens: Value
    batch_tokens: int | None = None
    space: Space = Space()
    widest: Space = Space()
    restricted: tuple[str, ...] = ()
    failures: FailureOptions = FailureOptions()
    estimators: Estimators = Estimators()
    measured: MeasuredRun | None = None
    target: TargetLoss | None = None
    exchange: ExchangeTerms | None = None


@dataclass(frozen=True)
class Remedy:
    """Changes with which a model would fit.

    Attributes:
        needs: what it takes at least as it was asked for.
        layout: that fits on this fleet when what the user fixed is let go; None where none does.
        chips: of the smallest fleet of these chips that fits; None where not even a million do.
    """

    needs: str
    layout: Candidate | None
    chips: int | None


@dataclass(frozen=True)
class FleetPlan:
    """The plan of a job on one fleet.

    Attributes:
        fleet: the chips.
        request: what was planned.
        result: of the search.
        figures: by short name, as `explain=` takes it; empty where the model does not fit.
        goodput: what failures make of the time; None where the model does not fit.
        remedy: where it does not fit.
        notes: what was rounded, assumed or is idle.
    """

    fleet: Fleet
    request: Request
    result: SearchResult
    figures: dict[str, Value] = field(default_factory=dict)
    goodput: Goodput | None = None
    remedy: Remedy | None = None
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Candidate | None:
        """The first of the ranked layouts; None where none fits."""
        return self.result.best


def plan_fleet(request: Request, fleet: Fleet, catalogue: Catalogue) -> FleetPlan:
    """Plan a job on one fleet.

    Args:
        request: what is to be planned.
        fleet: the chips.
        catalogue: of chips.

    Raises:
        ConfigError: no fleet of its chips stays within the budget.
    """
    if fleet.entry.budget_usd is not None:
        return _within_budget(request, fleet, catalogue)
    plan = _plan(request, fleet, catalogue)
    return plan if plan.figures else replace(plan, remedy=find_remedy(request, fleet, catalogue, plan.result))


def batch_for(request: Request, fleet: Fleet) -> Batch:
    """Return the batch of a step: the user's, or one that suits the fleet.

    Args:
        request: what is to be planned.
        fleet: the chips.
    """
    if request.batch_tokens is not None:
        return Batch(request.batch_tokens)
    tokens = min(BATCH_MOST, max(BATCH_LEAST, BATCH_PER_CHIP * fleet.cluster.chips))
    return Batch(max(tokens, request.job.seq_len), free=True)


def search_fleet(request: Request, fleet: Fleet, leaders: int = LEADERS) -> SearchResult:
    """Search the layouts of the job on the fleet; `leaders` as for `search`.

    Args:
        request: what is to be planned.
        fleet: the chips.
        leaders: frames that are filled to the end.
    """
    batch, space, domains = batch_for(request, fleet), request.space, fleet.domains
    if space.schedules and fleet.cluster.chip.vendor in COMPILED:
        space = replace(space, pipeline=space.pipeline or 1, context_kinds=("gather",))
    return search(request.job, fleet.cluster, batch, space, request.estimators, domains, leaders=leaders)


def ladder(fleet: Fleet, most: int = MOST_CHIPS) -> list[int]:
    """List the numbers of chips that can be had, about eight to each doubling, up to `most`.

    Args:
        fleet: the chips.
        most: the largest number.
    """
    chip = fleet.cluster.chip
    if is_tpu(chip):
        shapes = sorted(legal_shapes(chip.key, chip.topology.domain_chips or 0))
        sizes = [size for size in shapes if size & (size - 1) == 0]
        largest = shapes[-1]
        counts = _mantissas(most // largest)
        return sorted({*sizes, *(largest * count for count in counts)})
    host = chip.topology.chips_per_host or 1
    return sorted({*(2**power for power in range(host.bit_length()) if 2**power < host)}) + [
        host * count for count in _mantissas(most // host)
    ]


def _mantissas(most: int) -> list[int]:
    """1 to 8, then eight steps to each doubling."""
    numbers = {mantissa * 2**power for power in range(21) for mantissa in range(8, 16)} | set(range(1, 8))
    return sorted(number for number in numbers if number <= most)


def _plan(request: Request, fleet: Fleet, catalogue: Catalogue) -> FleetPlan:
    result = search_fleet(request, fleet)
    if result.best is None:
        return FleetPlan(fleet, request, result, notes=fleet.notes)
    best = result.best
    notes = list(fleet.notes)
    idle = fleet.cluster.chips - best.plan.devices // fleet.cluster.chip.logical_devices_per_chip
    if idle:
        notes.append(f"{idle:,} chips are idle: the layout takes {fleet.cluster.chips - idle:,}; they serve as spares")
    if best.memory.fits is None:
        notes.append(f"the memory of {fleet.cluster.chip.key} is unknown: whether the layout fits is not")
    if best.time.unknown:
        notes.append(f"unknown, so that times are lower bounds: {', '.join(dict.fromkeys(best.time.unknown))}")
    step, failures, measured = None, request.failures, request.measured
    if measured is not None:
        fleet, step = measured.powered(fleet), measured.step_of(fleet, best)
        failures = measured.failures_of(fleet, best, failures)
        notes += measured.notes_on(fleet, best)
    speed = speed_figures(fleet, best, request.tokens, catalogue, step)
    kept = goodput_of(fleet, best, speed["step"], failures)
    figures = {**speed, **run_figures(fleet, speed["ideal_days"], kept, request.tokens)}
    return FleetPlan(fleet, request, result, figures, kept, notes=tuple(notes))


def find_remedy(request: Request, fleet: Fleet, catalogue: Catalogue, result: SearchResult) -> Remedy:
    """Find what would make the job fit: other choices on this fleet, or more of its chips.

    Args:
        request: what is to be planned.
        fleet: the chips.
        catalogue: of chips.
        result: of the search.
    """
    free = replace(request, space=request.widest)
    layout = search_fleet(free, fleet).best if request.restricted else None
    chips = smallest_fleet(free, fleet, catalogue)
    return Remedy(_needs(request, fleet, result), layout, chips)


def smallest_fleet(request: Request, fleet: Fleet, catalogue: Catalogue) -> int | None:
    """Return the chips of the smallest fleet of that kind on which some layout fits; None where no million does.

    Args:
        request: what is to be planned.
        fleet: the chips.
        catalogue: of chips.
    """
    frugal = replace(request, space=replace(request.widest, remats=("full",), micro_batch=1))
    sizes = ladder(fleet)

    def fits(index: int) -> bool:
        return search_fleet(frugal, resolve_fleet(sized(fleet, sizes[index]), catalogue)).best is not None

    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return sizes[low] if low < len(sizes) else None


def _needs(request: Request, fleet: Fleet, result: SearchResult) -> str:
    nearest = result.nearest
    if nearest is None:
        constants, capacity = calibration(fleet.cluster.chip, request.job.stack), device_capacity(fleet.cluster)
        moments = constants.optimizer_bytes * least_moments(request.job) / 2
        state = (constants.weight_bytes + moments) * parameters(request.job.model)
        if capacity is not None and state > fleet.cluster.devices * capacity:
            together = fleet.cluster.devices * capacity / 2**30
            return (
                f"weights and optimizer state take {state / 2**30:,.0f} GiB, its devices hold {together:,.0f} together"
            )
        return "no layout is legal: degrees must divide the model's heads and widths, the batch and the devices"
    plan, memory = nearest
    assert memory.capacity is not None, "a layout that does not fit has a capacity"
    needed, held = memory.total / 2**30, (1 - request.space.reserve) * memory.capacity / 2**30
    return f"the most frugal layout needs {needed:,.1f} GiB per device of {held:,.1f}: {layout_text(plan)}"


def _within_budget(request: Request, fleet: Fleet, catalogue: Catalogue) -> FleetPlan:
    """Plan the largest fleet whose run costs no more than the budget; more chips cost more, since they work less well.

    A run that would be over within the hour is not counted: chips are rented, started and filled for longer than that.
    """
    budget = fleet.entry.budget_usd or 0.0
    if not fleet.price.known:
        raise ConfigError(
            f"the price of {fleet.cluster.chip.key} is not published, so a budget does not say how many there are",
            got=f"${budget:,.0f}",
            fix="give price_usd_per_chip_hour=..., or a number of chips",
        )
    sizes = ladder(fleet)
    low, high, best, cheapest = 0, len(sizes), None, None
    while low < high:
        middle = (low + high) // 2
        tried = _plan(request, resolve_fleet(fleet.entry, catalogue, sizes[middle]), catalogue)
        cost = tried.figures["cost"].value if tried.figures else None
        days = tried.figures["days"].value if tried.figures else None
        too_short = days is not None and days * 24 < _SHORTEST_RUN_HOURS and middle > 0
        if (cost is None or cost <= budget) and not too_short:
            best, low = (tried if cost is not None else best), middle + 1
        else:
            cheapest, high = tried, middle
    if best is None:
        got = f"${budget:,.0f}"
        least = f"the smallest fleet that fits costs {cheapest.figures['cost']}" if cheapest else "no fleet fits"
        raise ConfigError(f"no fleet of {fleet.cluster.chip.key} does the run for that much", got=got, fix=least)
    return best


def sized(fleet: Fleet, chips: int) -> FleetEntry:
    """Return the entry that asks for so many of the fleet's chips.

    Args:
        fleet: the chips.
        chips: number of chips.
    """
    return replace(fleet.entry, chips=chips, shape=None, megawatts=None, budget_usd=None)


def rank(plans: Sequence[FleetPlan], objective: str) -> list[FleetPlan]:
    """Sort the plans, the best first; those without the figure, or that do not fit, last.

    Args:
        plans: one for each fleet.
        objective: the figure that ranks them.
    """
    key = {"time": "days", "cost": "cost", "energy": "energy"}[objective]

    def order(plan: FleetPlan) -> tuple[bool, bool, float]:
        value = plan.figures[key].value if plan.figures else None
        return (not plan.figures, value is None, value if value is not None else 0.0)

    return sorted(plans, key=order)


def pareto(plans: Sequence[FleetPlan]) -> list[FleetPlan]:
    """Return the plans that no other beats in both days and cost; those with an unknown cost are left out.

    Args:
        plans: one for each fleet.
    """
    points = [(plan, plan.figures["days"].value, plan.figures["cost"].value) for plan in plans if plan.figures]
    known = [(plan, days, cost) for plan, days, cost in points if days is not None and cost is not None]
    return [
        plan
        for plan, days, cost in known
        if not any(d <= days and c <= cost and (d, c) != (days, cost) for _, d, c in known)
    ]
