"""Which modules of a model FSDP2 gathers as one, over which mesh and in which precision."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from orchestrator.models.protocol import ShardableModel, mixtures

_EXPERT_DIM = 1  # of [E, out, in]: there may be fewer experts than ranks


def fully_shard_model(
    model: ShardableModel,
    mesh: DeviceMesh,
    expert_mesh: DeviceMesh,
    dtype: torch.dtype,
    whole: Collection[str],
) -> None:
    """Shard each block, the embedding, the head, and what remains; experts and routers by themselves.

    Args:
        model: on the meta device.
        mesh: to shard over, and to replicate over where it has two dims.
        expert_mesh: likewise, for experts.
        dtype: of the matrix products. Routers stay in fp32.
        whole: names of parameters of which every rank keeps a whole copy.
    """
    policy = _policy(dtype)
    ignored = {model.get_parameter(name) for name in whole}
    # The head is used last forward and first backward, so it stays gathered in between. An untied embedding
    # need not stay with it.
    units: list[tuple[nn.Module, bool]] = [(block, True) for block in model.blocks]
    if not model.config.tied_embeddings:
        units += [(model.embed, True), (model.head, False)]
    for _, mixture in mixtures(model):
        fully_shard(
            mixture.experts, mesh=expert_mesh, mp_policy=policy, shard_placement_fn=lambda parameter: Shard(_EXPERT_DIM)
        )
        if dtype != torch.float32:
            fully_shard(mixture.router, mesh=mesh, mp_policy=_policy(torch.float32), ignored_params=ignored)
    for module, reshard in units:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, ignored_params=ignored)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=ignored)


def _policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
