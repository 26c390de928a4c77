"""Mixtures of experts over several ranks of the torch-native strategy.

Over the `expert` axis each rank holds some experts whole, and tokens travel to them and back by two all-to-alls. Over
the `tensor` axis each rank holds a part of every expert's inner width, sees the whole sequence, and gives one summand.
Parameters of a mixture are plain tensors of this rank's part, which FSDP2 then cuts on a mesh of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn

from orchestrator.models.expert_dispatch import SortedDispatch, WholeSequence, grouped_feed_forward
from orchestrator.models.moe import MoE, Routing
from orchestrator.models.protocol import ShardableModel, mixtures
from orchestrator.sharding.layout import Layout
from orchestrator.sharding.rules import Placement
from orchestrator.strategies.sequence_order import SequenceOrder, SequenceParts

_SEQUENCE_DIM = 1  # of the residual stream [B, T, D]
_TOKENS = 2  # dim of counts [B, k, T, E]


def parallelize_experts(
    model: ShardableModel,
    placements: Mapping[str, Placement],
    layout: Layout,
    expert_group: dist.ProcessGroup | None,
    tensor_group: dist.ProcessGroup | None,
    context_group: dist.ProcessGroup | None,
) -> None:
    """Divide the mixtures of `model` over the expert and tensor axes.

    Args:
        model: on the meta device.
        placements: of its parameters.
        layout: degrees of the mesh axes.
        expert_group: ranks among which experts are divided; None: one has all.
        tensor_group: ranks among which each expert's inner width is divided; None: one has the whole.
        context_group: ranks that have parts of the same sequences; None: one has them whole.
    """
    for path, mixture in mixtures(model):
        _keep_parts(path, mixture, placements, layout)
        if expert_group is not None:
            mixture.experts.dispatch = AllToAllDispatch(expert_group)
        if tensor_group is not None:
            _divide_width(mixture, tensor_group)
        if context_group is not None:
            mixture.sequence = DividedSequence(context_group, SequenceOrder.of(layout))


def _keep_parts(path: str, mixture: MoE, placements: Mapping[str, Placement], layout: Layout) -> None:
    """Replace parameters by this rank's parts along expert and tensor, on the meta device."""
    for name, parameter in list(mixture.named_parameters()):
        placement, shape = placements[f"{path}.{name}"], list(parameter.shape)
        for dim, degree in ((placement.expert_dim, layout.expert), (placement.tensor_dim, layout.tensor)):
            if dim is not None:
                shape[dim] //= degree  # whole: see `sharding.layout.check_layout`
        owner, _, leaf = name.rpartition(".")
        part = nn.Parameter(parameter.new_empty(shape), requires_grad=parameter.requires_grad)
        setattr(mixture.get_submodule(owner), leaf, part)


def _divide_width(mixture: MoE, group: dist.ProcessGroup) -> None:
    size = dist.get_world_size(group)

    def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # Backward adds up the ranks' gradients, each of which is of its summand alone.
        part = args[0].contiguous()
        return (funcol.wait_tensor(funcol.all_gather_single_autograd(part, _SEQUENCE_DIM, group)), *args[1:])

    def scatter(module: nn.Module, args: Any, output: tuple[Tensor, Routing]) -> tuple[Tensor, Routing]:
        summand, routing = output
        summed = funcol.reduce_scatter_single_autograd(summand.contiguous(), "sum", _SEQUENCE_DIM, group)
        return funcol.wait_tensor(summed), routing

    mixture.register_forward_pre_hook(gather)
    mixture.register_forward_hook(scatter)
    mixture.router.copied = mixture.experts.copied = _summing_gradients(group)
    mixture.experts.summands = size
    # The ranks route the same tokens, so each has the whole loss.
    mixture.loss_share = 1.0 / size


class AllToAllDispatch(SortedDispatch):
    """Sends rows to the ranks that have their experts, and the answers back.

    Args:
        group: ranks among which experts are divided, in order.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._group, self._size = group, dist.get_world_size(group)

    def compute(self, experts: Any, rows: Tensor, counts: Tensor) -> Tensor:
        """Let the experts of all ranks answer; as `SortedDispatch.compute`, with counts of all experts."""
        sent = counts.view(self._size, -1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent.contiguous(), group=self._group)
        # One read for both: the host has to know the sizes of what it sends and receives.
        sizes = torch.stack((sent.sum(1), received.sum(1))).tolist()
        arrived = self._exchange(rows, sizes[0], sizes[1])
        # From (source, expert) to (expert, source), so that each expert's rows lie together.
        experts_here = torch.arange(sent.shape[1], device=rows.device).repeat(self._size)
        order = experts_here.repeat_interleave(received.flatten()).argsort(stable=True)
        answers = grouped_feed_forward(experts, arrived.index_select(0, order), received.sum(0))
        back = torch.empty_like(order).index_copy(0, order, torch.arange(order.numel(), device=order.device))
        return self._exchange(answers.index_select(0, back), sizes[1], sizes[0])

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        moved = funcol.all_to_all_single_autograd(rows.contiguous(), received, sent, self._group)
        return funcol.wait_tensor(moved)


class DividedSequence(WholeSequence):
    """A sequence of which each rank of a group has chunks.

    Args:
        group: these ranks.
        order: which chunks each of them has.
    """

    def __init__(self, group: dist.ProcessGroup, order: SequenceOrder):
        self.parts = order.ranks
        self._chunks = SequenceParts(order, group)

    def sum(self, counts: Tensor) -> Tensor:
        """Add up over the ranks of a sequence; no gradient."""
        return self._chunks.sum(counts.detach())

    def before(self, counts: Tensor) -> Tensor:
        """Return, for each token, the sum over the earlier tokens of its sequence, also on other ranks."""
        chunks = self._chunks.split(counts, _TOKENS)
        earlier = self._chunks.before(chunks.sum(_TOKENS + 1)).unsqueeze(_TOKENS + 1)
        return self._chunks.join(earlier + chunks.cumsum(_TOKENS + 1) - chunks, _TOKENS)


def _summing_gradients(group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    def copied(parameter: Tensor) -> Tensor:
        summed: Tensor = _SumGradients.apply(parameter, group)
        return summed

    return copied


class _SumGradients(torch.autograd.Function):
    """The identity; backward adds the gradients of the group's ranks."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        gradient = upstream[0].contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None
