"""Overhead of the product on XLA: its step, with all callbacks on, against a hand-written torch_xla SPMD loop.

Both train the same decoder on the same data over a mesh of 2 x 2 virtual devices of this CPU, with the same
partition of every parameter, and take turns, one step each, in one process, once both are compiled. A turn ends
when the devices have finished: otherwise the work of one would be on the clock of the other. The product's time runs
from the end of one hand-written step to the start of the next: it includes Lightning, the callbacks and the
data loader. Then: how long the first step compiles, by the number of layers.
"""

from __future__ import annotations

import os

# Before torch is loaded, and as the TPU target sets them for a rehearsal of four devices.
os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES="4", OMP_NUM_THREADS="1", TF_CPP_MIN_LOG_LEVEL="2")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import logging
import statistics
import time
import warnings
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
import torch_xla.distributed.spmd as xs
from common import batches, fit, optimizer_groups
from torch import Tensor, nn

from orchestrator.config.compose import compose
from orchestrator.config.schema import RunConfig
from orchestrator.data.prepare import PreparedData
from orchestrator.models.decoder import Decoder
from orchestrator.sharding import rules
from orchestrator.training.check import resolve_model

WARMUP = 5
QUIET = ["train.eval_every=null", "checkpoint.every_steps=null", "logger.every_steps=10"]
MESH = ["hardware=tpu", "hardware.simulate=4", "layout.fsdp=2", "layout.tensor=2"]


def compilations() -> tuple[int, float]:
    """Graphs compiled so far by this process, and the seconds that took."""
    data = met.metric_data("CompileTime")
    return (int(data[0]), data[1] / 1e9) if data else (0, 0.0)


class Turns(lightning.Callback):
    """Clock of the product's steps; what is done after each of them is a subclass's."""

    def __init__(self) -> None:
        self.ours: list[float] = []
        self.compiled = 0
        self.compile_seconds = 0.0
        self._start()

    def _start(self) -> None:
        xm.wait_device_ops()
        self._before = compilations()
        self._mark = time.perf_counter()

    def on_train_start(self, *unused: Any) -> None:
        self._start()

    def on_train_batch_end(self, *unused: Any) -> None:
        xm.wait_device_ops()
        self.ours.append(time.perf_counter() - self._mark)
        count, seconds = compilations()
        self.compiled += count - self._before[0]
        self.compile_seconds += seconds - self._before[1]
        self.turn()
        self._start()

    def turn(self) -> None:
        """Nothing."""


class HandWritten(Turns):
    """The loop that one would write without the product; a step of it after each of the product's."""

    def __init__(self, config: RunConfig, data: PreparedData):
        self.mesh = xs.Mesh(np.arange(4), (2, 2), ("fsdp", "tensor"))
        self.model = Decoder(resolve_model(config.model, data.vocab_size), config.train.loss_chunk_tokens)
        self._place(self.model)
        groups = optimizer_groups(self.model)
        self.optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas, capturable=True)
        self.batches = batches(config, data)
        self.theirs: list[float] = []
        self.their_compiled = 0
        super().__init__()

    def _place(self, model: Decoder) -> None:
        """Initial weights on the devices, cut as the product cuts them."""
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for name, placement in rules.place(model.logical_axes(), shapes).items():
            path, _, leaf = name.rpartition(".")
            host = (
                nn.init.normal_(torch.empty(shapes[name]), std=0.02)
                if len(shapes[name]) > 1
                else torch.ones(shapes[name])
            )
            spec: list[Any] = [None] * host.dim()
            if placement.tensor_dim is not None:
                spec[placement.tensor_dim] = "tensor"
            spec[0] = ("tensor", "fsdp") if spec[0] else "fsdp"
            setattr(model.get_submodule(path), leaf, nn.Parameter(self._send(host, tuple(spec))))
        model.tie_weights()

    def _send(self, host: Tensor, spec: tuple[Any, ...]) -> Tensor:
        placed = host.to(torch_xla.device())
        xs.mark_sharding(placed, self.mesh, spec)
        return placed

    def turn(self) -> None:
        before = compilations()[0]
        begin = time.perf_counter()
        batch = {
            name: self._send(torch.from_numpy(value), ("fsdp", None)) for name, value in next(self.batches).items()
        }
        loss = self.model(**batch) / (batch["targets"] != -100).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch_xla.sync()
        xm.wait_device_ops()
        self.theirs.append(time.perf_counter() - begin)
        self.their_compiled += compilations()[0] - before


def train(overrides: list[str], against: bool) -> Any:
    """Train as the product does; with `against`, in turns with the hand-written loop."""
    config = compose([*MESH, *QUIET, "model=tiny", *overrides]).config
    return fit(config, HandWritten if against else lambda config, data: Turns())


def print_ratio(steps: int, seq_len: int, tokens: int) -> None:
    """One line: ratio of the sums, median ratio of neighbours, milliseconds per step, compilations."""
    size = [f"train.max_steps={steps}", f"train.seq_len={seq_len}", f"train.global_batch_tokens={tokens}"]
    turns = train(size, against=True)
    ours, theirs = turns.ours[WARMUP:], turns.theirs[WARMUP:]
    median = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(
        f"  {tokens:>4} tokens: ratio {sum(ours) / sum(theirs):.3f} (median of {len(ours)} pairs {median:.3f}), "
        f"step {statistics.median(ours) * 1000:.0f} / {statistics.median(theirs) * 1000:.0f} ms, "
        f"compilations {turns.compiled} / {turns.their_compiled}",
        flush=True,
    )


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(
        "step time, product / hand-written SPMD loop (tiny, fp32, 2 x 2 virtual devices, all callbacks on)", flush=True
    )
    print_ratio(steps=45, seq_len=256, tokens=2048)
    # Next to no work for the devices: what the host does between them is seen largest.
    print_ratio(steps=85, seq_len=64, tokens=128)
    print("first step by number of layers (tiny, 1024 tokens)", flush=True)
    for layers in (2, 4, 8, 16):
        # Another batch than above: this process has compiled that graph.
        words = [f"model.layers={layers}", "train.max_steps=2", "train.global_batch_tokens=1024"]
        turns = train([*words, "logger.progress=false"], against=False)
        first, second = turns.ours
        print(
            f"  {layers:>2} layers: {first:.1f} s, of it compiling {turns.compile_seconds:.1f} s; second {second:.2f} s"
        )


if __name__ == "__main__":
    main()
