"""Which modules of a model FSDP2 gathers as one, over which mesh and in which precision."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from orchestrator.models.protocol import ShardableModel, mixtures
from orchestrator.sharding.layout import Layout
from orchestrator.strategies.module_sharding import fsdp_modules

_EXPERT_DIM = 1  # of [E, out, in]: there may be fewer experts than ranks


def fully_shard_model(
    model: ShardableModel,
    mesh: DeviceMesh,
    expert_mesh: DeviceMesh,
    dtype: torch.dtype,
    whole: Collection[str],
    reshard: bool = True,
) -> None:
    """Shard each block, the embedding, the head, and what remains; experts and routers by themselves.

    Args:
        model: on the meta device.
        mesh: to shard over, and to replicate over where it has two dims.
        expert_mesh: likewise, for experts.
        dtype: of the matrix products. Routers stay in fp32.
        whole: names of parameters of which every rank keeps a whole copy.
        reshard: let units go between their forward and their backward pass.
    """
    policy = _policy(dtype)
    ignored = {parameter for name, parameter in model.named_parameters() if name in whole}
    # The head is used last forward and first backward, so it stays gathered in between. An untied embedding
    # need not stay with it.
    units: list[tuple[nn.Module, bool]] = [(block, reshard) for block in model.blocks]
    if not model.config.tied_embeddings:
        units += [(model.embed, reshard), (model.head, False)]
    for _, mixture in mixtures(model):
        fully_shard(
            mixture.experts,
            mesh=expert_mesh,
            mp_policy=policy,
            reshard_after_forward=reshard,
            shard_placement_fn=lambda parameter: Shard(_EXPERT_DIM),
        )
        if dtype != torch.float32:
            fully_shard(
                mixture.router,
                mesh=mesh,
                mp_policy=_policy(torch.float32),
                reshard_after_forward=reshard,
                ignored_params=ignored,
            )
    for module, between in units:
        if any(True for _ in module.parameters()):  # of a pipeline another rank may have it
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=between, ignored_params=ignored)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=ignored)


def divide_gradients(model: nn.Module, by: int) -> None:
    """Let FSDP2 divide the sums of gradients.

    Args:
        model: sharded.
        by: what they are divided by.
    """
    for module in fsdp_modules(model):
        # Without the second line a factor asks for a reduction that only NCCL has.
        module.set_gradient_divide_factor(float(by))
        module.set_force_sum_reduction_for_comms(True)


def make_expert_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """Return the mesh on which experts are sharded: as the other one, with the expert axis out of `shard`.

    Args:
        layout: of the job.
        device_type: of its devices.
    """
    ranks = torch.arange(layout.devices).reshape(list(layout.as_dict().values()))
    # replicate, pipeline, expert, fsdp and context as `shard`, tensor
    ranks = ranks.permute(0, 1, 3, 2, 4, 5).reshape(
        layout.replicate, layout.pipeline, layout.expert, layout.expert_shards, layout.tensor
    )
    return DeviceMesh(device_type, ranks, mesh_dim_names=("replicate", "pipeline", "expert", "shard", "tensor"))


def _policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
