"""What travels for the handover check, and how it is compared: no model, only arrays."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.reference import (
    DIGEST,
    MEASURED,
    REFERENCE,
    TOLERANCES,
    Handover,
    Measurement,
    Reference,
    check,
    compare,
    read_reference,
    read_sums,
    share,
    signs,
    to_files,
    tolerance,
)
from orchestrator.checkpoint.writer import sum_bits
from orchestrator.errors import CheckpointError, HandoverError
from orchestrator.sharding.layout import Layout
from tests.lab.checkpoints import shards_of, write, write_whole

TENSORS = {"model.embed.weight": torch.arange(80.0).reshape(20, 4)}
ALLOWED = TOLERANCES["fp32", "fp32"]
HERE = {"target": "cpu", "device_names": ["a"], "layout": {"fsdp": 1}, "precision": "fp32", "software": {"torch": "2"}}


def batch(rows: int = 2, length: int = 6) -> dict[str, np.ndarray]:
    tokens = np.arange(rows * length, dtype=np.int64).reshape(rows, length) % 20
    targets = np.where(np.arange(length) == 2, -100, (tokens + 1) % 20)
    positions = np.tile(np.arange(length, dtype=np.int64), (rows, 1))
    return {"tokens": tokens, "targets": targets, "positions": positions, "documents": positions // 3}


def measured(rows: int = 2, length: int = 6) -> Measurement:
    values = np.random.default_rng(0).normal(size=(len(DIGEST), rows, length)).astype(np.float32)
    return Measurement(3.0, 2.0, dict(zip(DIGEST, values, strict=True)))


def carried(tmp_path, change=lambda arrays: None, numbers=None) -> Checkpoint:
    """A checkpoint with a reference, changed before it is written."""
    files = to_files(Reference(batch(), measured()))
    arrays = safetensors.numpy.load(files[REFERENCE])
    change(arrays)
    files[REFERENCE] = safetensors.numpy.save(arrays)
    if numbers is not None:
        files[MEASURED] = numbers
    return Checkpoint(write_whole(tmp_path, TENSORS, extra=files, state={"step": 1, **HERE}))


# The batch on a layout


@pytest.mark.parametrize(("rows", "groups"), list(itertools.product((1, 2, 3), (1, 2, 3, 4, 6))))
def test_every_row_counts_as_often_as_every_other(rows, groups):
    parts = [share(batch(rows), groups, 1, rank, groups) for rank in range(groups)]
    assert len({part["tokens"].shape for part in parts}) == 1, "groups have different shapes"
    assert all(len(part["tokens"]) for part in parts), "a group of devices has nothing to do"
    whole = np.concatenate([part["tokens"] for part in parts])
    counts = [int((whole == row).all(axis=1).sum()) for row in batch(rows)["tokens"]]
    assert len(set(counts)) == 1
    assert sum(counts) == len(whole)
    one = share(batch(rows), groups, 1, 0, 1)
    np.testing.assert_array_equal(one["tokens"], whole)


def test_padding_has_no_target_and_is_a_document_of_its_own():
    padded = share(batch(), 1, 4, 0, 1)
    assert padded["tokens"].shape == (2, 8)
    for name, array in batch().items():
        np.testing.assert_array_equal(padded[name][:, :6], array)
    assert (padded["targets"][:, 6:] == -100).all()
    assert padded["documents"][:, 6:].min() > batch()["documents"].max()


def test_the_signs_are_the_same_for_ever():
    assert signs(0, 12).tolist() == [-1, -1, 1, -1, 1, 1, -1, 1, 1, -1, 1, 1]
    assert signs(0, 100_000)[:5].tolist() == signs(0, 5).tolist()
    assert abs(signs(1, 100_000).mean()) < 0.02
    assert abs((signs(0, 100_000) * signs(1, 100_000)).mean()) < 0.02


# Comparing


def _changed(**changes) -> Measurement:
    return replace(measured(), **changes)


def _verdicts(here: Measurement) -> dict[str, bool]:
    return {one.quantity: one.agrees for one in compare(measured(), here, ALLOWED)}


def test_the_same_agrees_and_each_quantity_is_judged_alone():
    assert _verdicts(measured()) == {"loss": True, "grad_norm": True, "logits": True}
    assert _verdicts(_changed(loss=3.0 * (1 + 2e-5))) == {"loss": False, "grad_norm": True, "logits": True}
    assert _verdicts(_changed(loss=3.0 * (1 + 5e-6)))["loss"]
    assert _verdicts(_changed(grad_norm=2.0 * (1 + 2e-4))) == {"loss": True, "grad_norm": False, "logits": True}


@pytest.mark.parametrize("part", DIGEST)
def test_one_part_of_the_digest_is_enough(part):
    digest = {**measured().digest, part: measured().digest[part] * np.float32(1.001)}
    assert _verdicts(_changed(digest=digest)) == {"loss": True, "grad_norm": True, "logits": False}


def test_a_group_of_devices_cannot_hide_behind_the_others():
    digest = {name: np.concatenate([array] * 8) for name, array in measured().digest.items()}
    assert _verdicts(_changed(digest=digest))["logits"]
    digest["projection0"][-1] *= np.float32(1.001)
    assert not _verdicts(_changed(digest=digest))["logits"]


def test_a_small_loss_is_compared_as_it_is():
    """Rounding of the logits does not shrink with the loss."""
    small, near = _changed(loss=1e-4), _changed(loss=1e-4 + 5e-6)
    assert all(one.agrees for one in compare(small, near, ALLOWED))
    assert not compare(small, _changed(loss=1e-4 + 5e-5), ALLOWED)[0].agrees


def test_numbers_that_are_not_finite_agree_with_nothing():
    nan = {name: np.full_like(array, np.nan) for name, array in measured().digest.items()}
    diverged = Measurement(None, None, nan)
    for pair in ((measured(), diverged), (diverged, measured()), (diverged, diverged)):
        found = compare(*pair, ALLOWED)
        assert not any(one.agrees for one in found)
        assert all(one.to_dict()["difference"] is None for one in found)
    json.dumps([one.to_dict() for one in found], allow_nan=False)


def test_tolerances_are_declared_for_either_order():
    assert tolerance("fp32", "bf16") == tolerance("bf16", "fp32") == TOLERANCES["bf16", "fp32"]
    with pytest.raises(CheckpointError, match="no tolerance is declared"):
        tolerance("fp32", "int4")


def test_what_changed_is_named():
    def changed(**other):
        return Handover(1, HERE, {**HERE, **other}, ()).changed

    assert changed() == []
    assert changed(target="tpu") == changed(device_names=["b"]) == ["backend"]
    assert changed(layout={"fsdp": 2}, software={"torch": "3"}) == ["layout", "software"]
    assert changed(precision="bf16") == ["precision"]


def test_the_error_says_what_and_by_how_much(tmp_path):
    checkpoint = carried(tmp_path)
    other = _changed(loss=3.3, digest=measured().digest)
    result = check(checkpoint, read_reference(checkpoint), other, ["model.x"], HERE)
    assert result.verdict == "differs"
    error = result.error()
    assert isinstance(error, HandoverError)
    assert error.exit_code == 2
    for words in ("loss 3.3 instead of 3", "differs by 0.1", "model.x has other bits", "on_mismatch=warn", "1e-05"):
        assert words in str(error)
    json.dumps(result.to_dict(), allow_nan=False)


def test_other_bits_alone_are_enough(tmp_path):
    checkpoint = carried(tmp_path)
    assert check(checkpoint, read_reference(checkpoint), measured(), [], HERE).verdict == "agrees"
    assert check(checkpoint, read_reference(checkpoint), measured(), ["a"], HERE).verdict == "differs"


# What travels


def test_a_reference_comes_back_as_it_was(tmp_path):
    found = read_reference(carried(tmp_path))
    assert found is not None
    assert (found.measured.loss, found.measured.grad_norm) == (3.0, 2.0)
    for ours, theirs in ((found.batch, batch()), (found.measured.digest, measured().digest)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_checkpoint_without_one_is_no_error(tmp_path):
    checkpoint = Checkpoint(write_whole(tmp_path, TENSORS))
    assert read_reference(checkpoint) is None
    assert check(checkpoint, None, None, None, HERE).verdict == "unchecked"


DAMAGE = {
    "a field is missing": lambda arrays: arrays.pop("batch.positions"),
    "a digest is missing": lambda arrays: arrays.pop("logits.target"),
    "another shape": lambda arrays: arrays.update({"batch.targets": arrays["batch.targets"][:, :3].copy()}),
    "another dtype": lambda arrays: arrays.update({"batch.tokens": arrays["batch.tokens"].astype(np.float64)}),
    "a negative token": lambda arrays: arrays["batch.tokens"].fill(-1),
    "a negative target": lambda arrays: arrays["batch.targets"].fill(-7),
    "a position beyond": lambda arrays: arrays["batch.positions"].fill(6),
    "a token that the model does not know": lambda arrays: arrays["batch.tokens"].fill(20),
    "no rows": lambda arrays: arrays.update({name: array[:0].copy() for name, array in arrays.items()}),
    "one dim": lambda arrays: arrays.update({name: array[0].copy() for name, array in arrays.items()}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_reference_of_strangers_is_checked_before_a_model_sees_it(tmp_path, kind):
    with pytest.raises(CheckpointError, match="reference batch of the checkpoint"):
        read_reference(carried(tmp_path, DAMAGE[kind]))


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"loss": 1}', b'{"loss": "x", "grad_norm": 1}', b"[" * 100_000])
def test_numbers_that_are_none(tmp_path, text):
    with pytest.raises(CheckpointError, match="damaged"):
        read_reference(carried(tmp_path, numbers=text))


# The sums


def test_a_sum_does_not_depend_on_how_a_tensor_is_cut(tmp_path):
    """As a rank sees it after any restore: the parts' sums add up to that of the file."""
    torch.manual_seed(0)
    tensors = {
        "model.a": torch.randn(7, 5),
        "model.b": torch.randn(6).bfloat16(),
        "model.c": torch.tensor(3.5),
        "model.d": torch.randn(3, 2, dtype=torch.float64),
        "model.e": torch.zeros(0, 3),
    }
    paths = write(tmp_path, lambda rank: shards_of(tensors, Layout(fsdp=3), rank), size=3)
    sums = read_sums(Checkpoint(paths[0]))
    assert sums == {name: sum_bits(tensor) for name, tensor in tensors.items()}


def test_any_change_of_an_element_shows():
    torch.manual_seed(0)
    whole = torch.randn(64, 64)
    before = sum_bits(whole)
    for at in torch.randint(0, 4096, (50,)).tolist():
        changed = whole.clone()
        changed.view(-1)[at] = math.nextafter(whole.view(-1)[at].item(), 9.0)
        changed.view(-1)[at] *= 1.01
        assert sum_bits(changed) != before


@pytest.mark.parametrize("text", [b"[1]", b"{", b'{"a": 1}', b'{"a": "x"}'])
def test_damaged_sums(tmp_path, text, monkeypatch):
    checkpoint = Checkpoint(write_whole(tmp_path, TENSORS))
    monkeypatch.setattr(Checkpoint, "read", lambda self, name, limit=0: text)
    with pytest.raises(CheckpointError, match="damaged"):
        read_sums(checkpoint)
