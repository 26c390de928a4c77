"""Step metrics: buffered on the device, fetched and written every few steps.

A `self.log` per step and key costs Lightning more than the rest of its loop, and every fetch waits for the
device. So a step only appends tensors to a buffer; a flush stacks them, reduces them over the ranks in one
go, and hands rows to `metrics.jsonl`, TensorBoard and W&B: each a side channel, which may fail.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.loggers import Logger
from torch import Tensor

from orchestrator.config.schema import LoggerConfig
from orchestrator.observe.history import METRICS, REWOUND, History, finite_row, row_key, written_rows
from orchestrator.observe.sink import Channel, JsonLines, SideChannels
from orchestrator.observe.trackers import OwnLogger, TensorBoard, Wandb

_UNSAID = 2000  # rows that are kept of what another process writes, should it be lost


class Metrics(lightning.Callback):
    """Collects what each step records and hands it to the side channels.

    Args:
        run_dir: where `metrics.jsonl` is; rows are only ever added.
        config: what else is written, and how often.
        fetch: scalars that are the same on all ranks, to the host.
        compilations: graphs compiled so far; None where nothing is compiled.
        tokens_after: tokens that were trained on after so many steps.
        sources: figures of the sources of the data after so many steps, for the last row of each flush.
        mfu: tokens per second to model FLOPs utilisation; None where a figure is unknown.
        memory: bytes in use on this rank's device; None where unknown.
        main: whether this rank may write. All ranks flush together.
        speaks: whether it writes now. Where it begins to, it adds what the one before it had not written.
        leg: which start of the run this is, from 0.
        start_step: steps completed before this leg.
        run_config: the configuration, for TensorBoard and W&B.
        run_uuid: what W&B knows the run by: two runs that start in one second stay two, and one that moved stays one.
        history: what of the rows travels in checkpoints. Its rows so far begin a new TensorBoard directory or W&B run.
        channels: those of the run; tried again at each flush.
        skips: steps that are not finite are left out, and their rows say so.
        loggers: what makes the user's own, by name.

    Attributes:
        every: steps between two flushes.
        latest: the last training row.
        heard: called with the training rows of each flush, on every rank.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LoggerConfig,
        *,
        fetch: Callable[[Sequence[Tensor]], list[float]],
        compilations: Callable[[], int | None],
        tokens_after: Callable[[int], int],
        sources: Callable[[int], Mapping[str, float]] = lambda step: MappingProxyType({}),
        mfu: Callable[[float], float | None],
        memory: Callable[[], int | None],
        main: bool,
        speaks: Callable[[], bool] = lambda: True,
        leg: int,
        start_step: int,
        run_config: dict[str, Any],
        run_uuid: str,
        history: History,
        channels: SideChannels,
        skips: bool = False,
        loggers: Mapping[str, Callable[[], Logger]] = MappingProxyType({}),
    ):
        self.every = config.every_steps
        self.latest: dict[str, Any] = {}
        self._fetch, self._mfu, self._memory = fetch, mfu, memory
        self._compilations = compilations
        self._leg, self._main = leg, main
        self._tokens_after, self._sources, self._skips = tokens_after, sources, skips
        self._steps: list[dict[str, Any]] = []
        self._speaks, self._unsaid, self._file = speaks, deque[dict[str, Any]](maxlen=_UNSAID), run_dir / METRICS
        self._history, self._channels = history, channels
        self._sinks = self._open(run_dir, config, start_step, run_config, run_uuid) if main else []
        for name, make in loggers.items() if main else ():
            own = OwnLogger(make, run_config)
            self._sinks.append(channels.open(name, own.write, close=own.close))
        self.heard: Callable[[Sequence[dict[str, Any]]], object] = lambda rows: None
        self._since = time.perf_counter()

    def _open(
        self, run_dir: Path, config: LoggerConfig, start_step: int, run_config: dict[str, Any], run_uuid: str
    ) -> list[Channel[Any]]:
        opened = [self._channels.open(METRICS, JsonLines(run_dir / METRICS).write)]
        earlier = self._history.rows()
        if config.tensorboard:
            board = TensorBoard(run_dir / "tensorboard", start_step, run_config, earlier)
            opened.append(self._channels.open("tensorboard", board.write))
        if config.wandb.enabled:
            tracker = Wandb(run_dir, config.wandb, run_config, run_uuid, earlier)
            opened.append(self._channels.open("W&B", tracker.write, close=tracker.close))
        return opened

    def write_to(self, channel: Channel[Any]) -> None:
        """Write rows to another channel, too.

        Args:
            channel: of the run, in the process that writes.
        """
        self._sinks.append(channel)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take over the module's `record` and start the clock."""
        pl_module.record = self.record
        self._since = time.perf_counter()

    def record(self, **values: Any) -> None:
        """Record one step: `step`, `loss`, `grad_norm`, `lr`, and what else there is, the same names at each step.

        Args:
            values: figures by name; those on the device as tensors.
        """
        self._steps.append({**values, "time": time.time()})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        """Write the rows of the last steps, where a period ends."""
        if pl_module.step % self.every == 0:
            self.flush()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the rows that are left."""
        self.flush()

    def flush(self) -> None:
        """Fetch and write what has gathered. All ranks call it at the same step."""
        if not self._steps:
            return
        figures = {name: self._fetch([step[name] for step in self._steps]) for name in self._figures()}
        seconds = (time.perf_counter() - self._since) / len(self._steps)
        first, last = self._steps[0]["step"], self._steps[-1]["step"]
        tokens = self._tokens_after(last) - self._tokens_after(first - 1)
        rate = tokens / len(self._steps) / seconds
        shared: dict[str, Any] = {
            "tokens_per_second": rate,
            "step_seconds": seconds,
            "mfu": self._mfu(rate),
            "memory_bytes": self._memory(),
        }
        if (compiled := self._compilations()) is not None:
            shared["compilations"] = compiled
        rows = []
        for index, step in enumerate(self._steps):
            own = {name: values[index] for name, values in figures.items()}
            bad = not math.isfinite(own["loss"] + own["grad_norm"])
            # A step without a sequence of a source has no loss of it.
            own = {name: value for name, value in own.items() if "/" not in name or math.isfinite(value)}
            row = {"step": step["step"], **own, "lr": step["lr"], "tokens": self._tokens_after(step["step"])}
            skipped = {"skipped": True} if self._skips and bad else {}
            rows.append(finite_row({**row, **skipped, **shared, "time": step["time"], "leg": self._leg}))
        rows[-1].update(self._sources(rows[-1]["step"]))
        self._steps.clear()
        self.latest = rows[-1]
        self._write(rows)
        self.heard(rows)
        self._since = time.perf_counter()

    def _figures(self) -> list[str]:
        """Return the names of what is on the device: loss, gradient norm, and the routers' figures."""
        return [name for name, value in self._steps[0].items() if isinstance(value, Tensor)]

    def forget_after(self, step: int) -> None:
        """Drop what was recorded of later steps and is not written yet: they were computed and had no effect.

        Args:
            step: optimizer steps completed.
        """
        self._steps = [values for values in self._steps if values["step"] <= step]

    def rewind(self, step: int, undone: int) -> None:
        """Note that the steps after `step` were undone: their rows stay in the file, and count no more.

        Args:
            step: optimizer steps completed, from now on.
            undone: the last step that was computed.
        """
        self._steps.clear()
        self._history.forget_after(step)
        self._write([{"step": step, REWOUND: undone, "time": time.time(), "leg": self._leg}])
        self.pause()

    def pause(self) -> None:
        """Start the clock again: what was done since the last flush is not training."""
        self._since = time.perf_counter()

    def write_evaluation(self, step: int, **values: float) -> None:
        """Write a row of held-out metrics.

        Args:
            step: optimizer steps completed.
            values: figures by name.
        """
        self._write([finite_row({"step": step, **values, "time": time.time(), "leg": self._leg})])

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if self._main:
            self._history.write(rows)
        if not self._speaks():
            self._unsaid.extend(rows)
            return
        if self._unsaid:
            written = written_rows(self._file)
            rows = [row for row in self._unsaid if row_key(row) not in written] + rows
            self._unsaid.clear()
        for sink in self._sinks:
            sink.put(rows)
        self._channels.retry()
