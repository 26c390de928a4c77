"""Keep a step whose numbers are not finite from the weights, and stop the run or count the step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as lightning
import torch
from torch import Tensor

from orchestrator.config.schema import TrainConfig
from orchestrator.strategies.parallel_strategy import ParallelStrategy, StepParts


class Diverged(Exception):
    """The run met a number that is not finite, or a spike to be undone. All ranks raise it at the same step.

    Args:
        step: whose loss, gradients or weights these are, from 1.
        values: what was met, by name: `loss`, `grad_norm`, `val_loss`.
        source: `step`: the update of `step` was left out, and the weights are those before it. `validation`: the
            held-out loss after it. `weights`: what was to be saved after it. `spike`: the loss or the gradient norm
            of the last steps.
        in_a_row: how many steps up to this one have left the weights as they were, or have to do with the spike.
        own: what of a bad step this rank had put in that was not finite, by name: `loss`, and names of parameters
            for their gradients.
        what: in words; empty: what `describe` says of the values.

    Attributes:
        before: the last step whose weights are none of those that led here.
    """

    def __init__(
        self,
        step: int,
        values: Mapping[str, float],
        source: Literal["step", "validation", "weights", "spike"],
        in_a_row: int = 1,
        own: Sequence[str] = (),
        what: str = "",
    ):
        super().__init__(f"diverged at step {step}")
        self.step, self.values, self.source, self.in_a_row = step, dict(values), source, in_a_row
        self.before, self.own = step - in_a_row, tuple(own)
        self.what = what or describe(values) or "the model to be saved"


@dataclass(frozen=True)
class _Judged:
    step: int
    loss: Tensor
    grad_norm: Tensor
    is_bad: Callable[[], float]
    parts: StepParts | None


class FiniteGuard(lightning.Callback):
    """Keeps updates that are not finite from the weights, and stops the run or counts what was left out.

    The device decides about each update by itself (`ParallelStrategy.update_unless`); the host asks a step later, when
    the next one has been started, and so waits for nothing. A run that is to stop then still has the weights from
    before the bad step: no update after it is made either.

    Must be the first callback: what looks at the model or saves it must not see a step that was not asked about.

    Args:
        parallel: the strategy.
        config: the `train` group.

    Attributes:
        due: whether others look at the run after so many steps; then it is asked about at once.
        skipped: steps that were left out, in this leg.
    """

    def __init__(self, parallel: ParallelStrategy, config: TrainConfig):
        self._parallel, self._limit = parallel, config.max_skips
        self._stops = config.on_nonfinite != "skip"
        self.skipped = 0
        self.reset()
        self.due: Callable[[int], bool] = lambda step: True
        self.say: Callable[[str], None] = lambda text: None

    def reset(self) -> None:
        """Forget the steps so far: what follows is computed from other weights."""
        # Sent from the host: as an operation it would be a constant of the first step's graph alone.
        self._bad = torch.tensor(False).to(self._parallel.root_device)
        self._waiting: deque[_Judged] = deque()
        self._in_a_row = 0

    def judge(self, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Return whether the update of `step` must be left out, as a bool scalar on the device.

        Args:
            step: the optimizer step, from 1.
            loss: of the global batch, as `ParallelStrategy.reduce_and_clip` returns it.
            grad_norm: of the global gradients, likewise.
        """
        bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        if self._stops:
            bad = self._bad = bad | self._bad
        self._waiting.append(_Judged(step, loss, grad_norm, self._parallel.fetch_later(bad), self._parallel.step_parts))
        return bad

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        """Read the verdict of the previous step, or of this one where others look at the run now."""
        self.settle(later=0 if self.due(pl_module.step) else 1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Read the verdicts that are left."""
        self.settle()

    def settle(self, later: int = 0) -> None:
        """Ask about all steps but the last `later` ones. All ranks call it at the same step.

        Raises:
            Diverged: one of them was not finite and the run is to stop then, or too many were in a row.
        """
        while len(self._waiting) > later:
            self._look_at(self._waiting.popleft())

    def _look_at(self, judged: _Judged) -> None:
        if not judged.is_bad():
            self._in_a_row = 0
            return
        loss, norm = self._parallel.fetch([judged.loss, judged.grad_norm])
        values = {"loss": loss, "grad_norm": norm}
        self._in_a_row += 1
        if self._stops or self._in_a_row > self._limit:
            self._waiting.clear()
            raise Diverged(judged.step, values, "step", self._in_a_row, nonfinite_parts(judged.parts))
        self.skipped += 1
        self.say(
            f"warning: step {judged.step} was left out: {describe(values)}; weights and optimizer are as before it "
            f"({self._in_a_row} in a row, train.max_skips={self._limit})"
        )


def nonfinite_parts(parts: StepParts | None) -> tuple[str, ...]:
    """Return what this rank has put into a step's sums that is not finite: `loss`, and parameters by their gradients.

    Args:
        parts: of the step; None: nothing is known.
    """
    if parts is None:
        return ()
    loss, norms = float(parts.loss), parts.norms()
    bad = tuple(name for name, norm in zip(parts.names, norms, strict=True) if not math.isfinite(norm))
    return bad if math.isfinite(loss) else ("loss", *bad)


def describe(values: Mapping[str, float]) -> str:
    """Describe those of the values that are not finite: `loss nan, gradient norm inf`.

    Args:
        values: by name.
    """
    names = {"grad_norm": "gradient norm", "val_loss": "validation loss"}
    return ", ".join(f"{names.get(name, name)} {value}" for name, value in values.items() if not math.isfinite(value))
