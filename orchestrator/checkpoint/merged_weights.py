"""Read the weights of a checkpoint whole, also where it holds adapters: what they add is added to the base's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from orchestrator.checkpoint.adapters import adapter_record, is_adapter, open_base
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.reader import Reader, read_into
from orchestrator.checkpoint.signing import Trust
from orchestrator.constants import LORA_A, LORA_B
from orchestrator.distributed.exchange import Coordinator
from orchestrator.errors import CheckpointError
from orchestrator.sharding.shard import Shard

_OPTIMIZER = ["optimizer."]


class Adapters:
    """The adapters of a checkpoint, in memory: they are small.

    Args:
        checkpoint: of adapters.
        check: the processes that read it together, as for `read_into`.

    Attributes:
        pairs: A and B by the stored path of their layer, `model.layers.0.attn.q`; fp32.
        scale: factor on what they add.

    Raises:
        CheckpointError: they are no pairs, or the checkpoint is damaged.
    """

    def __init__(self, checkpoint: Checkpoint, check: Coordinator | None = None):
        record = adapter_record(checkpoint)
        assert record is not None, "a checkpoint of adapters"
        stored, self.scale = checkpoint.manifest.tensors, record.scale
        shards = [
            Shard(name, one.shape, tuple(slice(0, size) for size in one.shape), torch.empty(one.shape))
            for name, one in stored.items()
            if name.startswith("model.") and is_adapter(name)
        ]
        read_into(checkpoint, shards, _OPTIMIZER, check=check)
        tensors = {shard.name: shard.data for shard in shards}
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for path in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
            a, b = tensors.get(f"{path}.{LORA_A}"), tensors.get(f"{path}.{LORA_B}")
            if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                raise CheckpointError("an adapter is no pair of matrices", got=f"{path} in {checkpoint.directory}")
            self.pairs[path] = a, b

    def add_to(self, name: str, weight: Tensor, box: tuple[slice, ...]) -> None:
        """Add what the adapter of a matrix adds to it, in fp32.

        Args:
            name: of the matrix, as stored.
            weight: the part `box` of it, changed in place; nothing happens where it has no adapter.
            box: the part.
        """
        path = name.removesuffix(".weight")
        if name == path or path not in self.pairs or not weight.numel():
            return
        (a, b), (rows, columns) = self.pairs[path], box
        added = (b[rows] @ a[:, columns]) * self.scale
        weight.copy_((weight.float() + added.to(weight.device)).to(weight.dtype))


class MergedReader(Reader):
    """As `Reader`, of the weights of a base with what adapters add.

    Args:
        base: the checkpoint of the base.
        adapters: what is added.
    """

    def __init__(self, base: Checkpoint, adapters: Adapters):
        super().__init__(base)
        self._adapters = adapters

    def tensor(self, name: str, box: tuple[slice, ...] | None = None) -> Tensor:
        """Read a weight, or the part `box` of it, and add what its adapter adds."""
        weight = super().tensor(name, box)
        self._adapters.add_to(name, weight, box or tuple(slice(0, size) for size in weight.shape))
        return weight


def weights_reader(checkpoint: Checkpoint, base: Checkpoint | None) -> Reader:
    """Return a reader of whole weights.

    Args:
        checkpoint: the checkpoint.
        base: of its adapters, as `open_base` gave it.
    """
    return Reader(checkpoint) if base is None else MergedReader(base, Adapters(checkpoint))


def read_weights(
    checkpoint: Checkpoint,
    shards: Sequence[Shard],
    cast: bool = True,
    check: Coordinator | None = None,
    progress: Callable[[int], object] = lambda done: None,
    elsewhere: Collection[str] = (),
    trust: Trust = Trust(),
) -> None:
    """Fill the weights `shards`: of a checkpoint of adapters those of its base, with what the adapters add.

    Args:
        checkpoint: the checkpoint.
        shards: parts of weights, on any layout.
        cast: as for `read_into`, like the following ones.
        check: the processes that read together.
        progress: told of what was read.
        elsewhere: parameters that other processes alone have.
        trust: whose checkpoints are believed.

    Raises:
        CheckpointError: as `read_into`; or the base is not to be found.
    """
    base = open_base(checkpoint, trust, look=False)
    read_into(base or checkpoint, shards, _OPTIMIZER, cast, check, progress, elsewhere)
    if base is not None:
        adapters = Adapters(checkpoint, check)
        for shard in shards:
            adapters.add_to(shard.name, shard.data, shard.slices)
