"""Mixtures of experts against loops over tokens, and what their routers say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from orchestrator.config.schema import ModelConfig, MoEConfig
from orchestrator.models.decoder import Decoder
from orchestrator.models.expert_dispatch import SlotDispatch
from orchestrator.models.moe import STATISTICS, MoE, capacity_of, router_figures
from tests.models.conftest import SMALL, randomise

CASES = {
    "softmax": MoEConfig(experts=6, top_k=2),
    "not normalised": MoEConfig(experts=6, top_k=3, normalize=False, scale=1.5),
    "over the chosen": MoEConfig(experts=6, top_k=2, score="softmax_chosen", router_bias=True, expert_bias=True),
    "sigmoid in groups": MoEConfig(experts=8, top_k=3, score="sigmoid", groups=4, top_groups=2, scale=2.5, mlp_dim=24),
    "groups by their best": MoEConfig(experts=6, top_k=2, groups=3, top_groups=2),
    "shared": MoEConfig(experts=4, top_k=1, shared_mlp_dim=20, shared_gate=True),
    "offsets": MoEConfig(experts=6, top_k=2, score="sigmoid", balance_bias=True),
    "capacity": MoEConfig(experts=4, top_k=2, capacity_factor=0.75),
}


def _mixture(moe: MoEConfig) -> MoE:
    mixture = MoE(ModelConfig(**SMALL, moe=moe))
    randomise(mixture, std=0.2)
    return mixture


def _by_hand(mixture: MoE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One token after the other; returns the output and how often each expert was chosen."""
    moe, experts, router = mixture.config, mixture.experts, mixture.router
    y, load = torch.zeros_like(x), torch.zeros(moe.experts)
    for row in range(x.shape[0]):
        choices = {}
        for at in range(x.shape[1]):
            logits = router.weight @ x[row, at] + (router.bias if router.bias is not None else 0)
            scores = logits.sigmoid() if moe.score == "sigmoid" else logits.softmax(0)
            ranking = scores + (router.balance_bias if router.balance_bias is not None else 0)
            if moe.groups > 1:
                size = moe.experts // moe.groups
                best = [ranking[g * size : (g + 1) * size].sort(descending=True).values for g in range(moe.groups)]
                value = [float(one[:2].sum() if moe.score == "sigmoid" else one[0]) for one in best]
                allowed = sorted(range(moe.groups), key=lambda g: -value[g])[: moe.top_groups]
                for expert in range(moe.experts):
                    if expert // size not in allowed:
                        ranking[expert] = -math.inf
            chosen = ranking.argsort(descending=True)[: moe.top_k].tolist()
            weights = logits[chosen].softmax(0) if moe.score == "softmax_chosen" else scores[chosen]
            if moe.normalize and moe.score != "softmax_chosen":
                weights = weights / weights.sum()
            choices[at] = list(zip(chosen, weights * moe.scale, strict=True))
            load[chosen] += 1
        room = dict.fromkeys(range(moe.experts), math.inf)
        if moe.capacity_factor is not None:
            room = dict.fromkeys(room, capacity_of(moe.capacity_factor, x.shape[1], moe.top_k, moe.experts))
        for which in range(moe.top_k):
            for at, pairs in choices.items():
                expert, weight = pairs[which]
                if room[expert] > 0:
                    room[expert] -= 1
                    y[row, at] += weight * _expert(experts, expert, x[row, at])
    if mixture.shared is not None:
        y = y + mixture.shared_gate(x).sigmoid() * mixture.shared(x)
    return y, load


def _expert(experts, index: int, x: torch.Tensor) -> torch.Tensor:
    biases = [None if bias is None else bias[index] for bias in (experts.gate_bias, experts.up_bias, experts.down_bias)]
    gate, up = (
        torch.nn.functional.linear(x, m[index], b) for m, b in zip((experts.gate, experts.up), biases, strict=False)
    )
    return torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, experts.down[index], biases[2])


@pytest.mark.parametrize("name", CASES)
def test_a_mixture_is_a_loop_over_its_tokens(name):
    mixture = _mixture(CASES[name])
    x = torch.randn(2, 12, SMALL["dim"], generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours, routing = mixture(x)
        theirs, load = _by_hand(mixture, x)
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    assert torch.equal(routing.statistics[STATISTICS:], load)
    assert routing.statistics[0] == 24
    dropped = routing.statistics[2]
    assert (dropped > 0) == (name == "capacity")


def test_without_drops_capacity_changes_nothing():
    free = _mixture(MoEConfig(experts=4, top_k=2))
    bounded = _mixture(MoEConfig(experts=4, top_k=2, capacity_factor=4.0))
    x = torch.randn(1, 8, SMALL["dim"])
    assert torch.equal(free(x)[0], bounded(x)[0])
    tight = _mixture(MoEConfig(experts=4, top_k=2, capacity_factor=0.5)).eval()
    assert torch.equal(free(x)[0], tight(x)[0]), "nothing is dropped in evaluation"


def test_every_expert_has_a_gradient_also_one_that_was_not_chosen():
    mixture = _mixture(MoEConfig(experts=6, top_k=1))
    mixture(torch.randn(1, 2, SMALL["dim"]))[0].sum().backward()
    grads = [mixture.experts.gate.grad, mixture.experts.up.grad, mixture.experts.down.grad, mixture.router.weight.grad]
    assert all(grad is not None for grad in grads)
    assert int((mixture.experts.down.grad.flatten(1).abs().sum(1) > 0).sum()) <= 2


def test_the_balance_loss_is_least_where_the_load_is_even():
    moe = MoEConfig(experts=4, top_k=1, balance_loss=1.0)
    mixture = _mixture(moe)
    x = torch.randn(2, 16, SMALL["dim"])
    with torch.no_grad():
        mixture.router.weight.zero_()
        mixture.router.weight[0, 0] = 1e-4
        even = float(mixture(x)[1].loss) / 32
        mixture.router.weight[0] = 10 * x.mean((0, 1))
        mixture.router.weight[1:] = -mixture.router.weight[0]
    assert even == pytest.approx(1.0, rel=1e-3), "E times the sum of 1/E, whatever was chosen"
    assert mixture(x)[1].loss.item() / 32 > 1.0


def test_the_loss_in_training_has_the_routers_and_in_evaluation_it_has_not():
    moe = MoEConfig(experts=4, top_k=2, balance_loss=0.1, z_loss=0.01, dense_layers=1)
    model = Decoder(ModelConfig(**SMALL, moe=moe))
    randomise(model)
    tokens = torch.randint(0, 97, (2, 12))
    trained = model(tokens, targets=tokens)
    routing = model.take_routing()
    assert model.take_routing() is None
    assert routing is not None
    assert routing.shape == (2, STATISTICS + 4)
    assert torch.equal(routing[0], torch.zeros(STATISTICS + 4)), "its feed-forward is dense"
    evaluated = model.eval()(tokens, targets=tokens)
    assert model.take_routing() is None
    figures = router_figures(routing, 2)
    torch.testing.assert_close(trained - evaluated, figures["router_loss"] * 24, rtol=1e-4, atol=1e-4)
    assert 0 < float(figures["router_entropy"]) <= math.log(4)
    assert 1 <= float(figures["expert_load_max"]) <= 4
    assert float(figures["dropped"]) == 0


def test_offsets_move_against_the_load_and_not_after_a_bad_step():
    moe = MoEConfig(experts=4, top_k=2, balance_bias=True, balance_bias_rate=0.25)
    model = Decoder(ModelConfig(**{**SMALL, "layers": 1}, moe=moe))
    randomise(model)
    bias = model.blocks[0].mlp.router.balance_bias
    with torch.no_grad():
        bias.zero_()
    routing = torch.tensor([[8.0, 0, 0, 0, 8, 4, 4, 0]])
    model.balance_experts(routing, torch.tensor(True))
    assert bias.tolist() == [0, 0, 0, 0]
    model.balance_experts(routing, torch.tensor(False))
    assert bias.tolist() == [-0.25, 0, 0, 0.25]


def test_recomputation_counts_a_token_once():
    from orchestrator.models.remat import apply_remat

    moe = MoEConfig(experts=4, top_k=2, balance_loss=0.1)
    config = ModelConfig(**SMALL, moe=moe)
    tokens = torch.randint(0, 97, (2, 12))
    results = []
    for policy in ("none", "full", "selective"):
        model = Decoder(replace(config))
        randomise(model)
        apply_remat(model, policy)
        loss = model(tokens, targets=tokens)
        loss.backward()
        results.append((loss.detach(), model.take_routing(), model.blocks[0].mlp.router.weight.grad))
    for loss, routing, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(routing, results[0][1])
        assert torch.equal(grad, results[0][2])


@pytest.mark.parametrize("name", CASES)
def test_slots_give_what_sorted_rows_give(name):
    mixture = _mixture(CASES[name])
    x = torch.randn(2, 12, SMALL["dim"], generator=torch.Generator().manual_seed(3))
    results = []
    for dispatch in (mixture.experts.dispatch, SlotDispatch()):
        mixture.experts.dispatch = dispatch
        mixture.zero_grad()
        rows = x.clone().requires_grad_()
        y, _ = mixture(rows)
        y.square().sum().backward()
        results.append((y.detach(), rows.grad, mixture.experts.down.grad, mixture.router.weight.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
