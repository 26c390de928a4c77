"""Time of a step of eight micro-batches, its gradients reduced in each of them against in the last (fsdp 2, fp32).

The two take turns, a step each, in one run of two processes, so that what else the machine does hits both alike. Prints
the ratio of the summed times and the median ratio of neighbouring steps. What each keeps in memory is measured by
`plan_product`, and held against the planner's word.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning

from orchestrator.config.compose import compose
from orchestrator.distributed.local_processes import run_local
from orchestrator.hardware.target_table import resolve

PROCESSES, MICRO_BATCHES, SEQUENCES, WARMUP = 2, 8, 4, 2
CASES = {"tiny": 62, "llama_20m": 22}  # steps
QUIET = ["hardware=cpu", "layout.fsdp=2", "train.seq_len=256", "train.eval_every=null", "train.eval_tokens=512"]
QUIET += ["checkpoint.every_steps=null", "checkpoint.at_end=false", "logger.progress=false", "logger.tensorboard=false"]


class InTurn(lightning.Callback):
    """Even steps reduce in each micro-batch, odd ones in the last."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.mark = 0.0

    def on_train_batch_start(self, trainer: lightning.Trainer, *unused: Any) -> None:
        trainer.strategy.reduce_each = len(self.seconds) % 2 == 0  # type: ignore[attr-defined]
        self.mark = time.perf_counter()

    def on_train_batch_end(self, *unused: Any) -> None:
        self.seconds.append(time.perf_counter() - self.mark)


def overrides(model: str, steps: int) -> list[str]:
    tokens = PROCESSES * MICRO_BATCHES * SEQUENCES * 256
    batch = [f"train.global_batch_tokens={tokens}", f"train.micro_batch_size={SEQUENCES}"]
    return [*QUIET, *batch, f"model={model}", f"train.max_steps={steps}"]


def main() -> None:
    print(
        f"step of {MICRO_BATCHES} micro-batches of {SEQUENCES * 256:,} tokens, gradients reduced in each / in the last"
    )
    for model, steps in CASES.items():
        config = compose(overrides(model, steps)).config
        target = resolve(config.hardware)
        environments = [target.environment(config.hardware, rank, PROCESSES) for rank in range(PROCESSES)]
        with tempfile.TemporaryDirectory() as folder:
            if run_local([sys.executable, __file__, "--worker", folder, *overrides(model, steps)], environments).code:
                raise SystemExit("a worker failed")
            seconds = json.loads(Path(folder, "seconds.json").read_text())[WARMUP:]
        each, last = seconds[::2], seconds[1::2]
        pairs = statistics.median(a / b for a, b in zip(each, last, strict=True))
        print(
            f"  {model:<10} ratio {sum(each) / sum(last):.3f} (median of {len(last)} pairs {pairs:.3f}), "
            f"steps {statistics.median(each):.3f} and {statistics.median(last):.3f} s",
            flush=True,
        )


def work(folder: Path, words: list[str]) -> None:
    """One process of a run."""
    import logging
    import warnings

    from common import fit

    from orchestrator.distributed.world import detect

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    world = detect(os.environ)
    assert world is not None, "the launcher says who is who"
    turns = fit(compose(words).config, lambda config, data: InTurn(), world)
    if world.rank == 0:
        (folder / "seconds.json").write_text(json.dumps(turns.seconds))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
