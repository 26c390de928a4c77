"""Read optimizer state that a checkpoint has in fewer bits into fp32.

The other way is refused: what is rounded is drawn by chance, and a run that goes on shall go on as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import StoredTensor
from orchestrator.checkpoint.reader import DTYPES
from orchestrator.constants import CODE_BLOCK, SCALE
from orchestrator.errors import CheckpointError
from orchestrator.optim.rounding import CODES
from orchestrator.sharding.parts import in_blocks
from orchestrator.sharding.shard import Shard


@dataclass(frozen=True)
class Widened:
    """A part of a moment in fp32, and what it is read by.

    Attributes:
        moment: key of the state.
        wanted: the part, which `finish` fills.
        stored: the same part as the checkpoint has it.
        scale: of its blocks, where it is codes.
    """

    moment: str
    wanted: Shard
    stored: Shard
    scale: Shard | None

    @property
    def reads(self) -> list[Shard]:
        """The parts to be read."""
        return [self.stored] if self.scale is None else [self.stored, self.scale]

    def finish(self) -> None:
        """Fill the part, once `reads` are filled."""
        value = self.stored.data
        if self.scale is not None:
            value = CODES[self.moment].decode(value, self.scale.data)
        self.wanted.data.copy_(value)


def widen(checkpoint: Checkpoint, shards: Sequence[Shard]) -> tuple[list[Shard], list[Widened]]:
    """Find the moments that are stored in fewer bits than `shards` have.

    Args:
        checkpoint: to be read.
        shards: parts of weights and optimizer state.

    Returns:
        The parts to be read, in their place and as they are stored; and what is to be finished then.

    Raises:
        CheckpointError: a moment is stored in more bits, or in other ones.
    """
    reads, widened = [], []
    for shard in shards:
        stored = checkpoint.manifest.tensors.get(shard.name)
        moment = shard.name.split(".")[1] if shard.name.startswith("optimizer.") else ""
        if moment.endswith(SCALE) and moment.removesuffix(SCALE) in CODES and stored is None:
            raise _other(shard.name, "8-bit codes", "fp32 or bf16")
        if moment not in CODES or stored is None or DTYPES[stored.dtype] == shard.data.dtype:
            reads.append(shard)
            continue
        one = _widened(moment, shard, stored)
        reads += one.reads
        widened.append(one)
    return reads, widened


def _widened(moment: str, shard: Shard, stored: StoredTensor) -> Widened:
    dtype = DTYPES[stored.dtype]
    coded = dtype == CODES[moment].dtype
    if shard.data.dtype != torch.float32 or not (coded or dtype == torch.bfloat16):
        raise _other(shard.name, shard.data.dtype, stored.dtype)
    as_stored = Shard(shard.name, shard.shape, shard.slices, torch.empty(shard.data.shape, dtype=dtype))
    if not coded:
        return Widened(moment, shard, as_stored, None)
    shape, slices = in_blocks(shard.shape, shard.slices, CODE_BLOCK)
    sizes = [part.stop - part.start for part in slices]
    name = shard.name.replace(f"optimizer.{moment}.", f"optimizer.{moment}{SCALE}.", 1)
    return Widened(moment, shard, as_stored, Shard(name, shape, slices, torch.empty(sizes)))


def _other(name: str, wanted: object, stored: object) -> CheckpointError:
    return CheckpointError(
        "the checkpoint keeps the optimizer's moments in other bits than optim.state_dtype says",
        got=f"{name} stored in {stored}, wanted in {str(wanted).removeprefix('torch.')}",
        allowed="what the saved run had, or fp32, into which moments are widened",
        fix="leave optim.state_dtype as it was, or set optim.state_dtype=fp32",
    )
