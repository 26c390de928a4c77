"""What an optimizer here does by itself: a step that is called off, and a user's optimizer that cannot be saved."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from orchestrator.config.registry import permit
from orchestrator.config.schema import AdafactorConfig, MuonConfig, OwnOptimConfig, SGDConfig
from orchestrator.errors import ConfigError
from orchestrator.optim.muon import orthogonalize
from orchestrator.optim.steps import evaluated
from orchestrator.training.optimizer_setup import PEAK, build_optimizer

CPU = torch.device("cpu")
CONFIGS = {
    "muon": MuonConfig(ns_dtype="fp32"),
    "adafactor": AdafactorConfig(weight_decay=0.1),
    "sgd": SGDConfig(),
    "own": OwnOptimConfig("torch.optim.RAdam"),
}


class _Model(nn.Module):
    """A block with matrices and a norm, between others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, 6, bias=False)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 7, bias=False))])

    def forward(self, x):
        return self.blocks[0](self.embed(x))


@pytest.fixture(autouse=True)
def _permitted():
    permit(
        ["torch.optim.RAdam", "torch.optim.Adafactor", "torch.optim.Muon", "torch.optim.LBFGS", __name__ + ".Counts"]
    )
    permit(["tests.optim.test_units.Counts", "torch.nn.Linear"])


def _step(model, optimizer, seed, bad=None):
    batch = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
    model(batch).square().sum().backward()
    if bad:
        for parameter in model.parameters():
            parameter.grad.fill_(float("nan"))
    optimizer.found_inf = None if bad is None else torch.tensor(float(bad))
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_that_is_called_off_changes_no_bit(name):
    model = _Model()
    optimizer = build_optimizer(model, CONFIGS[name], CPU)
    twin = copy.deepcopy(model)
    other = build_optimizer(twin, CONFIGS[name], CPU)
    for seed, bad in ((1, False), (2, True), (3, False)):
        before = [parameter.clone() for parameter in model.parameters()]
        _step(model, optimizer, seed, bad)
        if not bad:
            _step(twin, other, seed)
        else:
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
        assert optimizer.state[a].keys() == other.state[b].keys()
        assert all(torch.equal(optimizer.state[a][key], other.state[b][key]) for key in optimizer.state[a])


def test_muon_is_for_the_matrices_of_the_blocks():
    model = _Model()
    optimizer = build_optimizer(model, MuonConfig(ns_dtype="fp32"), CPU)
    by_muon = [p for p in model.parameters() if "momentum_buffer" in optimizer.state[p]]
    assert [id(p) for p in by_muon] == [id(model.blocks[0][i].weight) for i in (0, 2)]
    assert [group[PEAK] for group in optimizer.param_groups] == [0.02, 3e-3, 3e-3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]


@pytest.mark.parametrize("shape", [(3, 8, 5), (3, 5, 8)])
def test_each_of_several_matrices_is_orthogonalized_by_itself(shape):
    matrices = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e3, 1e-3])[:, None, None]
    )
    settings = ((3.4445, -4.7750, 2.0315), 5, 1e-7)
    found = orthogonalize(matrices, *settings)
    for one, alone in zip(found, matrices, strict=True):
        torch.testing.assert_close(one, orthogonalize(alone, *settings), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 16), (16, 40), (16, 16)])
def test_orthogonalize_is_near_the_polar_factor(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalize(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    singular = torch.linalg.svdvals(found)
    assert singular.min() > 0.5
    assert singular.max() < 1.5
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(found.flatten(), (left @ right).flatten(), dim=0) > 0.97


class Counts(torch.optim.SGD):
    """Keeps a number that is no tensor, and one in its groups, which a checkpoint can hold."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for parameter in group["params"]:
                self.state[parameter]["count"] = 1
        return super().step(closure)


@pytest.mark.parametrize(
    ("target", "arguments", "says"),
    [
        ("torch.optim.Adafactor", {}, r"'row_var' has shape \[5, 1\] for a parameter of \[5, 3\]"),
        ("tests.optim.test_units.Counts", {}, "got: *'count' is a int\n"),
        ("torch.optim.LBFGS", {}, "cannot take a step"),
        ("torch.optim.RAdam", {"beta": 1}, "beta"),
        ("torch.nn.Linear", {}, "no optimizer"),
        ("torch.optim.RAdamm", {}, "name it yourself"),
    ],
)
def test_what_no_checkpoint_could_hold_is_refused_before_the_training(target, arguments, says):
    with pytest.raises(ConfigError, match=says):
        build_optimizer(_Model(), OwnOptimConfig(target, arguments=arguments), CPU)


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (arXiv 2405.15682) with the interface of the package `schedulefree`: counts, and switches."""

    def __init__(self, params, lr: float = 0.1, beta: float = 0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "weight_sum": 0.0, "train_mode": False})

    @torch.no_grad()
    def _move(self, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                group["train_mode"] = train
                weight = 1 - group["beta"] if train else 1 - 1 / group["beta"]
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        parameter.lerp_(self.state[parameter]["z"], weight)

    def train(self) -> None:
        self._move(True)

    def eval(self) -> None:
        self._move(False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"], "train() comes first"
            group["weight_sum"] += group["lr"] ** 2
            share = group["lr"] ** 2 / group["weight_sum"]
            for parameter in (one for one in group["params"] if one.grad is not None):
                z = self.state[parameter].setdefault("z", parameter.detach().clone())
                parameter.lerp_(z, share).add_(parameter.grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
                z.sub_(parameter.grad, alpha=group["lr"])
            group["k"] += 1


def test_what_is_counted_in_groups_is_kept_as_scalars_and_recalled():
    permit([__name__ + ".ScheduleFree", "tests.optim.test_units.ScheduleFree"])
    config = OwnOptimConfig("tests.optim.test_units.ScheduleFree", lr=0.01)
    model = _Model()
    optimizer = build_optimizer(model, config, CPU)
    optimizer.train()
    for seed in range(3):
        _step(model, optimizer, seed)
    state = optimizer.state[model.embed.weight]
    assert {key: value.item() for key, value in state.items() if not value.dim()} == {
        "group_k": 3.0,
        "group_weight_sum": pytest.approx(3e-4),
    }
    trained = model.embed.weight.detach().clone()
    twin = _Model()
    with evaluated(optimizer):
        assert not torch.equal(model.embed.weight, trained)
        other = build_optimizer(twin, config, CPU, restoring=True)
        twin.load_state_dict(model.state_dict())
        for parameter, copied in zip(model.parameters(), twin.parameters(), strict=True):
            for key, value in optimizer.state[parameter].items():
                other.state[copied][key].copy_(value)
    torch.testing.assert_close(model.embed.weight, trained)
    other.train()
    for net, one in ((model, optimizer), (twin, other)):
        _step(net, one, 7)
        assert one.param_groups[0]["k"] == 4
        assert type(one.param_groups[0]["k"]) is int
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
