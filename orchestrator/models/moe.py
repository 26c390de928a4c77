"""Mixtures of experts: a router, the experts, and a feed-forward beside them that every token takes.

Single-device code. What depends on how tokens and experts are divided over devices is the `dispatch` of the experts and
the `sequence` of the mixture, which strategies replace; `models.expert_dispatch` has those of one device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.config.schema import ModelConfig
from orchestrator.models.expert_dispatch import (
    Assignment,
    Dispatch,
    SortedDispatch,
    WholeSequence,
    grouped_linear,
    unchanged,
)
from orchestrator.models.feed_forward import GATES, GatedFeedForward

TOKENS, ENTROPY, DROPPED, LOSS, STATISTICS = range(5)
"""Sums in `Routing.statistics`, by position; each expert's load comes from `STATISTICS` on."""


class Routing(NamedTuple):
    """What a router has done with a batch.

    Attributes:
        loss: scalar fp32: balance loss and z-loss, summed over the tokens as the cross-entropy is.
        statistics: [STATISTICS + E] fp32 without gradient, sums that add up over micro-batches and ranks: tokens, the
            entropy in nats of each token's probabilities, choices that were dropped, the loss, and each expert's load:
            how often it was chosen.
    """

    loss: Tensor
    statistics: Tensor


class Router(nn.Module):
    """Scores every expert for every token, in fp32 whatever the precision is.

    Args:
        config: of the model.

    Attributes:
        weight: [E, D].
        bias: [E], or None.
        balance_bias: [E] without gradient, or None: added to the scores for the choice alone.
        copied: what a strategy wraps around parameters of which several ranks hold copies, for each a part of the
            gradient.
    """

    keeps_fp32 = True
    bias: nn.Parameter | None
    balance_bias: nn.Parameter | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        moe = config.moe
        self.weight = nn.Parameter(torch.empty(moe.experts, config.dim))
        self.bias = nn.Parameter(torch.empty(moe.experts)) if moe.router_bias else None
        fixed = nn.Parameter(torch.empty(moe.experts), requires_grad=False)
        self.balance_bias = fixed if moe.balance_bias else None
        self.copied: Callable[[Tensor], Tensor] = unchanged

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [B, T, D] to logits [B, T, E] in fp32."""
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.copied(self.bias).float()
            return F.linear(x.float(), self.copied(self.weight).float(), bias)


class Experts(nn.Module):
    """The matrices of all experts, each a gated feed-forward, stacked in dim 0.

    Args:
        config: of the model.

    Attributes:
        gate, up: [E, F, D], to the inner width F.
        down: [E, D, F].
        gate_bias, up_bias: [E, F], or None.
        down_bias: [E, D], or None.
        dispatch: brings tokens to experts and back; a strategy that divides experts replaces it.
        product: of rows that are sorted by expert with its matrices; another precision replaces it.
        copied: as a router's.
        summands: ranks whose results add up to an expert's, each with a part of the inner width.
    """

    gate_bias: nn.Parameter | None
    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None
    dispatch: Dispatch

    def __init__(self, config: ModelConfig):
        super().__init__()
        moe, dim, width = config.moe, config.dim, config.moe.width(config)
        self.gate = nn.Parameter(torch.empty(moe.experts, width, dim))
        self.up = nn.Parameter(torch.empty(moe.experts, width, dim))
        self.down = nn.Parameter(torch.empty(moe.experts, dim, width))
        for name, size in (("gate_bias", width), ("up_bias", width), ("down_bias", dim)):
            setattr(self, name, nn.Parameter(torch.empty(moe.experts, size)) if moe.expert_bias else None)
        self.activation = GATES[config.activation]
        self.dispatch = SortedDispatch()
        self.product = grouped_linear
        self.copied: Callable[[Tensor], Tensor] = unchanged
        self.summands = 1

    def forward(self, x: Tensor, assignment: Assignment) -> Tensor:
        """Map `x` [B, T, D] to the weighted sum of what each token's experts say, [B, T, D].

        Args:
            x: hidden states.
            assignment: of tokens to experts.
        """
        return self.dispatch(self, x, assignment)

    @property
    def output_bias(self) -> Tensor | None:
        """This rank's summand of `down_bias`."""
        return None if self.down_bias is None else self.copied(self.down_bias) / self.summands

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Combine the two products of an expert.

        Args:
            gate: [..., F].
            up: [..., F].
        """
        return self.activation(gate, up)


class MoE(nn.Module):
    """A mixture of experts, in the place of a block's feed-forward.

    Args:
        config: of the model.

    Attributes:
        sequence: how a sequence is divided over ranks; a strategy that does so replaces it.
        loss_share: part of the router's losses whose gradient this rank takes; ranks that hold the same tokens take
            equal parts of it.
    """

    shared: GatedFeedForward | None
    shared_gate: nn.Linear | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config.moe
        self.router = Router(config)
        self.experts = Experts(config)
        width = config.moe.shared_mlp_dim
        self.shared = GatedFeedForward(config, width) if width else None
        self.shared_gate = nn.Linear(config.dim, 1, bias=False) if config.moe.shared_gate else None
        self.sequence = WholeSequence()
        self.loss_share = 1.0

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Map `x` [B, T, D] to [B, T, D].

        Args:
            x: hidden states.

        Returns:
            The experts' output, and what the router did.
        """
        logits = self.router(x)
        probabilities, weights, chosen = self._choose(logits)
        assignment = self._assign(weights, chosen)
        y = self.experts(x, assignment)
        if self.shared is not None:
            every = self.shared(x)
            if self.shared_gate is not None:
                every = torch.sigmoid(F.linear(x, self.router.copied(self.shared_gate.weight))) * every
            y = y + every
        return y, self._routing(logits, probabilities, assignment)

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose each token's experts.

        Args:
            logits: [B, T, E].

        Returns:
            Probabilities of all experts [B, T, E], adding up to one; weights [B, T, k] of the chosen ones; and their
            numbers [B, T, k].

        Source: the choice in groups and the sigmoid scores are those of DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
        """
        moe = self.config
        scores = logits.sigmoid() if moe.score == "sigmoid" else logits.softmax(-1)
        ranking = logits if moe.score == "softmax_chosen" else scores
        if self.router.balance_bias is not None:
            ranking = ranking + self.router.balance_bias
        if moe.groups > 1:
            ranking = self._best_groups(ranking)
        chosen = ranking.topk(moe.top_k, -1).indices
        if moe.score == "softmax_chosen":
            weights = logits.gather(-1, chosen).softmax(-1)
        else:
            weights = scores.gather(-1, chosen)
            if moe.normalize:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        probabilities = scores / scores.sum(-1, keepdim=True) if moe.score == "sigmoid" else scores
        return probabilities, weights * moe.scale, chosen

    def _best_groups(self, ranking: Tensor) -> Tensor:
        """Take the experts out of the ranking whose group is not among the token's best."""
        moe = self.config
        grouped = ranking.unflatten(-1, (moe.groups, -1))
        best = (
            grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1) if moe.score == "sigmoid" else grouped.amax(-1)
        )
        kept = torch.zeros_like(best).scatter(-1, best.topk(moe.top_groups, -1).indices, 1.0).bool()
        return torch.where(kept.unsqueeze(-1), grouped, float("-inf")).flatten(-2)

    def _assign(self, weights: Tensor, chosen: Tensor) -> Assignment:
        """Let experts drop what is beyond their capacity, in training; without one, they take all.

        A choice is taken before all second choices of its sequence, and before the same choice of later tokens.
        Source: GShard, arXiv 2006.16668, section 2.2; its groups are sequences here, whatever the layout.
        """
        moe = self.config
        if moe.capacity_factor is None or not self.training:
            return Assignment(weights, chosen, moe.experts)
        one_hot = F.one_hot(chosen, moe.experts).transpose(1, 2)  # [B, k, T, E]
        here = one_hot.sum(2)
        whole, before = self.sequence.sum(here), self.sequence.before(one_hot)
        # Choices ahead of each: the earlier rank of choice over the whole sequence, then the earlier tokens.
        ahead = (whole.cumsum(1) - whole).unsqueeze(2) + before
        place = (ahead * one_hot).sum(-1).transpose(1, 2)
        capacity = capacity_of(moe.capacity_factor, chosen.shape[1] * self.sequence.parts, moe.top_k, moe.experts)
        kept = place < capacity
        return Assignment(weights * kept, chosen, moe.experts, kept, place, capacity)

    def _routing(self, logits: Tensor, probabilities: Tensor, assignment: Assignment) -> Routing:
        moe = self.config
        one_hot = F.one_hot(assignment.chosen, moe.experts).sum(2).float()  # [B, T, E]
        loss = logits.new_zeros(())
        if moe.balance_loss:
            length = one_hot.shape[1] * self.sequence.parts
            share = self.sequence.sum(one_hot.sum(1)) * (moe.experts / (moe.top_k * length))
            # T times DeepSeek-V3's sequence-wise loss (equation 17): a sum over tokens, as the cross-entropy is.
            loss = loss + moe.balance_loss * (share * probabilities.sum(1)).sum()
        if moe.z_loss:
            loss = loss + moe.z_loss * logits.logsumexp(-1).square().sum()
        if self.loss_share != 1.0:
            loss = loss * self.loss_share + (loss * (1.0 - self.loss_share)).detach()
        with torch.no_grad():
            dropped = loss.new_zeros(()) if assignment.kept is None else (~assignment.kept).sum().float()
            entropy = -(probabilities * probabilities.clamp(min=1e-20).log()).sum()
            tokens = torch.full_like(entropy, one_hot.shape[0] * one_hot.shape[1])
            sums = torch.cat((torch.stack((tokens, entropy, dropped, loss)), one_hot.sum((0, 1))))
        return Routing(loss, sums.detach())


def router_figures(routing: Tensor, top_k: int) -> dict[str, Tensor]:
    """Return what a step's metrics say of the routers.

    Args:
        routing: [layers, ...], statistics summed over the step's tokens; zeros for layers without experts.
        top_k: experts of a token.

    Returns:
        Scalars: `router_loss`, balance loss and z-loss per token; `expert_load_max`, the largest load of an expert
        over the mean of its layer's; `router_entropy`, nats, the mean over tokens and layers; and `dropped`, the part
        of the choices that experts dropped.
    """
    tokens = routing[:, TOKENS].sum().clamp(min=1.0)
    load = routing[:, STATISTICS:]
    mean = load.mean(1, keepdim=True).clamp(min=1e-9)
    return {
        "router_loss": routing[:, LOSS].sum() / routing[:, TOKENS].amax(0).clamp(min=1.0),
        # With dims: torch_xla's amax() without them reduces nothing.
        "expert_load_max": (load / mean).flatten().amax(0),
        "router_entropy": routing[:, ENTROPY].sum() / tokens,
        "dropped": routing[:, DROPPED].sum() / (tokens * top_k),
    }


def capacity_of(factor: float, length: int, top_k: int, experts: int) -> int:
    """Return how many tokens of a sequence an expert takes.

    Args:
        factor: of the even share.
        length: tokens of the sequence.
        top_k: experts of a token.
        experts: that there are.
    """
    return min(length, max(1, int(-(-factor * length * top_k // experts))))
