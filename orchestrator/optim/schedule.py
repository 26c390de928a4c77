"""The learning rate, which is a function of the step and needs no state. No torch of its own."""

from __future__ import annotations

import math
from collections.abc import Callable

from orchestrator.config.registry import OwnPart, trace
from orchestrator.config.schema import RunConfig, ScheduleConfig
from orchestrator.errors import PartError


def schedule_of(config: RunConfig) -> Callable[[int, float], float]:
    """Return the configuration's schedule: from completed steps and the peak to the next step's learning rate.

    Args:
        config: of the run.

    Raises:
        ConfigError: an own schedule that cannot be found or made.
    """
    schedule, max_steps = config.optim.schedule, config.train.max_steps
    if schedule._target_ is None:
        return lambda step, lr: learning_rate(step, max_steps, lr, schedule)
    own = OwnPart("schedule", schedule._target_, "optim.schedule", schedule.arguments).make(expected=Callable)  # type: ignore[arg-type]

    def rate(step: int, lr: float) -> float:
        try:
            value = float(own(step, max_steps, lr))
        except Exception as error:
            raise PartError(f"the schedule {schedule._target_} failed", got=trace(error, __file__)) from error
        if not (math.isfinite(value) and value >= 0):
            got = f"{value} for step {step} of {max_steps}"
            raise PartError(f"the schedule {schedule._target_} gives no learning rate", got=got, allowed="0 or more")
        return value

    return rate


def learning_rate(step: int, max_steps: int, lr: float, schedule: ScheduleConfig) -> float:
    """Return the learning rate of the step that follows `step` completed ones.

    Linear warm-up to `lr`, then by the kind of `schedule`, down to `min_lr_ratio * lr` at `max_steps`.
    """
    if step < schedule.warmup_steps:
        return lr * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return lr
    start = schedule.warmup_steps
    if schedule.kind == "wsd":
        start = max(start, round(max_steps * (1 - schedule.decay_fraction)))
    progress = min(1.0, max(0.0, (step - start) / max(1, max_steps - start)))
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1 - progress
    return lr * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * fall)
