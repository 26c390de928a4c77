"""Plan a training for the loss that it is to reach: `plan target_loss=X fit=FILE`."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.api.ladders import read_fit
from orchestrator.chips.catalogue import Catalogue
from orchestrator.errors import ConfigError
from orchestrator.planner.estimate.work import parameters
from orchestrator.planner.job_plan import FleetPlan, Request, plan_fleet
from orchestrator.planner.quantity import given, write
from orchestrator.planner.target_loss import Extent, TargetLoss, shape_for

_FIGURES = ("days", "cost", "energy")


def aimed(request: Request, loss: float, fit: str, chooses: bool) -> Request:
    """Return the request with the tokens that reach a loss, and the model where that is the law's choice.

    Args:
        request: all else of the plan.
        loss: to be reached, nats per token.
        fit: file of the law.
        chooses: the model is the law's choice.

    Raises:
        ConfigError: the fit cannot be read, or the loss is never reached.
    """
    shape = request.job.model
    if shape.experts and not chooses:
        raise ConfigError(
            "the law is of models without experts",
            got=f"target_loss={loss:g} with the {shape.experts} experts of {shape.name}",
            fix="take a dense model, or give tokens=",
        )
    target = TargetLoss.of(loss, read_fit(fit), fit, None if chooses else parameters(shape))
    return _sized(request, target, target.extent)


def _sized(request: Request, target: TargetLoss, extent: Extent) -> Request:
    source = f"target_loss={target.loss:g} by {target.source}"
    tokens = given("tokens", extent.tokens, "tokens", source, estimated=True)
    model = shape_for(extent.parameters) if target.chosen else request.job.model
    job = replace(request.job, model=model, total_tokens=extent.tokens)
    return replace(request, job=job, tokens=tokens, target=target)


def with_interval(plan: FleetPlan, catalogue: Catalogue) -> FleetPlan:
    """Return a plan with a note of how long and dear it is at both ends of the fit's interval.

    Args:
        plan: of a request with a target.
        catalogue: of chips.
    """
    target = plan.request.target
    if target is None or not plan.figures or target.low is None:
        return plan
    ends = [
        None if end is None else plan_fleet(_sized(plan.request, target, end), plan.fleet, catalogue)
        for end in (target.low, target.high)
    ]
    said = []
    for name in _FIGURES:
        texts = []
        for end, extent in zip(ends, (target.low, target.high), strict=True):
            if extent is None:
                texts.append("never")
            elif end is None or not end.figures:
                texts.append("does not fit")
            else:
                value = end.figures[name]
                texts.append("unknown" if value.value is None else write(value.value, value.unit))
        said.append(f"{name} {texts[0]} to {texts[1]}")
    return replace(plan, notes=(*plan.notes, f"95% of the resampled fits: {', '.join(said)}"))
