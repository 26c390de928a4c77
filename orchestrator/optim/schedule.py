"""The learning rate, which is a function of the step and needs no state. No torch of its own."""

from __future__ import annotations

import math
from collections.abc import Callable

from orchestrator.config.batch_sizes import BatchSizes
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
        warmup = warmup_steps(config)
        return lambda step, lr: learning_rate(step, max_steps, lr, schedule, warmup)
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


def warmup_steps(config: RunConfig) -> int:
    """Return the number of steps of the warm-up, however it is given.

    Args:
        config: of the run.
    """
    schedule = config.optim.schedule
    if schedule.warmup_fraction is not None:
        return round(schedule.warmup_fraction * config.train.max_steps)
    if schedule.warmup_tokens is not None:
        return BatchSizes.of(config.train).steps_of(schedule.warmup_tokens)
    return schedule.warmup_steps


def learning_rate(step: int, max_steps: int, lr: float, schedule: ScheduleConfig, warmup: int | None = None) -> float:
    """Return the learning rate of the step that follows `step` completed ones.

    Linear warm-up to `lr`, then by the kind of `schedule`, down to `min_lr_ratio * lr` where it ends.

    Args:
        step: completed steps.
        max_steps: of the run, where the schedule ends unless it says so itself.
        lr: the peak.
        schedule: its shape.
        warmup: steps of the warm-up; None: `warmup_steps` of `schedule`.
    """
    warmup = schedule.warmup_steps if warmup is None else warmup
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule.kind == "constant":
        return lr
    end, start, shape = schedule.horizon_steps or max_steps, warmup, str(schedule.kind)
    if schedule.kind == "wsd":
        steps = end * schedule.decay_fraction if schedule.decay_steps is None else schedule.decay_steps
        start, shape = max(start, round(end - steps)), schedule.decay_shape
    progress = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    if shape == "exponential":
        return float(lr * schedule.min_lr_ratio**progress)
    left = _LEFT[shape](progress)
    return lr * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * left)


_LEFT: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    # Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", arXiv 2405.18392.
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
}
"""What is left between the peak and the least rate, by how much of the decay is done."""
