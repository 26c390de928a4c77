"""What snapshots in the memory of the host cost the training: blocks of steps with and without them, in turn.

In one run of one process on a CPU, where writing them takes processor time from the step: that is what is measured.
Beside an accelerator it takes cores that are idle, and the step waits for the copy to host memory alone.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import statistics
import sys
import time
from typing import Any

import lightning.pytorch as lightning
from common import trained

from orchestrator.config.compose import compose
from orchestrator.training.callbacks.snapshots import Snapshots

PAIRS = 3


class Turns(lightning.Callback):
    """Switches snapshots on and off block by block, and measures each block."""

    def __init__(self, snapshots: Snapshots, block: int):
        self._snapshots, self._saver, self._block = snapshots, snapshots._saver, block
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self._begin = 0.0

    def on_train_batch_end(self, trainer: Any, module: Any, *unused: Any) -> None:
        """At the end of a block the other begins, when nothing is being written any more."""
        if module.step % self._block:
            return
        number, on = module.step // self._block, self._snapshots._saver is not None
        if self._saver is not None:
            self._saver.join()  # its time is the block's
        if number > 1:
            self.seconds[on].append(time.process_time() - self._begin)
        self._snapshots._saver = None if on else self._saver
        self._begin = time.process_time()


def cost(model: str, every: int, block: int) -> None:
    words = [
        f"model={model}",
        "hardware=cpu",
        f"train.max_steps={block * (2 * PAIRS + 1) + 1}",
        "train.eval_every=null",
    ]
    words += ["checkpoint.every_steps=null", "checkpoint.memory.enabled=true", f"checkpoint.memory.every_steps={every}"]
    config = compose([*words, "logger.progress=false", "logger.tensorboard=false"]).config
    with trained(config, lambda job, data: Turns(job.watchers.snapshots, block)) as (job, turns):
        stalls = job.watchers.snapshots.stalls
        job.watchers.snapshots.finish()
    ratios = [on / off for on, off in zip(turns.seconds[True], turns.seconds[False], strict=False)]
    step = statistics.median(turns.seconds[False]) / block
    holds = statistics.median(stalls) / step
    print(
        f"  {model}, every {every} steps: {statistics.median(ratios):.3f} of the processor time without "
        f"({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} pairs of blocks of {block}); "
        f"{len(stalls)} snapshots, each holds the training for {holds:.1%} of a step's processor time",
        flush=True,
    )


def main() -> None:
    asked = sys.argv[1:] or ["tiny:1:20", "tiny:10:20", "llama_20m:10:10"]
    print("snapshots in memory (4,096 tokens per step as by default, fp32, one process)")
    for one in asked:
        model, every, block = one.split(":")
        cost(model, int(every), int(block))


if __name__ == "__main__":
    main()
