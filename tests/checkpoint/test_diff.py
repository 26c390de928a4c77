"""Two checkpoints are compared by what they hold, whatever layouts wrote them, and never whole in memory."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.checkpoint import diff, writer
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.diff import Mismatched, boxes, common_elements, compare
from orchestrator.checkpoint.reader import Reader
from orchestrator.sharding.layout import Layout
from tests.lab.checkpoints import shards_of, write, write_whole

TENSORS = {
    "model.a": torch.randn(50, 7, generator=torch.Generator().manual_seed(0)),
    "model.b": torch.arange(9, dtype=torch.bfloat16),
    "model.empty": torch.ones(0, 3),
    "optimizer.step.a": torch.tensor(3.0),
    "optimizer.count": torch.arange(4),
}


def opened(tmp_path, name, changes=None, layout=None):
    whole = {**TENSORS, **(changes or {})}
    whole = {key: tensor for key, tensor in whole.items() if tensor is not None}
    layout = layout or Layout()
    dims = {"model.a": 1}
    with mock.patch.object(writer, "_refuse_nonfinite", lambda shards: shards):  # as earlier versions wrote them
        paths = write(tmp_path / name, lambda rank: shards_of(whole, layout, rank, dims), layout.devices)
    return Checkpoint(paths[0])


@pytest.fixture(params=[1, 10, 1 << 22])
def chunk(request, monkeypatch):
    monkeypatch.setattr(diff, "CHUNK_ELEMENTS", request.param)


def test_other_layouts_of_the_same_are_bitwise_equal(tmp_path, chunk):
    nan = {"model.a": TENSORS["model.a"].clone()}
    nan["model.a"][3, 2:5] = torch.tensor([math.nan, math.inf, -0.0])
    first = opened(tmp_path, "a", nan, Layout(fsdp=2, tensor=2))
    second = opened(tmp_path, "b", nan, Layout(fsdp=3))
    done: list[int] = []
    found = compare(first, second, progress=done.append)
    assert found.equal
    assert (found.compared, found.same) == (5, 5)
    assert sum(done) == common_elements(first, second) == 50 * 7 + 9 + 0 + 1 + 4


def test_differences_are_measured(tmp_path, chunk):
    changed = TENSORS["model.a"].clone()
    changed[4, 5] += 2.0
    changed[40] *= 1.01
    b = TENSORS["model.b"].clone()
    b[0] = -0.0
    first = opened(tmp_path, "a", layout=Layout(fsdp=2))
    found = compare(first, opened(tmp_path, "b", {"model.a": changed, "model.b": b}))
    by_name = {one.name: one for one in found.changed}
    assert set(by_name) == {"model.a", "model.b"}
    a = TENSORS["model.a"].double()
    distance = (a - changed.double()).abs()
    one = by_name["model.a"]
    assert (one.elements, one.differing) == (350, 8)
    assert one.max_abs == float(distance.max())
    assert one.relative_l2 == pytest.approx(float(distance.norm() / a.norm()), rel=1e-12)
    assert (by_name["model.b"].differing, by_name["model.b"].max_abs) == (1, 0.0), "0 and -0 have other bits"
    assert not found.equal
    assert (found.compared, found.same) == (5, 3)


def test_names_shapes_and_dtypes(tmp_path, chunk):
    first = opened(tmp_path, "a", {"model.only": torch.ones(2), "model.shape": torch.ones(2, 3)})
    other = {"model.new": torch.ones(2), "model.shape": torch.ones(3, 2), "model.b": TENSORS["model.b"].float()}
    found = compare(first, opened(tmp_path, "b", other))
    assert (found.only_first, found.only_second) == (("model.only",), ("model.new",))
    assert found.mismatched == (
        Mismatched("model.b", "BF16 (9,)", "F32 (9,)"),
        Mismatched("model.shape", "F32 (2, 3)", "F32 (3, 2)"),
    )
    assert found.changed == (), "the values of model.b are the same"
    assert (found.compared, found.same, found.equal) == (5, 4, False)


def test_of_a_prefix_alone(tmp_path):
    first, second = opened(tmp_path, "a"), opened(tmp_path, "b", {"optimizer.step.a": None})
    assert not compare(first, second).equal
    found = compare(first, second, "model.")
    assert (found.equal, found.compared) == (True, 3)


def test_what_is_no_number(tmp_path):
    first, second = TENSORS["model.b"].clone(), TENSORS["model.b"].clone()
    second[3] = math.nan
    zero = {"model.a": torch.zeros(50, 7)}
    found = compare(opened(tmp_path, "a", {"model.b": first, **zero}), opened(tmp_path, "b", {"model.b": second}))
    by_name = {one.name: one for one in found.changed}
    assert math.isnan(by_name["model.b"].max_abs)
    assert by_name["model.a"].relative_l2 is None


def test_no_more_than_a_chunk_is_read_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(diff, "CHUNK_ELEMENTS", 20)
    largest: list[int] = []
    real = Reader.tensor

    def tensor(self, name, box=None):
        found = real(self, name, box)
        largest.append(found.numel())
        return found

    monkeypatch.setattr(Reader, "tensor", tensor)
    compare(opened(tmp_path, "a"), opened(tmp_path, "b"))
    assert max(largest) <= 20


@given(st.lists(st.integers(0, 7), max_size=4), st.integers(1, 50))
def test_boxes_cover_each_element_once(shape, limit):
    whole = torch.zeros(shape)
    for box in boxes(shape, limit):
        part = whole[box] if box else whole
        assert part.numel() <= limit
        part += 1
    assert bool((whole == 1).all())


def test_a_plain_checkpoint_is_itself(tmp_path):
    checkpoint = Checkpoint(write_whole(tmp_path, TENSORS))
    assert compare(checkpoint, checkpoint).equal
