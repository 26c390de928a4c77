"""The learning rate, which is a function of the step and needs no state. No torch."""

from __future__ import annotations

import math

from orchestrator.config.schema import ScheduleConfig


def learning_rate(step: int, max_steps: int, lr: float, schedule: ScheduleConfig) -> float:
    """Learning rate of the step that follows `step` completed ones.

    Linear warm-up to `lr`, then by `schedule.kind`, down to `min_lr_ratio * lr` at `max_steps`.
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
