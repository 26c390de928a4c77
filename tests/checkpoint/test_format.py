"""The manifest proves itself: whatever is wrong with it is a CheckpointError and nothing worse."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import (
    MANIFEST,
    Manifest,
    StoredFile,
    StoredShard,
    StoredTensor,
    _digest,
    check_cover,
)
from orchestrator.errors import CheckpointError
from tests.lab.checkpoints import tamper, write_whole

HUGE = 1 << 70


@pytest.fixture
def saved(tmp_path):
    return write_whole(tmp_path, {"model.a": torch.arange(12.0).reshape(3, 4), "model.b": torch.tensor(5)})


def _tensor(shape, *boxes) -> StoredTensor:
    return StoredTensor("F32", shape, tuple(StoredShard("f", "k", start, stop) for start, stop in boxes))


def _first(data):
    return data["tensors"]["model.a"]


def _refused(directory, match=None):
    with pytest.raises(CheckpointError, match=match):
        Checkpoint(directory)


def test_a_manifest_survives_the_disk(saved):
    manifest = Manifest.read(saved)
    (saved / MANIFEST).write_text(manifest.to_json())
    assert Manifest.read(saved) == manifest
    assert manifest.tensors["model.a"].shape == (3, 4)
    assert manifest.tensors["model.b"] == StoredTensor(
        "I64", (), (StoredShard("rank-00000.safetensors", "model.b#1", (), ()),)
    )


@pytest.mark.parametrize(
    "tensor",
    [
        _tensor((), ((), ())),
        _tensor((0, 4)),
        _tensor((4,), ((0,), (1,)), ((1,), (4,))),
        _tensor((2, 2), ((0, 0), (2, 1)), ((0, 1), (1, 2)), ((1, 1), (2, 2))),
    ],
)
def test_boxes_that_cover_exactly(tensor):
    check_cover("t", tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        _tensor(()),
        _tensor((), ((), ()), ((), ())),
        _tensor((4,)),
        _tensor((4,), ((0,), (3,))),
        _tensor((4,), ((0,), (3,)), ((2,), (4,))),
        _tensor((4,), ((0,), (2,)), ((1,), (3,))),  # as many elements as there are, one of them twice
        _tensor((2, 2), ((0, 0), (2, 1)), ((0, 0), (2, 1))),
        _tensor((4,), ((0,), (5,))),
        _tensor((4,), ((3,), (1,))),
        _tensor((4,), ((0,), (4,)), ((2,), (2,))),
        _tensor((4,), ((0, 0), (4, 1))),
        _tensor((2, 2), ((0,), (2,))),
        _tensor((0,), ((0,), (0,))),
    ],
)
def test_boxes_that_do_not(tensor):
    with pytest.raises(CheckpointError, match="'t'"):
        check_cover("t", tensor)


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_any_cut_covers_and_any_loss_or_double_is_found(shape, data):
    boxes = [(tuple([0] * len(shape)), tuple(shape))]
    for _ in range(data.draw(st.integers(0, 4))):
        start, stop = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        dim = data.draw(st.integers(0, len(shape) - 1))
        middle = data.draw(st.integers(start[dim], stop[dim]))
        parts = (
            (start, (*stop[:dim], middle, *stop[dim + 1 :])),
            ((*start[:dim], middle, *start[dim + 1 :]), stop),
        )
        boxes += [box for box in parts if box[0][dim] < box[1][dim]]
    check_cover("t", _tensor(tuple(shape), *boxes))
    victim = data.draw(st.integers(0, len(boxes) - 1))
    for wrong in ([*boxes[:victim], *boxes[victim + 1 :]], [*boxes, boxes[victim]]):
        with pytest.raises(CheckpointError, match="exactly once"):
            check_cover("t", _tensor(tuple(shape), *wrong))


def test_a_manifest_names_only_files_that_it_lists():
    with pytest.raises(CheckpointError, match="'t' lies in a file that the manifest does not list"):
        Manifest(1, {"t": _tensor((4,), ((0,), (4,)))}, {"other": StoredFile(1, "")})


def test_no_manifest_no_checkpoint(tmp_path, saved):
    (saved / MANIFEST).unlink()
    _refused(saved, "it has no manifest.json")
    _refused(tmp_path / "nowhere", "it has no manifest.json")
    _refused(saved / "state.json", "it has no manifest.json")
    (saved / MANIFEST).mkdir()
    _refused(saved, "cannot be read")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(step=2),
        lambda data: _first(data)["shape"].reverse(),
        lambda data: data["files"]["state.json"]["pieces"][0].__setitem__(1, "0" * 64),
        lambda data: data.update(note="hello"),
        lambda data: data.update(digest="0" * 64),
        lambda data: data.update(digest=None),
    ],
)
def test_an_edited_manifest(saved, change):
    tamper(saved, change, sign=False)
    _refused(saved, "digest does not match")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data.update(version=3), "another format version\n  got:     3"),
        (lambda data: data.update(version=1), "another format version"),
        (lambda data: data.update(version=0), "another format version"),
        (lambda data: data.update(format="torch"), "not a checkpoint of this product"),
        (lambda data: data.update(step=-1), "not a count"),
        (lambda data: data.update(step=True), "not a count"),
        (lambda data: data.update(step=1.0), "not a count"),
        (lambda data: data.update(step="1"), "not a count"),
        (lambda data: data.update(step=HUGE), "not a count"),
        (lambda data: data["files"]["state.json"].update(bytes=True), "not a count"),
        (lambda data: data["files"]["state.json"].update(bytes=HUGE), "not a count"),
        (lambda data: data["files"]["state.json"].update(bytes=-1), "not a count"),
        (lambda data: data["files"]["state.json"].update(bytes=1 << 62), "do not add up"),
        (lambda data: _first(data).update(shape=[3, -4]), "not a count"),
        (lambda data: _first(data).update(shape=[True, 12]), "not a count"),
        (lambda data: _first(data).update(shape=[HUGE, 0]), "not a count"),
        (lambda data: _first(data).update(shape=[1 << 62, 4]), "'model.a' do not cover it"),
        (lambda data: _first(data).update(shape="34"), "not a count"),
        (lambda data: _first(data).update(shape=[4, 4]), "'model.a' do not cover it"),
        (lambda data: _first(data).update(shape=[12]), "'model.a' does not lie in the tensor"),
        (lambda data: _first(data).update(dtype="F4"), "'model.a' has an unknown dtype"),
        (lambda data: _first(data).update(shards=[]), "'model.a' do not cover it"),
        (lambda data: _first(data)["shards"].append(_first(data)["shards"][0]), "'model.a' do not cover it"),
        (lambda data: _first(data)["shards"][0].update(stop=[3, 5]), "'model.a' does not lie"),
        (lambda data: _first(data)["shards"][0].update(start=[HUGE, HUGE]), "not a count"),
        (lambda data: _first(data)["shards"][0].update(file="other.safetensors"), "does not list"),
        (lambda data: _first(data)["shards"][0].pop("file"), "manifest is damaged"),
        (lambda data: _first(data).update(dtype=["F32"]), "manifest is damaged|unknown dtype"),
        (lambda data: data.pop("files"), "manifest is damaged"),
        (lambda data: data.update(tensors=[1]), "manifest is damaged"),
        (lambda data: data.update(files=None), "manifest is damaged"),
    ],
)
def test_a_manifest_of_ill_will_with_a_fitting_digest(saved, change, match):
    tamper(saved, change)
    _refused(saved, match)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\\b", "a\0b", "a\n", "x" * 201, "C:x", "naïve"]
)
def test_no_name_leaves_the_directory(saved, name):
    (saved.parent / "x").write_text("secret")

    def rename_file(data):
        data["files"][name] = {"bytes": 6, "pieces": [[6, ""]]}

    original = (saved / MANIFEST).read_text()
    tamper(saved, rename_file)
    _refused(saved, "file name in the manifest is not allowed")
    (saved / MANIFEST).write_text(original)
    tamper(saved, lambda data: _first(data)["shards"][0].update(file=name))
    _refused(saved, "file name in the manifest is not allowed")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "7",
        '"text"',
        "{}",
        "[" * 100_000,
        '{"format":' * 50_000,
        '{"format": "orchestrator-checkpoint", "version": 1, "step": ' + "9" * 5000 + "}",
        '{"format": "orchestrator-checkpoint", "version": 1, "x": NaN}',
        "\ud800",
        "\0" * 100,
    ],
    ids=range(13),
)
def test_what_is_no_manifest_at_all(saved, text):
    (saved / MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
    _refused(saved)


@pytest.mark.parametrize("depth", [100, 300, 700, 2000])
def test_a_manifest_that_is_nested_deep(saved, depth):
    data = json.loads((saved / MANIFEST).read_text())
    name = next(iter(data["tensors"]))
    data["tensors"][name]["dtype"] = "deep"
    text = json.dumps(data).replace('"deep"', "[" * depth + "]" * depth)
    (saved / MANIFEST).write_text(text)
    _refused(saved)


def test_a_manifest_too_large_is_not_even_read(saved):
    with open(saved / MANIFEST, "r+b") as file:
        file.truncate((1 << 30) + 1)  # a hole: takes no space
    _refused(saved, "too large")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), junk=st.sampled_from([None, -1, True, HUGE, 1.5, "", "../x", [], {}, [[]], [None]]))
def test_any_value_replaced_by_junk_is_refused_or_harmless(saved, seed, junk):
    """Anything in the tree of the manifest, signed anew: a CheckpointError, or the same tensors as before."""
    good = json.loads((saved / MANIFEST).read_text())
    data, spots = copy.deepcopy(good), []

    def walk(value):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            spots.append((value, key))
            if isinstance(value[key], (dict, list)):
                walk(value[key])

    walk(data)
    place, key = random.Random(seed).choice(spots)
    place[key] = junk
    data["digest"] = _digest({name: value for name, value in data.items() if name != "digest"})
    (saved / MANIFEST).write_text(json.dumps(data))
    try:
        found = Checkpoint(saved)
        found.verify()
    except CheckpointError:
        pass
    else:
        # The digest itself, and keys and hashes that are text: their content is checked when the file is read.
        assert found.manifest.tensors.keys() <= good["tensors"].keys()
    finally:
        (saved / MANIFEST).write_text(json.dumps(good))
