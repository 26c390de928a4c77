"""Parts of one's own beside the model: a callback, a logger and a learning-rate schedule. Named by `_target_`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.loggers.logger import Logger


class CountTokens(lightning.Callback):
    """Counts what each process is given, and writes it into a file of its own at the end of the training.

    Args:
        directory: of the files, which is made.
        every: a line is printed after so many steps; 0: none.
    """

    def __init__(self, directory: str, every: int = 0):
        self._directory, self._every, self._tokens = Path(directory), every, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the targets of this process's share of a step."""
        self._tokens += int(batch["targets"].numel())
        if self._every and pl_module.step % self._every == 0 and trainer.is_global_zero:
            print(f"step {pl_module.step}: {self._tokens} tokens on this process")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the sum."""
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / f"rank{pl_module.parallel.rank}.txt").write_text(f"{self._tokens}\n")


class Lines(Logger):
    """Writes each row of metrics as a line of JSON.

    Args:
        path: of the file.
    """

    def __init__(self, path: str):
        super().__init__()
        self._path = Path(path)

    @property
    def name(self) -> str:
        """What Lightning calls it."""
        return "lines"

    @property
    def version(self) -> str:
        """There is one."""
        return "0"

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Begin the file anew with the name of the run."""
        self._path.write_text(json.dumps({"name": params["name"]}) + "\n")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a line."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


class InverseSquareRoot:
    """Linear warm-up, then down with the square root of the step, as in the first Transformer (Vaswani et al. 2017).

    Args:
        warmup_steps: of the warm-up.
    """

    def __init__(self, warmup_steps: int):
        self._warmup = warmup_steps

    def __call__(self, step: int, max_steps: int, lr: float) -> float:
        """Return the learning rate of the step that follows `step` completed ones; `lr` is the peak."""
        return lr * min((step + 1) / self._warmup, math.sqrt(self._warmup / (step + 1)))
