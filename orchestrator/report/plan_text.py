"""A plan on the terminal: what fits, how long, how much, and why."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace

from orchestrator.planner.evidence.calibration import calibration
from orchestrator.planner.explain import AXES, PARTS, bound, layout_text, loses, parts
from orchestrator.planner.island_plan import IslandsPlan
from orchestrator.planner.job_plan import FleetPlan, pareto
from orchestrator.planner.planned_models import planned_models
from orchestrator.planner.portfolio import Portfolio
from orchestrator.planner.search import Candidate
from orchestrator.planner.spec import COMPUTE_OPTIMAL, MemoryEstimate, ModelShape
from orchestrator.report.island_plan_text import islands_text
from orchestrator.report.run_text import aligned

MEMORY_PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "communication", "overhead")
_BAR, _WIDTH = 44, 118
_GIB = 2**30
_BLOCKS, _PLAIN = "█▓▒░▚▞▤", "#%*+=~:"
_LETTERS = {"≥": ">=", "≤": "<=", "×": "x"}


def train_words(best: Candidate) -> str:
    """Return the overrides with which `train` runs a layout, or what of it this version of `train` does not have.

    Args:
        best: the layout.
    """
    plan, job = best.plan, best.job
    lacks = [
        name
        for name, missing in (
            (f"zero-{plan.zero}", plan.zero != 3 and plan.shards > 1),
            ("activations kept in host memory", plan.remat == "offload"),
            ("models that only the planner knows", job.model.name in planned_models()),
        )
        if missing
    ]
    if lacks:
        return f"not yet: train has no {', no '.join(lacks)}; axes=train plans what it can run"
    degrees = " ".join(f"layout.{axis}={getattr(plan, axis)}" for axis in reversed(AXES))
    degrees += f" layout.schedule={plan.schedule}" if plan.pipeline > 1 else ""
    degrees += f" layout.context_kind={plan.context_kind}" if plan.context > 1 else ""
    return (
        f"{_model_words(job.model)} {degrees} train.seq_len={job.seq_len} "
        f"train.global_batch_tokens={job.global_batch_tokens} "
        f"train.micro_batch_size={plan.micro_batch} train.remat={plan.remat}"
    )


def _model_words(shape: ModelShape) -> str:
    if shape.name != COMPUTE_OPTIMAL:
        return f"model={shape.name}"
    # The law has chosen the sizes; all else is Llama 3's.
    keys = ("layers", "dim", "mlp_dim", "heads", "kv_heads")
    return " ".join(
        ["model=llama3_8b", *(f"model.{key}={getattr(shape, key)}" for key in keys), f"model.vocab_size={shape.vocab}"]
    )


class PlanText:
    """Writes plans as text. `plain`: without characters beyond ASCII."""

    def __init__(self, plain: bool = False):
        self._plain = plain

    def write(self, plans: Sequence[FleetPlan], objective: str) -> str:
        """Return all plans: a table where there are several, then each fleet by itself.

        Args:
            plans: one for each fleet.
            objective: the figure that ranks the plans.
        """
        blocks = [self.table(plans, objective)] if len(plans) > 1 else []
        blocks += [self.fleet(plan) for plan in plans]
        return self._clean("\n\n".join(blocks))

    def islands(self, plan: IslandsPlan) -> str:
        """Return the plan of a run on islands.

        Args:
            plan: of the islands.
        """
        return self._clean(islands_text(plan))

    def table(self, plans: Sequence[FleetPlan], objective: str) -> str:
        """Return the fleets beside each other, in order; those that none beats in time and cost are marked.

        Args:
            plans: one for each fleet.
            objective: the figure that ranks the plans.
        """
        best = pareto(plans)
        rows: list[Sequence[str]] = [
            ("", "fleet", "step", "tokens/s/chip", "MFU", "goodput", "days", "cost", "$/T tokens", "energy", "power")
        ]
        for plan in plans:
            if not plan.figures:
                rows.append(("", plan.fleet.label, "does not fit", *([""] * 8)))
                continue
            keys = ("step", "per_chip", "mfu", "goodput", "days", "cost", "cost_per_trillion", "energy", "power")
            cells = [str(plan.figures[key]).removesuffix(" tokens/s") for key in keys]
            rows.append(("*" if any(plan is other for other in best) else "", plan.fleet.label, *cells))
        note = f"by {objective}; * no other fleet is both faster and cheaper; ~ built on an estimate; ≥ at least"
        return f"{aligned(rows)}\n{note}"

    def fleet(self, plan: FleetPlan) -> str:
        """Return one fleet: layout, memory, time, failures, money.

        Args:
            plan: of one fleet.
        """
        lines = [plan.fleet.label]
        lines += _pairs(self._answer(plan) if plan.figures else _refusal(plan))
        lines += _pairs([("note", note) for note in plan.notes])
        return "\n".join(lines)

    def portfolio(self, portfolio: Portfolio, objective: str) -> str:
        """Return which job runs on which fleet.

        Args:
            portfolio: the assignment.
            objective: the figure that ranks the plans.
        """
        rows = [("job", "fleet", "days", "cost", "energy", "layout")]
        for job, plan in portfolio.placed.items():
            best, figures = plan.best, plan.figures
            assert best is not None, "a placed job has a layout"
            cells = (str(figures["days"]), str(figures["cost"]), str(figures["energy"]), layout_text(best.plan))
            rows.append((job, plan.fleet.label, *cells))
        rows.append(("all", "", str(portfolio.days), str(portfolio.cost), str(portfolio.energy), ""))
        how = "all assignments compared" if portfolio.exact else "longest first, then improved: need not be the best"
        lines = [aligned(rows), f"by {objective}; jobs of a fleet run one after the other; {how}"]
        lines += [f"{job} fits none of the fleets" for job in portfolio.impossible]
        return self._clean("\n".join(lines))

    def _answer(self, plan: FleetPlan) -> list[tuple[str, str]]:
        best, figures, kept = plan.best, plan.figures, plan.goodput
        assert best is not None, "a plan with figures has a layout"
        assert kept is not None, "and failures"
        batch, passes = best.job.global_batch_tokens, best.plan.micro_batches(best.job)
        sequences = batch // best.job.seq_len
        shares = f"{passes} passes" if passes > 1 else "one pass"
        rate = f"at {plan.fleet.price} and chip"
        rows = [
            ("layout", layout_text(best.plan)),
            ("batch", f"{batch:,} tokens, {sequences:,} sequence{'s' * (sequences > 1)}, {shares}"),
            ("step", f"{figures['step']}, {figures['per_chip']} and chip, MFU {figures['mfu']}"),
            ("time", self._time_bar(plan)),
            ("", self._time_words(plan)),
            ("bound by", bound(best, plan.fleet.cluster)),
            ("memory", self._memory_bar(best.memory)),
            ("", _memory_words(best.memory) + _why_remat(plan)),
            ("run", f"{figures['days']} ({figures['ideal_days']} without failures), goodput {figures['goodput']}"),
        ]
        other = f"; with replacement of groups {kept.replace}" if kept.recovery == "restart" and kept.replace else ""
        how = "restart from the last save" if kept.recovery == "restart" else "groups replaced while the others go on"
        if kept.recovery == "replace":
            other = f"; with restarts {kept.restart}"
        rows += [
            ("failures", f"one every {kept.mtbf}, {figures['interruptions']} over the run; {how}{other}"),
            ("saves", f"every {kept.interval} (Young {kept.young}), each stops the step for {kept.stall}"),
            ("spares", f"{kept.spares} chips advised"),
            ("cost", f"{figures['cost']}, {figures['cost_per_trillion']} per trillion tokens, {rate}"),
            ("energy", f"{figures['energy']}; power of the facility {figures['power']}"),
            ("searched", f"{plan.result.layouts:,} layouts; software: {stack_of(plan)}"),
            ("train", train_words(best)),
        ]
        rows += [
            ("runner-up" if index == 0 else "", f"{layout_text(other.plan)}: {loses(other, best)}")
            for index, other in enumerate(plan.result.ranked[1:4])
        ]
        return rows

    def _memory_bar(self, memory: MemoryEstimate) -> str:
        sizes = [float(getattr(memory, name)) for name in MEMORY_PARTS]
        capacity = memory.capacity
        bar = self._bar(sizes, max(capacity or 0.0, memory.total))
        of = f"of {capacity / _GIB:,.1f} GiB per device" if capacity else "per device, of an unknown capacity"
        return f"{bar} {memory.total / _GIB:,.1f} {of}"

    def _time_bar(self, plan: FleetPlan) -> str:
        shares = _shares(plan)
        return self._bar([share for _, share in shares], 1.0)

    def _time_words(self, plan: FleetPlan) -> str:
        said = zip(self._marks(), _shares(plan), strict=False)
        return "  ".join(f"{mark} {PARTS[name]} {share:.0%}" for mark, (name, share) in said if share >= 0.005)

    def _bar(self, sizes: Sequence[float], whole: float) -> str:
        cells, filled, text = 0.0, 0, ""
        for mark, size in zip(self._marks(), sizes, strict=False):
            cells += size / whole * _BAR
            width = max(0, min(_BAR, round(cells)) - filled)
            text, filled = text + mark * width, filled + width
        return f"[{text:<{_BAR}}]"

    def _marks(self) -> str:
        return _PLAIN if self._plain else _BLOCKS

    def _clean(self, text: str) -> str:
        if self._plain:
            for mark, letters in _LETTERS.items():
                text = text.replace(mark, letters)
        return text


def _shares(plan: FleetPlan) -> list[tuple[str, float]]:
    """Return the largest parts of the step, as shares of it."""
    assert plan.best is not None, "a plan with figures has a layout"
    time = plan.best.time
    shares = sorted(((name, seconds / time.step) for name, seconds in parts(time).items()), key=lambda item: -item[1])
    return shares[: len(_BLOCKS)]


def _memory_words(memory: MemoryEstimate) -> str:
    sizes = [(name, getattr(memory, name) / _GIB) for name in MEMORY_PARTS]
    return ", ".join(f"{name} {size:,.1f}" for name, size in sizes if size >= 0.05)


def _why_remat(plan: FleetPlan) -> str:
    """Return what the layout would need if nothing were computed again, where that is why something is."""
    best, request = plan.best, plan.request
    assert best is not None, "a plan with figures has a layout"
    if best.plan.remat == "none" or best.memory.capacity is None:
        return ""
    chip = plan.fleet.cluster.chip
    working = replace(plan.fleet.cluster, chips=best.plan.devices // chip.logical_devices_per_chip)
    needed = request.estimators.memory(best.job, working, replace(best.plan, remat="none")).total
    return f"; with remat none it would be {needed / _GIB:,.1f}" if needed > best.memory.capacity else ""


def stack_of(plan: FleetPlan) -> str:
    """Return the software stack whose calibration the times have.

    Args:
        plan: of one fleet.
    """
    return calibration(plan.fleet.cluster.chip, plan.request.job.stack).stack


def _refusal(plan: FleetPlan) -> list[tuple[str, str]]:
    remedy, fleet = plan.remedy, plan.fleet
    assert remedy is not None, "a plan without figures says what would help"
    rows = [("verdict", "does not fit"), ("because", remedy.needs)]
    if plan.request.restricted:
        rows.append(("as asked", ", ".join(plan.request.restricted)))
    if remedy.layout is not None:
        rows.append(("do", f"let go of that: it fits with {layout_text(remedy.layout.plan)}"))
    if remedy.chips is not None and remedy.chips > fleet.cluster.chips:
        rows.append(("do", f"take {remedy.chips:,} or more {fleet.cluster.chip.key}: the smallest fleet that fits"))
    elif remedy.chips is None:
        rows.append(("do", "another chip or a smaller model: not even a million of these hold it"))
    return rows


def _pairs(rows: Sequence[tuple[str, str]]) -> list[str]:
    lines = []
    for name, text in rows:
        head = f"  {name:<10} "
        lines += textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head)) or [head]
    return lines
