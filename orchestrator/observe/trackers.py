"""Experiment trackers: TensorBoard, Weights & Biases, and loggers of the user's own.

All of them may fail.
"""

from __future__ import annotations

import importlib.util
import io
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from orchestrator.config.schema import WandbConfig
from orchestrator.errors import MissingExtraError
from orchestrator.observe.history import REWOUND
from orchestrator.observe.sink import Appended

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

Row = Mapping[str, Any]
TAGS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "tokens": "train/tokens",
    "tokens_per_second": "speed/tokens_per_second",
    "step_seconds": "speed/step_seconds",
    "mfu": "speed/mfu",
    "memory_bytes": "speed/memory_bytes",
    "val_loss": "val/loss",
    "val_perplexity": "val/perplexity",
    "val_loss_ema": "val/loss_ema",
    "epochs": "data/epochs",
}
"""Keys of a row, and what they are called where people look at them: grouped by what is before the slash."""
OF_SOURCES = {"loss": "train/loss", "val_loss": "val/loss", "tokens": "data/tokens", "epochs": "data/epochs"}
OF_SOURCES |= {"task": "tasks"}
"""Beginnings of the keys of one source, validation set (`val_loss/web`) or task, and of their tags."""


def tagged(row: Row) -> dict[str, float]:
    """Return the numbers of a row by tag; what is unknown is left out.

    Args:
        row: figures by name.
    """
    found = {tag: row[key] for key, tag in TAGS.items() if row.get(key) is not None}
    for key, value in row.items():
        beginning, slash, name = key.partition("/")
        if slash and beginning in OF_SOURCES and value is not None:
            found[f"{OF_SOURCES[beginning]}/{name}"] = value
    return found


class TensorBoard:
    """One file of events per leg, written by whole records: a file that a full disk cut would end the curves there.

    TensorBoard's own writer does its work in a thread, which a full disk ends together with what it held.

    Args:
        folder: of the events.
        start_step: events of earlier legs beyond it are hidden.
        config: shown as text.
        earlier: rows that a new folder begins with: those of a run that was moved.
    """

    def __init__(self, folder: Path, start_step: int, config: Mapping[str, Any], earlier: Sequence[Row] = ()):
        self._folder, self._start_step, self._config, self._earlier = folder, start_step, config, earlier
        self._file = Appended(folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.0")
        self._begun = False

    def write(self, rows: Sequence[Row]) -> None:
        """Add rows.

        Args:
            rows: by rising step.

        Raises:
            OSError: none was.
        """
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = io.BytesIO()
        writer = RecordWriter(buffer)
        for event in [*([] if self._begun else self._head()), *self._events(rows)]:
            writer.write(event.SerializeToString())
        self._file.append(buffer.getvalue())
        self._begun = True

    def _head(self) -> Iterator[Any]:
        from tensorboard.compat.proto.event_pb2 import Event
        from torch.utils.tensorboard.summary import text

        yield Event(wall_time=time.time(), file_version="brain.Event:2")
        shown = yaml.safe_dump(dict(self._config), sort_keys=False)
        indented = "".join(f"    {line}\n" for line in shown.splitlines())  # as code, in Markdown
        yield Event(wall_time=time.time(), step=self._start_step, summary=text("config", indented))
        if any(self._folder.glob("events.*")):
            if self._start_step:
                yield _begun_again(self._start_step)
        else:
            yield from self._events(self._earlier)

    def _events(self, rows: Sequence[Row]) -> Iterator[Any]:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for row in rows:
            if REWOUND in row:
                yield _begun_again(row["step"])
                continue
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in tagged(row).items()]
            yield Event(wall_time=float(row.get("time") or 0), step=row["step"], summary=Summary(value=values))


def _begun_again(step: int) -> Any:
    """Return the event that hides the ones before it of steps after `step`."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    start = SessionLog(status=SessionLog.START)
    return Event(wall_time=time.time(), step=step + 1, session_log=start)


class Wandb:
    """The W&B run of this run, opened at the first row.

    Args:
        run_dir: gives it a name, and keeps what W&B keeps.
        config: where it is.
        run_config: shown beside it.
        run_uuid: what W&B knows the run by, whatever number of legs it takes and wherever they are.
        earlier: rows that a new W&B run begins with.

    Raises:
        MissingExtraError: the library is not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        config: WandbConfig,
        run_config: dict[str, Any],
        run_uuid: str,
        earlier: Sequence[Row] = (),
    ):
        if importlib.util.find_spec("wandb") is None:
            raise MissingExtraError("wandb", "wandb", "logger.wandb.enabled=true")
        self._run_dir, self._config, self._run_config = run_dir, config, run_config
        self._run_uuid, self._earlier = run_uuid, earlier
        self._run: Any = None

    def write(self, rows: Sequence[Row]) -> None:
        """Log rows.

        Args:
            rows: by rising step.

        Raises:
            Exception: whatever W&B says; it is safe to log the rows again, for a step keeps its last values.
        """
        if self._run is None:
            self._run = self._open()
        for row in rows:
            if values := tagged(row):
                self._run.log(values, step=row["step"])

    def _open(self) -> Any:
        import wandb

        run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            mode=self._config.mode,
            dir=str(self._run_dir),
            id=self._run_uuid,
            name=f"{self._run_dir.parent.name}/{self._run_dir.name}",
            resume="allow",
            config=self._run_config,
        )
        if not run.resumed:
            for row in self._earlier:
                run.log(tagged(row), step=row["step"])
        return run

    def close(self) -> None:
        """Let W&B send what is left."""
        if self._run is not None:
            self._run.finish()


class OwnLogger:
    """A logger of Lightning's that the user brings, made at the first row.

    Args:
        make: makes it.
        run_config: logged as its hyperparameters.
    """

    def __init__(self, make: Callable[[], Logger], run_config: dict[str, Any]):
        self._make, self._run_config = make, run_config
        self._logger: Logger | None = None

    def write(self, rows: Sequence[Row]) -> None:
        """Log rows.

        Args:
            rows: by rising step.

        Raises:
            Exception: whatever the logger says.
        """
        if self._logger is None:
            logger = self._make()
            logger.log_hyperparams(self._run_config)
            self._logger = logger
        for row in rows:
            if values := tagged(row):
                self._logger.log_metrics(values, step=row["step"])
        self._logger.save()

    def close(self) -> None:
        """Let the logger write what is left."""
        if self._logger is not None:
            self._logger.finalize("success")
