"""Progress of a run: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

import lightning.pytorch as lightning
from tqdm import tqdm

from orchestrator.observe.metrics import Metrics
from orchestrator.output import is_printed, tell

T = TypeVar("T")
_LINE_SECONDS = 10.0
_BAR = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} steps{postfix}  {elapsed}, ETA {remaining}"
_FALLBACK_COLUMNS = 100


class Progress(lightning.Callback):
    """Loss, tokens per second and time left. Reads what `metrics` has flushed, so it costs the device nothing.

    Args:
        metrics: where the latest numbers are.
        step: steps completed.
        max_steps: steps of the run.
    """

    def __init__(self, metrics: Metrics, step: int, max_steps: int):
        self._metrics, self._max_steps = metrics, max_steps
        self._terminal = is_printed() and sys.stderr.isatty()
        self._next_line = 0.0
        self._first, self._started = step, time.monotonic()
        self._bar = (
            tqdm(total=max_steps, initial=step, mininterval=0.2, smoothing=0.05, bar_format=_BAR, **_width())
            if self._terminal
            else None
        )
        self._shown: dict[str, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self._started = time.monotonic()
        if self._bar is not None:
            self._bar.unpause()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        """Advance the bar by a step, or print a line every few seconds where there is none."""
        latest = self._metrics.latest
        if self._bar is not None:
            if latest and latest is not self._shown:
                self._bar.set_postfix_str(_numbers(latest), refresh=False)
                self._shown = latest
            self._bar.update(1)
        elif latest and latest is not self._shown and time.monotonic() >= self._next_line:
            self._shown, self._next_line = latest, time.monotonic() + _LINE_SECONDS
            left = _clock(self._remaining(pl_module.step))
            self.say(f"step {latest['step']}/{self._max_steps}  {_numbers(latest)}  ETA {left}")

    def rewind(self, step: int) -> None:
        """Show that the run was taken back.

        Args:
            step: optimizer steps completed.
        """
        self._first, self._shown = step, {}
        if self._bar is not None:
            self._bar.n = step
            self._bar.refresh()

    def _remaining(self, step: int) -> float:
        return (time.monotonic() - self._started) / max(1, step - self._first) * (self._max_steps - step)

    def watch(self, what: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the same items, and show how many of them have been taken: work that is no step.

        Args:
            what: is done, for the bar.
            items: what to go through.
        """
        total, pause = len(items) if isinstance(items, Sized) else "?", _LINE_SECONDS if self._bar is None else 0.2
        due = time.monotonic() + pause
        for number, item in enumerate(items, start=1):
            if time.monotonic() >= due:
                due = time.monotonic() + pause
                if self._bar is not None:
                    self._bar.set_postfix_str(f"{what} {number}/{total}")
                else:
                    self.say(f"{what} {number}/{total}")
            yield item
        self._shown = {}

    def say(self, text: str) -> None:
        """Print a line without tearing the bar.

        Args:
            text: the line.
        """
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            tell(text, stream="stdout")

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


def _width() -> dict[str, Any]:
    """Return the terminal's width, followed as it changes; where a terminal says 0 a bar would not show at all."""
    known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    return {"dynamic_ncols": True} if known else {"ncols": _FALLBACK_COLUMNS}


def _numbers(row: dict[str, Any]) -> str:
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
    text = f"loss {loss}  {row['tokens_per_second']:,.0f} tokens/s"
    return text + (f"  MFU {row['mfu']:.0%}" if row["mfu"] is not None else "")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
