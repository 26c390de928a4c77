"""Which part of a parameter a rank holds: each element just as often as there are copies, and one owner each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import LayoutError
from orchestrator.sharding.axes import LOGICAL_AXES, MESH_AXES
from orchestrator.sharding.layout import Layout
from orchestrator.sharding.rules import RULES, Placement, place

# At most 324 ranks, each of which is looked at.
_LARGEST = {"replicate": 2, "pipeline": 2}
layouts = st.builds(Layout, **{axis: st.integers(1, _LARGEST.get(axis, 3)) for axis in MESH_AXES})
SHAPES = {"embed.weight": (10, 4), "norm.weight": (4,), "down.weight": (4, 12)}
AXES = {"embed.weight": ("vocab", "embed"), "norm.weight": ("norm",), "down.weight": ("embed", "mlp")}


@st.composite
def placements(draw) -> Placement:
    """Any shape up to 3 dims, sizes that divide nothing, also empty."""
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    return Placement(shape, draw(st.sampled_from([None, *range(len(shape))])))


def _count(placement: Placement, layout: Layout, ranks) -> np.ndarray:
    count = np.zeros(placement.shape, dtype=int)
    for rank in ranks:
        count[placement.slices(layout, rank)] += 1
    return count


@given(placements(), layouts)
def test_every_element_is_held_by_as_many_ranks_as_there_are_copies(placement, layout):
    assert (_count(placement, layout, range(layout.devices)) == placement.copies(layout) * layout.pipeline).all()


@given(placements(), layouts)
def test_every_element_has_one_owner(placement, layout):
    owners = [rank for rank in range(layout.devices) if placement.is_owner(layout, rank)]
    assert (_count(placement, layout, owners) == layout.pipeline).all(), "one in each stage"
    assert len(owners) * placement.copies(layout) == layout.devices


@given(placements(), layouts)
def test_parts_lie_in_the_tensor_and_are_ordered(placement, layout):
    for rank in range(layout.devices):
        part = placement.slices(layout, rank)
        assert len(part) == len(placement.shape)
        for piece, size in zip(part, placement.shape, strict=True):
            assert 0 <= piece.start <= piece.stop <= size
            assert piece.step is None


@given(st.integers(0, 20), st.integers(1, 6))
def test_pieces_are_those_of_torch_chunk(size, parts):
    whole = torch.arange(size)
    pieces = [piece.tolist() for piece in whole.chunk(parts)] if size else []
    pieces += [[]] * (parts - len(pieces))
    ours = [whole[Placement((size,), None).slices(Layout(fsdp=parts), rank)].tolist() for rank in range(parts)]
    assert ours == pieces


def test_fsdp_cuts_dim_0_inside_the_tensor_shard():
    layout = Layout(fsdp=2, tensor=2)
    rows = [Placement((8, 6), 0).slices(layout, rank) for rank in range(4)]
    assert [part[0] for part in rows] == [slice(0, 2), slice(4, 6), slice(2, 4), slice(6, 8)]
    columns = [Placement((8, 6), 1).slices(layout, rank) for rank in range(4)]
    assert columns == [
        (slice(0, 4), slice(0, 3)),
        (slice(0, 4), slice(3, 6)),
        (slice(4, 8), slice(0, 3)),
        (slice(4, 8), slice(3, 6)),
    ]


def test_context_ranks_share_the_cut_with_fsdp():
    parts = [Placement((8,), None).slices(Layout(fsdp=2, context=2), rank)[0].start for rank in range(4)]
    assert parts == [0, 2, 4, 6]


def test_the_table_places_each_parameter():
    placed = place(AXES, SHAPES)
    assert placed == {
        "embed.weight": Placement((10, 4), 0),
        "norm.weight": Placement((4,), None),
        "down.weight": Placement((4, 12), 1),
    }


def test_the_table_covers_the_vocabulary_of_axes():
    assert set(RULES) == set(LOGICAL_AXES)


@pytest.mark.parametrize(
    ("axes", "shapes", "rules", "messages"),
    [
        (AXES, {**SHAPES, "new.weight": (4,)}, RULES, ["parameter 'new.weight' has no logical axes"]),
        (
            {**AXES, "embed.wieght": ("norm",)},
            SHAPES,
            RULES,
            ["name a parameter 'embed.wieght' that is not there", "did you mean 'embed.weight'?"],
        ),
        (
            {**AXES, "norm.weight": ("nrom",)},
            SHAPES,
            RULES,
            ["no rule covers the logical axis 'nrom'", "did you mean 'norm'?"],
        ),
        (AXES, SHAPES, {**RULES, "vocabulary": "tensor"}, ["a rule names 'vocabulary', which no model can have"]),
        (AXES, SHAPES, {**RULES, "mlp": "tensro"}, ["the rule of 'mlp' names a mesh axis 'tensro'", "'tensor'?"]),
        (AXES, SHAPES, {k: v for k, v in RULES.items() if k != "mlp"}, ["no rule covers the logical axis 'mlp'"]),
        ({**AXES, "norm.weight": ("norm", "embed")}, SHAPES, RULES, ["'norm.weight' has 1 dims and 2 logical axes"]),
        (AXES, SHAPES, {**RULES, "embed": "tensor"}, ["would be cut twice by the tensor axis"]),
    ],
)
def test_whatever_has_no_counterpart_is_an_error(axes, shapes, rules, messages):
    with pytest.raises(LayoutError) as caught:
        place(axes, shapes, rules)
    for message in messages:
        assert message in str(caught.value)


def test_all_of_them_at_once():
    with pytest.raises(LayoutError) as caught:
        place({"a": ("norm",), "b": ("what",)}, {"b": (1,), "c": (1,)}, {**RULES, "extra": None})
    assert len(str(caught.value).splitlines()) == 5


EXPERTS = Placement((4, 12, 8), 1, expert_dim=0, fsdp_dim=1)


@given(layouts)
def test_experts_lie_on_one_rank_of_their_axis_and_are_cut_in_dim_1(layout):
    assert (_count(EXPERTS, layout, range(layout.devices)) == layout.replicate * layout.pipeline).all()
    owners = [rank for rank in range(layout.devices) if EXPERTS.is_owner(layout, rank)]
    assert (_count(EXPERTS, layout, owners) == layout.pipeline).all()
    assert EXPERTS.copies(layout) == layout.replicate


def test_an_experts_matrix_is_cut_by_tensor_outside_and_fsdp_inside():
    layout = Layout(fsdp=2, expert=2, tensor=2)
    parts = [EXPERTS.slices(layout, rank)[:2] for rank in range(8)]
    first, second = slice(0, 2), slice(2, 4)
    assert parts[:4] == [
        (first, slice(0, 3)),
        (first, slice(6, 9)),
        (second, slice(0, 3)),
        (second, slice(6, 9)),
    ]
    assert parts[4] == (first, slice(3, 6))


def test_balancing_offsets_are_whole_everywhere():
    axes = {"experts.up": ("experts", "mlp", "embed"), "router.balance_bias": ("balance",)}
    placed = place(axes, {"experts.up": (4, 12, 8), "router.balance_bias": (4,)})
    assert placed["experts.up"] == EXPERTS
    whole = placed["router.balance_bias"]
    assert whole.slices(Layout(fsdp=4), 3) == (slice(0, 4),)
    assert [whole.is_owner(Layout(fsdp=2, tensor=2), rank) for rank in range(4)] == [True, False, False, False]


@pytest.mark.parametrize("axes", [("experts",), ("mlp", "experts")])
def test_experts_are_in_dim_0_of_tensors_with_more_dims(axes):
    with pytest.raises(LayoutError, match="does not have its experts in dim 0"):
        place({"a": axes}, {"a": (4, 6)[: len(axes)]})
