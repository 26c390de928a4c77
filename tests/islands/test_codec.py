"""Numbers of an exchange: any part is exactly that part of the whole, small, and close; fragments; outer steps."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.islands.boxes import Box
from orchestrator.islands.codec import Encoded, decode, encode, encoded_bytes
from orchestrator.islands.fragments import fragments
from orchestrator.islands.island_messages import MessageError
from orchestrator.islands.outer import OuterOptimizer, bits, weighted_mean

KINDS = ("fp32", "bf16", "int8", "int4")
ERROR = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.5 / 127, "int4": 0.5 / 7}  # of the largest element of a group


def values(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@st.composite
def boxes(draw):
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=4)))
    start = tuple(draw(st.integers(0, length)) for length in shape)
    stop = tuple(draw(st.integers(first, length)) for first, length in zip(start, shape, strict=True))
    return Box("w", shape, start, stop)


@settings(max_examples=60, deadline=None)
@given(box=boxes(), kind=st.sampled_from(KINDS), limit=st.integers(1, 500))
def test_a_part_is_exactly_that_part_of_the_whole(box, kind, limit):
    whole = Encoded.of(values(box.shape), "w", kind)
    found = decode(whole.part(box), box, kind)
    assert found.tobytes() == np.ascontiguousarray(whole.decoded()[box.slices]).tobytes()
    assert len(whole.part(box)) == encoded_bytes(box, kind)
    pieces = list(box.pieces(limit))
    assert sum(piece.size for piece in pieces) == box.size
    again = np.empty(box.dims, np.float32)
    for piece in pieces:
        again[piece.within(box)] = decode(whole.part(piece), piece, kind)
    assert again.tobytes() == found.tobytes()
    read = Encoded.read(whole.part(whole.box), whole.box, kind)
    assert read.decoded().tobytes() == whole.decoded().tobytes()


@settings(max_examples=40, deadline=None)
@given(box=boxes(), kind=st.sampled_from(KINDS))
def test_what_a_rank_encodes_is_close_to_what_it_has(box, kind):
    mine = values(box.dims)
    found = decode(encode(mine, box, kind), box, kind)
    assert found.shape == mine.shape
    if mine.size:
        assert np.abs(found - mine).max() <= ERROR[kind] * np.abs(mine).max() + 1e-30


@pytest.mark.parametrize(("kind", "part"), [("int8", 0.2525), ("int4", 0.1275), ("bf16", 0.5)])
@pytest.mark.parametrize("shape", [(1024, 64), (4096, 4096), (8, 64, 256), (64, 1)])
def test_the_bytes_are_a_quarter_or_an_eighth(kind, part, shape):
    assert encoded_bytes(Box.whole("w", shape), kind) <= part * 4 * math.prod(shape) + 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [0.0, 1e-45, 3e38, -1e-30])
def test_extreme_numbers_stay_finite(kind, number):
    found = Encoded.of(np.full((4, 8), number, np.float32), "w", kind).decoded()
    assert np.isfinite(found).all() or (kind == "bf16" and number > 3e38)
    assert np.abs(found - np.float32(number)).max() <= max(1e-38, 0.08 * abs(number))


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_another_length_are_refused(kind):
    box = Box.whole("w", (7, 9))
    payload = bytes(encode(values((7, 9)), box, kind))
    for wrong in (payload[:-1], payload + b"x", b""):
        with pytest.raises(MessageError):
            decode(wrong, box, kind)
        with pytest.raises(MessageError):
            Encoded.read(wrong, box, kind)


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_what_rounding_leaves_out_comes_the_next_time(kind):
    left, sent, whole = np.zeros((16, 64), np.float32), np.zeros((16, 64)), np.zeros((16, 64))
    box = Box.whole("w", (16, 64))
    for seed in range(50):
        whole += (one := values((16, 64), seed))
        one = one + left
        got = decode(encode(one, box, kind), box, kind)
        left, sent = one - got, sent + got
    assert np.abs(sent + left - whole).max() < 1e-3
    assert np.abs(sent - whole).max() < 1.0


SHAPES = {
    "embed.weight": (1000, 8),
    **{f"layers.{layer}.{name}": (8, 8) for layer in range(6) for name in ("a", "b")},
    "norm.weight": (8,),
    "head.weight": (1000, 8),
}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 100])
def test_fragments_have_every_tensor_once_and_whole_layers(count):
    found = fragments(SHAPES, count)
    assert sorted(name for names in found for name in names) == sorted(SHAPES)
    assert len(found) <= min(count, len(SHAPES))
    place = {name: at for at, names in enumerate(found) for name in names}
    assert all(place[f"layers.{layer}.a"] == place[f"layers.{layer}.b"] for layer in range(6))
    if count == 2:
        assert place["embed.weight"] != place["head.weight"]
        assert place["layers.0.a"] != place["layers.1.a"]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_outer_steps_are_those_of_torch(momentum, nesterov):
    ours, theirs = np.zeros((3, 4), np.float32), torch.nn.Parameter(torch.zeros(3, 4))
    outer = OuterOptimizer(0.7, momentum, nesterov)
    sgd = torch.optim.SGD([theirs], lr=0.7, momentum=momentum, nesterov=nesterov and momentum > 0)
    for seed in range(5):
        theirs.grad = torch.from_numpy(values((3, 4), seed))
        sgd.step()
        ours = ours + outer.step("w", values((3, 4), seed))
    assert np.abs(ours - theirs.detach().numpy()).max() < 1e-5


def test_parts_of_a_round_are_about_a_whole_one():
    whole, parts = OuterOptimizer(0.7, 0.9), OuterOptimizer(0.7, 0.9)
    one, two = 0.0, 0.0
    gradient = functools.partial(np.ones, (1, 1), np.float32)
    for _ in range(40):
        one += whole.step("w", gradient()).item()
        two += parts.step("w", gradient(), 0.5).item() + parts.step("w", gradient(), 0.5).item()
    assert two == pytest.approx(one, rel=0.1)


def test_a_mean_is_weighted_and_bits_add_up():
    arrays = [values((4, 4), seed) for seed in range(3)]
    mean = weighted_mean(arrays, [1, 2, 5])
    assert np.abs(mean - np.average(arrays, axis=0, weights=[1, 2, 5])).max() < 1e-6
    parts = (bits(mean[:1]) + bits(mean[1:, :3]) + bits(mean[1:, 3:])) % (1 << 64)
    assert parts == bits(mean)
    changed = mean.copy()
    changed[2, 2] = np.nextafter(changed[2, 2], np.float32(9))
    assert bits(changed) != bits(mean)
