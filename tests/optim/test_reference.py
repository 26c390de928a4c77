"""One process of the product against a loop of a few lines with torch's own optimizers, driven directly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orchestrator.config.schema import RunConfig
from orchestrator.data.prepare import prepare
from orchestrator.data.stream import Position, StepLoader, TokenStream
from orchestrator.models.decoder import Decoder
from orchestrator.models.init import draw_slice
from orchestrator.optim.schedule import learning_rate
from orchestrator.training.check import resolve_model
from tests.lab.runs import losses, small_config, train

RELATIVE = 1e-5
Pairs = list[tuple[torch.optim.Optimizer, float]]


def _plain_loop(config: RunConfig, make) -> list[float]:
    """Losses of plain tensors; `make(model)` gives optimizers and the peak rate of each."""
    data = prepare(config.data, progress=False)
    model = Decoder(resolve_model(config.model, data.vocab_size))
    for name, init in model.initializers().items():
        parameter = model.get_parameter(name)
        whole = tuple(slice(0, size) for size in parameter.shape)
        parameter.data.copy_(draw_slice(init, name, config.seed, tuple(parameter.shape), whole))
    pairs: Pairs = make(model)
    stream = TokenStream(data.stores, data.weights, "train", config.train.seq_len, config.seed)
    found, steps = [], config.train.max_steps
    for step, batch in enumerate(StepLoader(stream, 8, 0, 1, Position(), steps)):
        tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
        loss = model(**tensors) / (tensors["targets"] != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in pairs:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak, config.optim.schedule)
            optimizer.step()
            optimizer.zero_grad()
        found.append(loss.item())
    return found


def _decayed(parameters, weight_decay: float) -> list[dict]:
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def _muon(model: Decoder) -> Pairs:
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    adamw = torch.optim.AdamW(_decayed(rest, 0.05), lr=2e-3, betas=(0.9, 0.95), eps=1e-8)
    return [(torch.optim.Muon(matrices, lr=0.02, weight_decay=0.2, momentum=0.9), 0.02), (adamw, 2e-3)]


def _adafactor(model: Decoder) -> Pairs:
    return [(torch.optim.Adafactor(_decayed(model.parameters(), 0.1), lr=0.05), 0.05)]


def _sgd(model: Decoder) -> Pairs:
    groups = _decayed(model.parameters(), 1e-3)
    return [(torch.optim.SGD(groups, lr=0.2, momentum=0.8, nesterov=True), 0.2)]


def _radam(model: Decoder) -> Pairs:
    return [(torch.optim.RAdam(model.parameters(), lr=2e-3, betas=(0.8, 0.9)), 2e-3)]


CASES = {
    "muon": (
        [
            "optim=muon",
            "optim.weight_decay=0.2",
            "optim.momentum=0.9",
            "optim.adamw.lr=2e-3",
            "optim.adamw.weight_decay=0.05",
        ],
        _muon,
    ),
    "adafactor": (["optim=adafactor", "optim.lr=0.05", "optim.weight_decay=0.1"], _adafactor),
    "sgd": (
        ["optim=sgd", "optim.lr=0.2", "optim.momentum=0.8", "optim.nesterov=true", "optim.weight_decay=1e-3"],
        _sgd,
    ),
    "own": (["optim._target_=torch.optim.RAdam", "optim.lr=2e-3", "optim.arguments.betas=[0.8,0.9]"], _radam),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_torchs_own(tmp_path, monkeypatch, name):
    words, make = CASES[name]
    config = small_config(tmp_path, *words, "checkpoint.every_steps=null", "checkpoint.at_end=false")
    ours = losses(train(config, 1, tmp_path / "run"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rough = _plain_loop(config, make) if name == "muon" else []
    # torch's Muon iterates in bf16; on a CPU ours does in fp32. So it does here, by a copy that it may change.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.float().clone())
    expected = _plain_loop(config, make)
    torch.set_num_threads(threads)
    assert len(ours) == 20
    assert ours[-1] < ours[0] - 0.2, "it learns"
    np.testing.assert_allclose(ours, expected, rtol=RELATIVE)
    if rough:
        np.testing.assert_allclose(ours, rough, rtol=1e-2)
        assert np.abs(np.array(rough) / expected - 1).max() > RELATIVE, "bf16 and fp32 can be told apart"
