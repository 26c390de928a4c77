"""The training step as a program for a compiler, staged out without a byte of model memory.

The step is the product's own: the model, the optimizer and the strategy that `train.build` makes, driven by
`LanguageModule.training_step`. Only two things differ from a run. What the strategy would send to the devices is
a placeholder, a tensor with a shape and a sharding and no data; and where a run would execute the step, its graph
is written down as StableHLO.

Runs as a process of its own, with as many virtual CPU devices as the rehearsed topology has:
`python -m orchestrator.train.rehearsal CONFIG.yaml OUTPUT_DIRECTORY`.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
from torch import Tensor, nn
from torch_xla.core.xla_builder import create_placeholder_tensor

from orchestrator.config.compose import read_config
from orchestrator.config.schema import RunConfig
from orchestrator.errors import UserError
from orchestrator.hardware.registry import resolve
from orchestrator.hardware.world import World
from orchestrator.models.decoder import Decoder
from orchestrator.sharding.layout import resolve_layout
from orchestrator.strategies.base import local_parameters
from orchestrator.strategies.xla import XlaStrategy
from orchestrator.train.build import _place_model
from orchestrator.train.module import LanguageModule
from orchestrator.train.optim import build_optimizer

PROGRAM, FACTS = "step.mlir", "staged.json"


class StagingStrategy(XlaStrategy):
    """The XLA strategy, whose tensors hold nothing and whose step is not executed."""

    def _send(self, tensor: Tensor, spec: tuple[Any, ...]) -> Tensor:
        placed = create_placeholder_tensor(tuple(tensor.shape), tensor.dtype)
        torch_xla._XLAC._xla_annotate_custom_sharding(placed, self._mesh.get_op_sharding(spec))
        return placed

    @contextmanager
    def backward_context(self, model: Decoder, last: bool) -> Iterator[None]:
        assert last, "a staged step has one backward pass"
        yield

    def prepare_optimizer(self, model, optimizer):
        super().prepare_optimizer(model, optimizer)
        for state in optimizer.state.values():
            state.update({key: self._send(value, ()) for key, value in state.items() if not value.dim()})

    def finish_step(self) -> None:
        """The graph is not executed."""


def main(argv):
    from orchestrator.config.compose import compose
    t = time.time()
    def say(*a): print(f"{time.time()-t:7.1f}", *a, flush=True)
    config = compose(argv).config
    target = resolve(config.hardware)
    devices = target.probe().devices
    layout = resolve_layout(config.layout, devices)
    parallel = StagingStrategy(target, World(), layout, config.hardware.precision)
    parallel.join()
    torch_xla.sync = lambda *a, **k: None
    say("joined", layout)
    model = _place_model(config, config.model, parallel)
    say("placed")
    optimizer = build_optimizer(model, config.optim, parallel.root_device)
    parallel.prepare_optimizer(model, optimizer)
    say("optimizer")
    train = config.train
    B, T = train.global_batch_tokens // train.seq_len, train.seq_len
    z = torch.zeros(B, T, dtype=torch.int64)
    batch = parallel.prepare_batch({"tokens": z, "positions": z, "targets": z, **({"documents": z} if config.data.document_mask else {})})
    module = LanguageModule(model, optimizer, parallel, config, B, 0)
    rec = {}
    module.record = lambda **v: rec.update(v)
    module.optimizers = lambda: optimizer
    module.manual_backward = lambda loss: loss.backward()
    xm.get_stablehlo  # noqa
    ins = [p for _, p in local_parameters(model)]
    ids = [torch_xla._XLAC._xla_get_tensor_id(p) for p in ins]
    from lightning.pytorch.core.optimizer import LightningOptimizer
    lo = LightningOptimizer(optimizer)
    class S:  # bare
        pass
    lo._strategy = S(); lo._strategy.optimizer_step = lambda o, closure, **k: o.step(closure=closure)
    module.optimizers = lambda: lo
    class TR: pass
    module.training_step(batch, 0)
    say("traced")
    outs = [rec["loss_part"], rec["grad_norm"]] + [t for _, t in parallel._named(model, optimizer)]
    text = torch_xla._XLAC._get_stablehlo(outs, "", [], False).decode()
    say("stablehlo", len(text))
    Path("/tmp/reh/step.mlir").write_text(text)
    try:
        r = torch_xla._XLAC._get_tensors_xla_device_data_node(outs[:])
        say("nodes", len(r[0]), r[0][:5], ids[:5])
    except Exception as e:
        say("nodes failed", repr(e)[:500])


if __name__ == "__main__":
    main(sys.argv[1:])
