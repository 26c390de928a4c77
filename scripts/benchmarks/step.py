"""Overhead of the product: its step, with progress bar, logging and metrics on, against a hand-written loop.

The two take turns, one step each, in one process on the same model, data and threads, so that what else the
machine does hits both alike. The product's time runs from the end of one hand-written step to the start of
the next: it includes Lightning, the callbacks and the data loader. Prints the ratio of the summed times and, as
noise is the enemy, the median ratio of neighbouring steps.
"""

from __future__ import annotations

import os

# Before torch is loaded, and as the CPU target sets it for every run.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import statistics
import time
from typing import Any

import lightning.pytorch as lightning
import torch
from common import batches, fit, optimizer_groups

from orchestrator.config.compose import compose
from orchestrator.config.schema import RunConfig
from orchestrator.data.prepare import PreparedData
from orchestrator.models.decoder import Decoder
from orchestrator.training.check import resolve_model

WARMUP = 3


class HandWritten(lightning.Callback):
    """The loop that one would write without the product; a step of it after each of the product's."""

    def __init__(self, config: RunConfig, data: PreparedData):
        self.config = config
        self.model = Decoder(resolve_model(config.model, data.vocab_size), config.train.loss_chunk_tokens)
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
        groups = optimizer_groups(self.model)
        self.optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas, fused=True)
        self.batches = batches(config, data)
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.mark = 0.0

    def on_train_start(self, *unused: Any) -> None:
        self.mark = time.perf_counter()

    def on_train_batch_end(self, *unused: Any) -> None:
        begin = time.perf_counter()
        self.ours.append(begin - self.mark)
        batch = {name: torch.from_numpy(value) for name, value in next(self.batches).items()}
        loss = self.model(**batch) / (batch["targets"] != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()
        self.mark = time.perf_counter()
        self.theirs.append(self.mark - begin)


def measure(model: str, steps: int, tokens: int) -> tuple[float, float, float]:
    """Ratio of sums, median ratio of pairs, and the product's seconds per step."""
    overrides = [f"model={model}", "hardware=cpu", f"train.max_steps={steps}", f"train.global_batch_tokens={tokens}"]
    quiet = ["train.eval_every=null", "checkpoint.every_steps=null", "logger.every_steps=10"]
    turn = fit(compose([*overrides, *quiet]).config, HandWritten)
    ours, theirs = turn.ours[WARMUP:], turn.theirs[WARMUP:]
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    return sum(ours) / sum(theirs), statistics.median(pairs), statistics.median(ours)


def main() -> None:
    print("step time, product / hand-written loop (fp32, one process, all callbacks on)")
    for model, steps, tokens in (("llama_20m", 33, 2048), ("tiny", 103, 4096)):
        total, median, seconds = measure(model, steps, tokens)
        spread = f"median of {steps - WARMUP} pairs {median:.3f}"
        print(f"  {model:<10} ratio {total:.3f} ({spread}), step {seconds * 1000:.0f} ms")


if __name__ == "__main__":
    main()
