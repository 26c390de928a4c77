"""Degrees of the mesh axes: what `auto` becomes, what is refused, and which rank is where."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.schema import LayoutConfig, ModelConfig, MoEConfig
from orchestrator.errors import LayoutError
from orchestrator.sharding.axes import MESH_AXES
from orchestrator.sharding.layout import Layout, check_layout, resolve_layout

# At most 324 ranks, each of which is looked at.
_LARGEST = {"replicate": 2, "pipeline": 2}
layouts = st.builds(Layout, **{axis: st.integers(1, _LARGEST.get(axis, 3)) for axis in MESH_AXES})
MODEL = ModelConfig(vocab_size=512, dim=64, heads=4, kv_heads=2, mlp_dim=96)


def _config(**degrees) -> LayoutConfig:
    return LayoutConfig(**degrees)


@pytest.mark.parametrize(
    ("degrees", "devices", "expected"),
    [
        ({}, 1, Layout()),
        ({}, 8, Layout(fsdp=8)),
        ({"tensor": 2}, 8, Layout(fsdp=4, tensor=2)),
        ({"tensor": 8}, 8, Layout(fsdp=1, tensor=8)),
        ({"replicate": "auto"}, 8, Layout(fsdp=8)),
        ({"replicate": "auto", "fsdp": 2}, 8, Layout(replicate=4, fsdp=2)),
        ({"fsdp": 2, "context": "auto", "tensor": "auto"}, 8, Layout(fsdp=2, context=4)),
        ({"fsdp": 1, "tensor": "auto"}, 6, Layout(tensor=6)),
        ({"replicate": 2, "fsdp": 2, "context": 2, "tensor": 2}, 16, Layout(replicate=2, fsdp=2, context=2, tensor=2)),
    ],
)
def test_auto_takes_what_remains(degrees, devices, expected):
    assert resolve_layout(_config(**degrees), devices) == expected


@given(st.fixed_dictionaries({axis: st.one_of(st.just("auto"), st.integers(1, 6)) for axis in MESH_AXES}), st.data())
def test_the_product_is_the_devices_or_it_is_refused(degrees, data):
    devices = data.draw(st.integers(1, 48))
    fixed = {axis: degree for axis, degree in degrees.items() if degree != "auto"}
    try:
        layout = resolve_layout(_config(**degrees), devices)
    except LayoutError:
        product = Layout(**fixed).devices
        assert devices % product or (len(fixed) == len(MESH_AXES) and product != devices)
    else:
        assert layout.devices == devices
        assert fixed.items() <= layout.as_dict().items()
        assert sum(layout.degree(axis) > 1 for axis in degrees if axis not in fixed) <= 1


@pytest.mark.parametrize(
    ("degrees", "devices", "got", "allowed", "fix"),
    [
        ({"fsdp": 3}, 4, "fsdp 3 = 3 on 4 devices", "whose product is 4", "hardware.devices=3"),
        ({"fsdp": 2, "tensor": 2}, 1, "fsdp 2 x tensor 2 = 4 on 1 device", "product is 1", "hardware.devices=4"),
        ({"tensor": 3}, 8, "tensor 3 = 3 on 8 devices", "whose product divides 8", "hardware.devices=3"),
        ({"fsdp": 1}, 2, "1 = 1 on 2 devices", "whose product is 2", "leave one degree auto"),
    ],
)
def test_a_refusal_shows_its_arithmetic(degrees, devices, got, allowed, fix):
    with pytest.raises(LayoutError) as caught:
        resolve_layout(_config(**degrees), devices)
    assert caught.value.got == got
    assert allowed in caught.value.allowed
    assert fix in caught.value.fix


@pytest.mark.parametrize("axis", MESH_AXES)
@pytest.mark.parametrize("degree", [0, -2])
def test_a_degree_is_one_or_more(axis, degree):
    with pytest.raises(LayoutError, match=rf"layout\.{axis} is not a degree\n  got:     {degree}"):
        resolve_layout(_config(**{axis: degree}), 4)


@given(layouts)
def test_coordinates_number_the_ranks_one_to_one(layout):
    seen = [tuple(layout.coordinates(rank)[axis] for axis in MESH_AXES) for rank in range(layout.devices)]
    assert seen == sorted(set(seen)), "row-major, none twice"
    assert all(0 <= at < layout.degree(axis) for place in seen for axis, at in zip(MESH_AXES, place, strict=True))


@given(layouts)
def test_data_ranks_are_shared_by_the_ranks_of_a_sequence_and_no_others(layout):
    groups: dict[int, set[tuple[int, int]]] = {}
    for rank in range(layout.devices):
        at = layout.coordinates(rank)
        groups.setdefault(layout.data_rank(rank), set()).add((at["replicate"], at["fsdp"], at["expert"]))
    assert sorted(groups) == list(range(layout.data_parallel))
    assert all(len(places) == 1 for places in groups.values())
    assert len(set(map(frozenset, groups.values()))) == layout.data_parallel


def test_neighbours_are_of_one_tensor_group():
    layout = Layout(replicate=2, fsdp=2, context=2, tensor=2)
    assert [layout.coordinates(rank)["tensor"] for rank in range(4)] == [0, 1, 0, 1]
    assert layout.coordinates(15) == {axis: layout.degree(axis) - 1 for axis in MESH_AXES}
    assert (layout.devices, layout.data_parallel, layout.shards) == (16, 4, 4)


def test_a_layout_names_what_it_splits():
    assert str(Layout()) == "single device"
    assert str(Layout(fsdp=4, tensor=2)) == "fsdp=4 x tensor=2"


def test_a_layout_that_fits_has_no_problems():
    assert check_layout(Layout(replicate=2, fsdp=2, tensor=2), MODEL, 64, 512) == []
    assert check_layout(Layout(), replace(MODEL, vocab_size="auto"), 63, 63) == []


@pytest.mark.parametrize(
    ("layout", "model", "seq_len", "batch", "what", "got", "fix"),
    [
        (Layout(tensor=3), {}, 96, 960, "model.heads does not divide by layout.tensor", "4 / 3 = 1.33333", "tensor"),
        (Layout(tensor=4), {}, 64, 512, "model.kv_heads does not divide", "2 / 4 = 0.5", "divisor of 2"),
        (Layout(tensor=2), {"mlp_dim": 97}, 64, 512, "model.mlp_dim does not", "97 / 2 = 48.5", "divisor of 97"),
        (
            Layout(tensor=2),
            {"layers": 2, "layer_heads": (4, 6), "layer_kv_heads": (2, 3), "head_dim": 16},
            64,
            512,
            "model.layer_kv_heads does not divide",
            "3 / 2 = 1.5",
            "divisor of 3",
        ),
        (Layout(tensor=2), {"vocab_size": 511}, 64, 512, "model.vocab_size", "511 / 2", "model.vocab_size=512"),
        (Layout(context=3), {}, 64, 512, "train.seq_len does not divide", "64 / 3", "multiple of 3"),
        (Layout(context=2, tensor=2), {}, 66, 660, "train.seq_len does not", "66 / 4 = 16.5", "multiple of 4"),
        (
            Layout(context=4, context_kind="ring"),
            {},
            60,
            600,
            "train.seq_len does not divide by 2 x layout.context",
            "60 / 8 = 7.5",
            "multiple of 8",
        ),
        (
            Layout(tensor=2),
            {"positions": "learned", "max_seq_len": 65},
            64,
            512,
            "model.max_seq_len does not",
            "65 / 2",
            "max_seq_len",
        ),
        (
            Layout(replicate=2, fsdp=3),
            {},
            64,
            512,
            "the global batch does not divide",
            "512 tokens / 64 = 8 sequences over replicate 2 x fsdp 3 = 6 groups",
            "train.global_batch_tokens=768",
        ),
    ],
)
def test_a_misfit_shows_its_arithmetic(layout, model, seq_len, batch, what, got, fix):
    problem = next(p for p in check_layout(layout, replace(MODEL, **model), seq_len, batch) if p.what.startswith(what))
    assert got in problem.got
    assert fix in problem.fix
    assert problem.allowed


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_dropout_is_drawn_where_keys_are_gathered_alone(kind):
    (problem,) = check_layout(Layout(context=2, context_kind=kind), replace(MODEL, dropout=0.1), 64, 512)
    assert "model.dropout=0.1" in problem.got
    assert not check_layout(Layout(context=2), replace(MODEL, dropout=0.1), 64, 512)


def test_a_sequence_is_cut_into_equal_chunks_and_rows():
    layouts = [(Layout(context=4), 4), (Layout(tensor=2), 2), (Layout(context=4, context_kind="ring"), 8)]
    layouts += [(Layout(context=2, tensor=t, context_kind="ring"), n) for t, n in ((1, 4), (2, 4), (3, 12), (4, 8))]
    assert [layout.sequence_split for layout, _ in layouts] == [split for _, split in layouts]


MOE = replace(MODEL, moe=MoEConfig(experts=4, mlp_dim=32, shared_mlp_dim=33))


@pytest.mark.parametrize(
    ("layout", "model", "what", "got"),
    [
        (Layout(expert=2), MODEL, "the model has no experts to divide", "layout.expert=2 with model tiny"),
        (Layout(expert=3), MOE, "model.moe.experts does not divide by layout.expert", "4 / 3"),
        (Layout(fsdp=3), MOE, "model.moe.mlp_dim does not divide by layout.tensor x fsdp x context", "32 / 3"),
        (Layout(fsdp=3), MOE, "model.dim does not divide by layout.fsdp x context", "64 / 3"),
        (Layout(tensor=2), MOE, "model.moe.shared_mlp_dim does not divide by layout.tensor", "33 / 2"),
    ],
)
def test_experts_that_cannot_be_divided_are_refused(layout, model, what, got):
    (problem,) = [p for p in check_layout(layout, model, 64, 64 * 12) if p.what == what]
    assert got in problem.got
    assert problem.fix


def test_groups_are_of_ranks_that_differ_along_an_axis_alone():
    layout = Layout(fsdp=2, expert=2, tensor=2)
    assert layout.groups("expert") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.groups("fsdp", "tensor") == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert layout.data_parallel == 4
    assert [layout.data_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_all_misfits_at_once():
    assert len(check_layout(Layout(fsdp=5, tensor=7), replace(MODEL, positions="learned"), 64, 512)) == 7


@given(layouts, st.integers(1, 16), st.integers(1, 16))
def test_the_suggested_batch_fits(layout, units, sequences):
    seq_len = units * layout.tensor * layout.context
    for problem in check_layout(layout, ModelConfig(heads=12, kv_heads=12, mlp_dim=12), seq_len, sequences * seq_len):
        if "global batch" in problem.what:
            batch = int(problem.fix.rpartition("=")[2])
            found = check_layout(
                replace(layout, tensor=1, expert=1, fsdp=layout.fsdp * layout.expert), MODEL, seq_len, batch
            )
            assert not found
            assert 0 < batch - sequences * seq_len < layout.data_parallel * seq_len


@pytest.mark.parametrize(
    ("layout", "model", "got"),
    [
        (Layout(context=4), {"heads": 6, "kv_heads": 2}, "query heads 6 / tensor 1 = 6, / context 4 = 1.5"),
        (Layout(context=2, tensor=2), {"heads": 2, "kv_heads": 2}, "query heads 2 / tensor 2 = 1, / context 2 = 0.5"),
        (Layout(context=4), {"heads": 12, "kv_heads": 3}, "key heads 3 / tensor 1 = 3"),
        (Layout(context=2), {"layer_heads": (4, 3, 4, 4), "heads": 4}, "query heads 3 / tensor 1 = 3"),
    ],
)
def test_ulysses_needs_heads_that_divide(layout, model, got):
    layout = replace(layout, context_kind="ulysses")
    (problem,) = [p for p in check_layout(layout, replace(MODEL, **model), 64, 512) if "Ulysses" in p.what]
    assert got in problem.got
    assert "layout.context_kind=ring" in problem.fix


def test_ulysses_repeats_key_heads_for_more_ranks():
    model = replace(MODEL, heads=8, kv_heads=2)
    assert not check_layout(Layout(context=4, context_kind="ulysses"), model, 64, 512)
