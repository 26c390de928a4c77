"""A callback that slows a run down, so that something can happen to it in the middle."""

from __future__ import annotations

import time
from typing import Any

import lightning


class Paced(lightning.Callback):
    """Sleeps after every step."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        time.sleep(self.seconds)
