"""Rematerialisation: which activations of a block are kept for backward, and which are computed again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor

from orchestrator.errors import ConfigError
from orchestrator.models.protocol import ShardableModel

RematPolicy = Literal["none", "selective", "full"]

# Matrix products and attention: nearly all of a block's time, about half of its activations' bytes.
_COSTLY = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_scaled_mm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)


def remat_function(
    policy: RematPolicy, checkpoint: Callable[..., Any] = torch_checkpoint.checkpoint
) -> Callable[..., Tensor]:
    """How a block is to run itself under `policy`: a callable `(function, *args) -> Tensor`.

    Args:
        policy: `none` keeps everything; `full` keeps a block's input; `selective` keeps the results of the
            matrix products and of attention, and computes the cheap operations again.
        checkpoint: the backend's checkpoint function; one that is not torch's is called as
            `checkpoint(function, *args)`.

    Raises:
        ConfigError: `selective` with a checkpoint function that is not torch's.
    """
    if policy == "none":
        return run_directly
    if checkpoint is not torch_checkpoint.checkpoint:
        if policy == "selective":
            raise ConfigError(
                "this backend cannot choose which activations to keep",
                got="train.remat=selective",
                allowed="none, full",
                fix="set train.remat=full",
            )
        return checkpoint
    if policy == "full":
        return partial(checkpoint, use_reentrant=False)
    contexts = partial(torch_checkpoint.create_selective_checkpoint_contexts, _costly_operations())
    return partial(checkpoint, use_reentrant=False, context_fn=contexts)


def apply_remat(
    model: ShardableModel, policy: RematPolicy, checkpoint: Callable[..., Any] = torch_checkpoint.checkpoint
) -> None:
    """Apply a rematerialisation policy to every block of the model; see `remat_function`.

    Args:
        model: before it is sharded.
        policy: what is recomputed.
        checkpoint: the function that recomputes activations.
    """
    function = remat_function(policy, checkpoint)
    if function is run_directly:
        return
    for block in model.blocks:
        # Below the block's call, where hooks are: FSDP gathers around the whole.
        block.forward = partial(function, block.forward)


def run_directly(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Call `function` without rematerialisation: keep every activation.

    Args:
        function: computes a block's output.
        args: its arguments.
    """
    return function(*args)


def _costly_operations() -> list[Any]:
    packets = [getattr(torch.ops.aten, name, None) for name in _COSTLY]
    packets.append(getattr(torch.ops.orchestrator, "ring_attention", None))  # where a strategy has registered it
    return [packet.default for packet in packets if packet is not None]
