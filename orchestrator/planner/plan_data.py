"""Plans as plain data, for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from orchestrator.planner.estimate.work import parameters
from orchestrator.planner.evidence.calibration import calibration
from orchestrator.planner.explain import bound, layout_text, loses, parts
from orchestrator.planner.job_plan import FleetPlan, Request, pareto
from orchestrator.planner.portfolio import Portfolio
from orchestrator.planner.search import Candidate


def as_data(request: Request, plans: Sequence[FleetPlan], objective: str, explain: str | None = None) -> dict[str, Any]:
    """Return all plans, in their order, as plain data; with the derivation of the figure `explain`, or of `all`.

    Args:
        request: what is to be planned.
        plans: one for each fleet.
        objective: the figure that ranks them.
        explain: name of a figure, or `all`; None: no derivations.
    """
    best = pareto(plans)
    return {
        "model": {**asdict(request.job.model), "parameters": parameters(request.job.model)},
        "seq_len": request.job.seq_len,
        "precision": request.job.precision,
        "tokens": request.tokens.as_dict(),
        **({} if request.target is None else {"target": request.target.as_data()}),
        "objective": objective,
        "fleets": [
            {
                **fleet_data(plan),
                "pareto": any(plan is other for other in best),
                **({"derivations": _derivations(plan, explain)} if explain else {}),
            }
            for plan in plans
        ],
    }


def fleet_data(plan: FleetPlan) -> dict[str, Any]:
    """Return one fleet's answer: its figures, or what would make the model fit.

    Args:
        plan: of one fleet.
    """
    fleet, best = plan.fleet, plan.best
    data: dict[str, Any] = {
        "fleet": fleet.label,
        "chip": fleet.cluster.chip.key,
        "chips": fleet.cluster.chips,
        "devices": fleet.cluster.devices,
        "slices": None if fleet.slices is None else {"count": fleet.slices.count, "shape": list(fleet.slices.shape)},
        "fits": bool(plan.figures),
        "notes": list(plan.notes),
        "layouts_searched": plan.result.layouts,
        "stack": calibration(fleet.cluster.chip, plan.request.job.stack).stack,
    }
    if best is None:
        remedy = plan.remedy
        assert remedy is not None, "a plan without a layout says what would help"
        layout = None if remedy.layout is None else layout_text(remedy.layout.plan)
        return {**data, "because": remedy.needs, "fits_with": layout, "smallest_fleet_chips": remedy.chips}
    data["figures"] = {name: value.as_dict() for name, value in plan.figures.items()}
    data["bound_by"] = bound(best, fleet.cluster)
    data["best"] = _candidate(best)
    data["runners_up"] = [{**_candidate(other), "why": loses(other, best)} for other in plan.result.ranked[1:]]
    if plan.goodput is not None:
        kept = plan.goodput
        data["recovery"] = kept.recovery
        data["goodput_by_recovery"] = {
            "restart": kept.restart.value,
            "replace": None if kept.replace is None else kept.replace.value,
        }
        data["interval_seconds"] = {"young": kept.young.value, "chosen": kept.interval.value}
    return data


def portfolio_data(portfolio: Portfolio, objective: str) -> dict[str, Any]:
    """Return an assignment of jobs to fleets, as plain data.

    Args:
        portfolio: the assignment.
        objective: the figure that ranks them.
    """
    return {
        "objective": objective,
        "exact": portfolio.exact,
        "days": portfolio.days.as_dict(),
        "cost": portfolio.cost.as_dict(),
        "energy": portfolio.energy.as_dict(),
        "jobs": {job: fleet_data(plan) for job, plan in portfolio.placed.items()},
        "impossible": list(portfolio.impossible),
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "layout": layout_text(candidate.plan),
        "plan": asdict(candidate.plan),
        "global_batch_tokens": candidate.job.global_batch_tokens,
        "step_seconds": candidate.time.step,
        "step_parts": parts(candidate.time),
        "step_unknown": list(candidate.time.unknown),
        "tokens_per_second": candidate.tokens_per_second,
        "memory_bytes": {**asdict(candidate.memory), "total": candidate.memory.total},
    }


def _derivations(plan: FleetPlan, name: str) -> dict[str, list[str]]:
    chosen = plan.figures if name == "all" else {name: plan.figures[name]} if plan.figures else {}
    return {key: value.explain().splitlines() for key, value in chosen.items()}
