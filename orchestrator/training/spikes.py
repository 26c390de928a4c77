"""Find loss spikes: steps in a row whose loss or gradient norm is far above what the steps before had."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.config.schema import SpikeConfig

FIGURES = ("loss", "grad_norm")
_TO_SIGMA = 1.4826  # of a normal distribution: from the median absolute deviation to the standard deviation
_LEAST_SHARE = 0.01  # of the median: a curve without noise has no deviation to speak of
_REMEMBERED = 4096  # steps, for a run that is taken back


@dataclass(frozen=True)
class Spike:
    """A spike, as far as it has been seen.

    Attributes:
        step: that showed it.
        onset: its first step.
        figure: `loss` or `grad_norm`.
        value: the least of its steps.
        median: of the steps before it.
        deviations: how far `value` is above the median, in robust standard deviations.
    """

    step: int
    onset: int
    figure: str
    value: float
    median: float
    deviations: float

    def __str__(self) -> str:
        name = {"loss": "loss", "grad_norm": "gradient norm"}[self.figure]
        return (
            f"{name} of {self.value:.4g} or more in steps {self.onset} to {self.step}, {self.deviations:.0f} "
            f"deviations above the median {self.median:.4g} of the steps before"
        )


class SpikeDetector:
    """Judges steps by the ones before them. Processes that see the same numbers find the same spikes.

    A step is high where its figure is more than `deviations` robust standard deviations (1.4826 times the median
    absolute deviation, but at least a hundredth of the median) above the median of the `window` steps before. As many
    high steps in a row as `steps` says, of one figure, are a spike. The steps in a row are held against those before
    the first of them; once they were called a spike, against the last ones, so that a new level becomes the usual one.

    Args:
        settings: `train.spike`.
        after: the last step that is not looked at, such as the end of the warm-up.
    """

    def __init__(self, settings: SpikeConfig, after: int = 0):
        self._settings, self._after = settings, after
        self._seen: list[tuple[int, dict[str, float]]] = []
        self._high = dict.fromkeys(FIGURES, 0)
        self._called = dict.fromkeys(FIGURES, False)

    @property
    def trusted_step(self) -> int:
        """The last step whose weights no spike can have begun with, by what was seen."""
        last = self._seen[-1][0] if self._seen else self._after
        # A step's loss shows what the update of the step before has made.
        return last - 1 - max(self._high.values())

    def see(self, step: int, values: Mapping[str, float | None]) -> Spike | None:
        """Take in a step. Returns a spike where this step completes one.

        Args:
            step: number of the step, by rising number.
            values: `loss` and `grad_norm`; one that is None or not finite is no step of a spike's.
        """
        if step <= self._after:
            return None
        found = [spike for figure in FIGURES if (spike := self._judge(step, figure, values.get(figure)))]
        kept = {figure: float(value) for figure in FIGURES if (value := values.get(figure)) is not None}
        self._seen.append((step, kept))
        del self._seen[:-_REMEMBERED]
        return found[0] if found else None

    def _judge(self, step: int, figure: str, value: float | None) -> Spike | None:
        high, settings = self._high[figure], self._settings
        before = self._values(figure, 0 if self._called[figure] else high)
        if value is None or not math.isfinite(value) or len(before) < settings.window // 2:
            return None
        median = statistics.median(before)
        spread = _TO_SIGMA * statistics.median(abs(one - median) for one in before)
        spread = max(spread, _LEAST_SHARE * abs(median), 1e-12)
        if value <= median + settings.deviations * spread:
            self._high[figure], self._called[figure] = 0, False
            return None
        self._high[figure] = high + 1
        if self._called[figure] or high + 1 < settings.steps:
            return None
        self._called[figure] = True
        least = min([value, *(self._values(figure, 0)[-high:] if high else ())])
        return Spike(step, step - high, figure, least, median, (least - median) / spread)

    def _values(self, figure: str, leave: int) -> list[float]:
        """Return the figure of the window before the last `leave` steps."""
        seen = self._seen[: len(self._seen) - leave][-self._settings.window :]
        return [values[figure] for _, values in seen if figure in values and math.isfinite(values[figure])]

    def forget_after(self, step: int) -> None:
        """Forget later steps: they were undone.

        Args:
            step: optimizer steps completed.
        """
        self._seen = [one for one in self._seen if one[0] <= step]
        self._high = dict.fromkeys(FIGURES, 0)
        self._called = dict.fromkeys(FIGURES, False)

    def state(self) -> list[list[Any]]:
        """Return what the next steps are judged by, for JSON: step, loss and gradient norm of the last window."""
        last = self._seen[-self._settings.window - max(self._high.values()) :]
        return [[step, *(_finite(values.get(figure)) for figure in FIGURES)] for step, values in last]

    def restore(self, state: Iterable[Sequence[Any]]) -> None:
        """Go on where `state` was taken.

        Args:
            state: as `state` returned it; an entry that is none such is left out.
        """
        for entry in state if isinstance(state, list) else ():
            if isinstance(entry, list) and len(entry) == 1 + len(FIGURES) and isinstance(entry[0], int):
                numbers = [one if isinstance(one, float) else None for one in entry[1:]]
                self.see(entry[0], dict(zip(FIGURES, numbers, strict=True)))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
