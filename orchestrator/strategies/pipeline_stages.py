"""The part of a model that a rank of a pipeline has: everything else is taken out, and names stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from orchestrator.errors import LayoutError
from orchestrator.models.protocol import ShardableModel
from orchestrator.sharding.layout import Layout
from orchestrator.sharding.pipeline import Stage, rank_of_stage, stages_of


class Absent(nn.Module):
    """Stands where another rank of the pipeline has a part of the model, so that names and numbers stay."""

    def forward(self, *args: object) -> None:
        """Refuse."""
        raise RuntimeError("this part of the model is on another rank of the pipeline")


def check_parts(model: ShardableModel) -> None:
    """See that the forward pass of `model` can be run in parts.

    Raises:
        LayoutError: it lacks one of them.
    """
    for name in ("begin", "through", "end"):
        if getattr(type(model), name) is getattr(ShardableModel, name):
            raise LayoutError(
                "the model's forward pass cannot be divided over a pipeline",
                got=f"{type(model).__name__} has no `{name}`",
                allowed="models with begin, through and end, as orchestrator.models.protocol describes them",
                fix="write them, or set layout.pipeline=1",
            )


def keep_own_stages(model: ShardableModel, layout: Layout, rank: int) -> list[Stage]:
    """Take the stages of other ranks out of `model`, in place, and return those of this one.

    Args:
        model: on the meta device.
        layout: of the job.
        rank: this process.

    Raises:
        LayoutError: the model cannot be divided so.
    """
    stages = stages_of(layout, len(model.blocks))
    if layout.pipeline == 1:
        return stages
    check_parts(model)
    me = layout.coordinates(rank)["pipeline"]
    mine = [stage for stage in stages if rank_of_stage(layout, stage.index) == me]
    keep_stages(model, mine)
    return mine


def keep_stages(model: ShardableModel, stages: Sequence[Stage]) -> None:
    """Take out of `model`, in place, what is not in `stages`.

    A tied embedding stays where the head is, too.

    Args:
        model: on the meta device.
        stages: of this rank.
    """
    first, last = any(stage.first for stage in stages), any(stage.last for stage in stages)
    kept = {number for stage in stages for number in stage.layers}
    blocks = list(model.blocks)
    inside = {id(module) for block in blocks for module in block.modules()}
    end = {id(module) for part in (model.norm, model.head) for module in part.modules()}
    for number, block in enumerate(blocks):
        if number not in kept:
            _take_out(model, block)
    if not last:
        _take_out(model, model.norm)
        del model.head.weight  # its `ops` stay: others set them
    if not first:
        for module in [module for module in model.modules() if id(module) not in inside | end]:
            if last and model.config.tied_embeddings and module is model.embed:
                continue
            for name, parameter in list(module.named_parameters(recurse=False)):
                if module is model:
                    setattr(model, name, None)
                elif parameter is not None:
                    _take_out(model, module)
                    break


def present_blocks(model: ShardableModel) -> list[nn.Module]:
    """List the blocks of `model` that this rank has."""
    return [block for block in model.blocks if not isinstance(block, Absent)]


def _take_out(model: ShardableModel, part: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child is part:
                setattr(module, name, Absent())
