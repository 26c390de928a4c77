"""Export the training step as a program for a compiler, without allocating the model.

The step is the product's own: the model, the optimizer, the strategy and the module that a run has, driven by the
trainer of a run. Two things differ. What the strategy would send to the devices is a placeholder, a tensor with a
shape and a partition and no data; and where a run would execute the step, the step is written down as StableHLO.

A process of its own, as nothing can be executed in it any more:
`python -m orchestrator.rehearsal.stage DIRECTORY`, with `resolved.json` in the directory and `hardware.simulate` the
number of devices. torch itself counts at most 127 devices: the process has two virtual ones (CPU_NUM_DEVICES),
and only the mesh, whose numbers are written into the program, has all.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_xla
import torch_xla.distributed.spmd as xs
from torch import Tensor
from torch_xla.core.xla_builder import create_placeholder_tensor

from orchestrator.data.sequences import blank_batch
from orchestrator.distributed.world import World
from orchestrator.errors import UserError
from orchestrator.models.protocol import ShardableModel
from orchestrator.output import printing
from orchestrator.sharding.axes import MESH_AXES
from orchestrator.sharding.rules import Placement
from orchestrator.strategies.parallel_strategy import local_parameters
from orchestrator.strategies.xla import XlaStrategy
from orchestrator.training.job import make_trainer
from orchestrator.training.module import LanguageModule
from orchestrator.training.preference import without_preferences
from orchestrator.training.resolved import Resolved, read_resolved

PROGRAM, FACTS = "step.mlir", "staged.json"

_ARGUMENT = re.compile(r"(%arg\d+): (tensor<[^>]*>)(?! \{)")
_PARTITION = re.compile(r'@Sharding\((%arg\d+)\) \{[^}]*?mhlo\.sharding = "([^"]*)"')


class _VirtualMesh(xs.Mesh):
    """A mesh over more devices than the runtime of this process has, which `xs.Mesh` refuses."""

    def __init__(self, device_ids: np.ndarray, mesh_shape: tuple[int, ...], axis_names: tuple[str, ...]):
        self.device_ids, self.mesh_shape, self.axis_names = device_ids, mesh_shape, axis_names


class StagingStrategy(XlaStrategy):
    """The XLA strategy on placeholders; the step is exported and not executed.

    Attributes:
        accumulates: whether earlier micro-batches have left gradients that the backward pass adds to.
    """

    accumulates = False

    def _make_mesh(self, device_ids: np.ndarray, degrees: tuple[int, ...]) -> xs.Mesh:
        return _VirtualMesh(device_ids, degrees, MESH_AXES)

    def _execute(self) -> None:
        """Run nothing: there is no data that a graph could be executed on."""

    def _devices(self) -> list[Mapping[str, Any]]:
        # Where devices are is the compiler's matter: `launch.tpu_compiler` lays the mesh over them.
        return [{}] * self.layout.devices

    def shard(self, model: ShardableModel, placements: Mapping[str, Placement]) -> None:
        """Annotate placeholders in place of the parameters."""
        # The zeros that would be sent are made on meta: of them only the shape is used.
        with torch.device("meta"):
            super().shard(model, placements)

    def prepare_optimizer(self, model: ShardableModel, optimizer: torch.optim.Optimizer) -> None:
        """Put placeholders in place of the optimizer's state."""
        with torch.device("meta"):
            super().prepare_optimizer(model, optimizer)
        for state in optimizer.state.values():
            # The counts are on the device in a run; here they would be constants of the program.
            state.update({key: self._send(value, ()) for key, value in state.items() if not value.dim()})

    def outputs(self, model: ShardableModel, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """Return what the step leaves on the devices: weights and optimizer state.

        Args:
            model: the staged model.
            optimizer: over the model's parameters.
        """
        return [tensor for _, tensor in self._named(model, optimizer)]

    def _send(self, tensor: Tensor, spec: tuple[Any, ...]) -> Tensor:
        placed = create_placeholder_tensor(tuple(tensor.shape), tensor.dtype)
        # `mark_sharding` refuses what has no data. An annotation is an operation of the program; `_declare` makes it
        # a property of the argument.
        torch_xla._XLAC._xla_annotate_custom_sharding(placed, self._mesh.get_op_sharding(spec))
        return placed

    @contextmanager
    def backward_context(self, model: ShardableModel, last: bool) -> Iterator[None]:
        """Give the parameters the gradients of the earlier micro-batches, as placeholders."""
        assert last, "a staged step has one backward pass"
        if self.accumulates:
            for name, parameter in local_parameters(model):
                parameter.grad = self._send(parameter.detach(), self._spec(model, name))
        yield


@dataclass(frozen=True)
class Staged:
    """An exported step.

    Attributes:
        program: StableHLO text; every argument has its partition, those that the step updates are given away.
        layout: degrees of the mesh axes, filled in.
        degrees: the same as numbers, of all axes.
        parameters: elements of the model.
        arguments: placeholders that the program reads.
        micro_batch: sequences of the one backward pass in it, over all devices.
        micro_batches: backward passes of a step; the program is that of the last one.
    """

    program: str
    layout: str
    degrees: tuple[int, ...]
    parameters: int
    arguments: int
    micro_batch: int
    micro_batches: int


def stage(resolved: Resolved) -> Staged:
    """Write down the optimizer step of a run for `hardware.simulate` devices.

    With several micro-batches it is the last one's graph, which adds to the gradients that are there, clips them
    and updates: the largest of a step.

    Args:
        resolved: the run.

    Raises:
        UserError: what of the configuration the strategy cannot do.
    """
    config, parallel = resolved.config, _make_strategy(resolved)
    parallel.join()
    module = LanguageModule(without_preferences(config), parallel=parallel)
    module.configure_model()
    optimizer, model, micro_batch = module.make_optimizer(), module.model, module.micro_batch
    sequences = config.train.global_batch_tokens // config.train.seq_len
    parallel.accumulates = micro_batch < sequences
    batch = blank_batch(micro_batch, config.train.seq_len, config.data.document_mask)
    measured = _run_step(module, parallel, batch)
    results = [*measured, *parallel.outputs(model, optimizer)]
    text: bytes = torch_xla._XLAC._get_stablehlo(results, "", [], False)
    program, arguments = _declare(text.decode())
    size = sum(parameter.numel() for _, parameter in local_parameters(model))
    layout, passes = parallel.layout, -(-sequences // micro_batch)
    return Staged(program, str(layout), tuple(layout.as_dict().values()), size, arguments, micro_batch, passes)


def _make_strategy(resolved: Resolved) -> StagingStrategy:
    """As `training.job.make_strategy`, for one process that stands for all hosts."""
    seconds = resolved.config.hardware.timeout_seconds
    return StagingStrategy(resolved.target(), World(), resolved.layout, resolved.precision, seconds)


def _run_step(module: LanguageModule, parallel: XlaStrategy, batch: dict[str, np.ndarray]) -> list[Tensor]:
    """One step by the trainer of a run. Returns its loss and the norm of its gradients."""
    # An iterator, as the trainer takes a list for several loaders.
    seen: list[Tensor] = []
    module.record = lambda *, loss, grad_norm, **values: seen.extend((loss, grad_norm))
    make_trainer(parallel, [], deterministic=False).fit(module, iter([batch]))
    return seen


def _declare(text: str) -> tuple[str, int]:
    """Return the program with the partitions of its arguments in its signature, and how many arguments it has so.

    What is not whole numbers is state (a batch is): the step replaces it, and a run gives its memory to the results.
    """
    partitions = dict(_PARTITION.findall(text))
    signature, arrow, rest = text.partition(") -> (")

    def declare(match: re.Match[str]) -> str:
        name, kind = match.groups()
        if name not in partitions:
            return match[0]
        donor = "" if kind.endswith("xi64>") else ", jax.buffer_donor = true"
        return f'{name}: {kind} {{mhlo.sharding = "{partitions[name]}"{donor}}}'

    return _ARGUMENT.sub(declare, signature) + arrow + rest, len(partitions)


def main(argv: list[str]) -> int:
    """Stage the resolved run in a directory into `PROGRAM` and `FACTS` beside it.

    Args:
        argv: the directory.
    """
    directory, start = Path(argv[0]), time.monotonic()
    try:
        with printing():
            staged = stage(read_resolved(directory))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    (directory / PROGRAM).write_text(staged.program)
    facts = {key: value for key, value in asdict(staged).items() if key != "program"}
    facts["stage_seconds"] = time.monotonic() - start
    (directory / FACTS).write_text(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
