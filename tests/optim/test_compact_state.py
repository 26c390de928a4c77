"""Optimizer states in fewer bits: the rounding by itself, the steps, and the codes on every layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.consistency import contradictions
from orchestrator.config.convert import to_dict
from orchestrator.config.schema import AdamWConfig
from orchestrator.constants import CODE_BLOCK
from orchestrator.errors import CheckpointError
from orchestrator.optim.rounding import CODES, draw_bits, to_bf16
from orchestrator.training.optimizer_setup import build_optimizer
from tests.lab.ranks import run_ranks
from tests.lab.runs import checkpoint, losses, read_rows, small_config, train
from tests.lab.slow import cases
from tests.lab.tensors import read_all
from tests.strategies.test_conformance import _load_and_save

CPU = torch.device("cpu")


def _bits(shape, key: int = 7, step: float = 3.0) -> torch.Tensor:
    return draw_bits(key, torch.tensor(step), (0,) * len(shape), shape, shape)


def test_a_part_draws_what_the_whole_draws_there():
    whole = _bits((6, 8, 10))
    part = draw_bits(7, torch.tensor(3.0), (2, 0, 5), (3, 8, 5), (6, 8, 10))
    assert torch.equal(part, whole[2:5, :, 5:])


def test_bits_are_even_and_depend_on_key_and_step():
    bits = _bits((512, 512))
    assert int(bits.min()) >= 0
    assert int(bits.max()) < 1 << 32
    for shift in range(32):
        assert abs(((bits >> shift) & 1).double().mean() - 0.5) < 5e-3, shift
    for other in (_bits((512, 512), key=8), _bits((512, 512), step=4.0), bits.roll(1, 1), bits.roll(1, 0)):
        same = ((bits ^ other) & 0xFF == 0).double().mean()
        assert abs(same - 1 / 256) < 1e-3


def test_rounding_to_bf16_keeps_the_mean():
    x = torch.tensor([1.0, 1.001, -1.002, 3.14159, -1e-20, 0.0]).repeat(1 << 16, 1)
    rounded = to_bf16(x, _bits(x.shape) & 0xFFFF).float()
    for column, exact in zip(rounded.T, x[0], strict=True):
        assert len(column.unique()) == (1 if exact in (0.0, 1.0) else 2)
        np.testing.assert_allclose(column.double().mean(), exact, rtol=1e-4)


@pytest.mark.parametrize("moment", CODES)
def test_codes_keep_the_mean_and_the_largest_of_a_block(moment):
    code = CODES[moment]
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(1, 2 * CODE_BLOCK, generator=generator) * torch.logspace(-6, 0, 2 * CODE_BLOCK)
    one = one if code.dtype == torch.int8 else one.square()
    x = one.repeat(1 << 13, 1)
    codes, scales = code.encode(x, _bits(x.shape) & 0xFFFF)
    assert (codes.dtype, codes.shape, scales.shape) == (code.dtype, x.shape, (len(x), 2))
    found = code.decode(codes, scales)
    assert torch.equal(found.abs().unflatten(-1, (-1, CODE_BLOCK)).amax(-1), scales)
    error = (found.double().mean(0) - one[0]).abs() / scales[0].repeat_interleave(CODE_BLOCK)
    assert error.max() < 3e-4
    assert torch.equal(
        code.decode(*code.encode(torch.zeros(1, CODE_BLOCK), _bits((1, CODE_BLOCK)) & 0xFFFF)),
        torch.zeros(1, CODE_BLOCK),
    )
    if code.dtype == torch.uint8:
        assert (found[one.expand_as(found) > 0] > 0).all(), "a root of it is divided by"


@pytest.mark.parametrize("kept", ["bf16", "int8"])
def test_steps_follow_those_of_torch(kept):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 64))

    ours, theirs = make(), make()
    compact = build_optimizer(ours, AdamWConfig(lr=1e-2, state_dtype=kept), CPU)
    plain = build_optimizer(theirs, AdamWConfig(lr=1e-2), CPU)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(256, 64, generator=generator), torch.randn(256, 64, generator=generator)
    found = []
    for model, optimizer in ((ours, compact), (theirs, plain)):
        for _ in range(40):
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(loss.item())
    assert found[0] == pytest.approx(found[1], rel=0.02)
    # Vectors are as in torch, but for what the matrices did to their gradients.
    assert compact.state[ours[1].weight]["exp_avg"].dtype == torch.float32
    dtypes = {key: value.dtype for key, value in compact.state[ours[0].weight].items()}
    assert dtypes["exp_avg"] == {"bf16": torch.bfloat16, "int8": torch.int8}[kept]


def test_a_step_that_is_called_off_changes_no_bit():
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    optimizer = build_optimizer(model, AdamWConfig(state_dtype="int8"), CPU)
    for flag in (0.0, 1.0):
        model(torch.randn(4, 64)).square().sum().backward()
        before = [model.weight.detach().clone(), *(value.clone() for value in optimizer.state[model.weight].values())]
        if flag:
            model.weight.grad.fill_(float("nan"))
        optimizer.found_inf = torch.tensor(flag)
        optimizer.step()
        after = [model.weight.detach(), *optimizer.state[model.weight].values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) == bool(flag)


# Wide enough that tensor 2 cuts whole blocks; the head's dims are those of the vocabulary.
WORDS = (
    *("model.dim=128", "model.mlp_dim=128", "model.layers=1", "model.kv_heads=4"),
    *("train.max_steps=8", "checkpoint.every_steps=4", "train.eval_tokens=128", "train.sample.tokens=0"),
)
LAYOUTS = {
    "fsdp2_tensor2": (["layout.fsdp=2", "layout.tensor=2"], 4),
    "fsdp3": (["layout.fsdp=3", "resume_allow=[batch]", "train.global_batch_tokens=384"], 3),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    tmp: Path = tmp_path_factory.mktemp("compact")
    done: dict[tuple, Path] = {}

    def run(kept: str, layout: str | None = None) -> Path:
        words, size = LAYOUTS[layout] if layout else ([], 1)
        if (kept, layout) not in done:
            done[kept, layout] = tmp / f"{kept}-{layout}"
            train(small_config(tmp, *WORDS, f"optim.state_dtype={kept}", *words), size, done[kept, layout])
        return done[kept, layout]

    run.tmp = tmp
    return run


@pytest.mark.parametrize(("kept", "rtol"), cases([("bf16", 2e-3), ("int8", 1e-2)], quick=[("int8", 1e-2)]))
def test_losses_are_near_those_of_fp32_and_the_same_on_every_layout(runs, kept, rtol):
    ours, whole, exact = (losses(read_rows(runs(*which))) for which in ((kept, "fsdp2_tensor2"), (kept,), ("fp32",)))
    assert whole != exact
    np.testing.assert_allclose(whole, exact, rtol=rtol)
    # What is drawn is the same; a sum in another order can tip a rounding all the same.
    np.testing.assert_allclose(ours, whole, rtol=1e-4)


@pytest.mark.parametrize("kept", cases(["bf16", "int8"], quick=["int8"]))
def test_state_is_stored_as_it_is_and_moves_to_the_bit(runs, kept):
    source = checkpoint(runs(kept, "fsdp2_tensor2"), 4)
    assert list(contradictions(Checkpoint(source))) == []
    before = read_all(source)
    name = "layers.0.mlp.down.weight"
    found = {
        key.split(".")[1]: (t.dtype, tuple(t.shape))
        for key, t in before.items()
        if key.endswith(name) and key.startswith("optimizer.")
    }
    expected = {"step": (torch.float32, ())}
    for moment, code in CODES.items():
        expected[moment] = (code.dtype if kept == "int8" else torch.bfloat16, (128, 128))
        if kept == "int8":
            expected[f"{moment}_scale"] = (torch.float32, (128, 2))
    assert found == expected
    assert before["optimizer.exp_avg.norm.weight"].dtype == torch.float32
    words, size = LAYOUTS["fsdp3"]
    config = small_config(runs.tmp, *WORDS, f"optim.state_dtype={kept}", *words)
    moved = run_ranks(size, _load_and_save, to_dict(config), source, runs.tmp / f"moved-{kept}")
    after = read_all(Path(moved[0]["path"]))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("kept", "layout"),
    cases([("int8", "fsdp2_tensor2"), ("bf16", None), ("int8", None)], quick=[("int8", "fsdp2_tensor2")]),
)
def test_a_resumed_run_ends_to_the_bit_as_one_that_was_not_stopped(runs, tmp_path, kept, layout):
    words, size = LAYOUTS[layout] if layout else ([], 1)
    whole = runs(kept, layout)
    config = small_config(runs.tmp, *WORDS, f"optim.state_dtype={kept}", *words)
    rows = train(config, size, tmp_path / "resumed", checkpoint(whole, 4))
    assert losses(rows) == losses(read_rows(whole))[4:]
    before, after = (read_all(checkpoint(run_dir, 8)) for run_dir in (whole, tmp_path / "resumed"))
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("kept", cases(["bf16", "int8"], quick=["int8"]))
def test_state_becomes_fp32_where_that_is_asked_for(runs, tmp_path, kept):
    source = checkpoint(runs(kept, "fsdp2_tensor2"), 4)
    config = small_config(runs.tmp, *WORDS, "optim.state_dtype=fp32")
    moved = run_ranks(1, _load_and_save, to_dict(config), source, tmp_path)
    before, after = read_all(source), read_all(Path(moved[0]["path"]))
    name = "layers.0.mlp.down.weight"
    for moment, code in CODES.items():
        stored, found = before[f"optimizer.{moment}.{name}"], after[f"optimizer.{moment}.{name}"]
        exact = stored.float() if kept == "bf16" else code.decode(stored, before[f"optimizer.{moment}_scale.{name}"])
        assert found.dtype == torch.float32
        assert found.any()
        assert torch.equal(found, exact)
    assert not any("_scale" in key for key in after)


def test_state_becomes_nothing_smaller(runs, tmp_path):
    source = checkpoint(runs("fp32"), 4)
    with pytest.raises((CheckpointError, AssertionError), match=r"optim\.state_dtype"):
        run_ranks(
            1, _load_and_save, to_dict(small_config(runs.tmp, *WORDS, "optim.state_dtype=int8")), source, tmp_path
        )
