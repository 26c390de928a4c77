"""What docs/checkpoint-format.md promises to others: its reader, its schema, and how versions go on."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.checkpoint import format as format_module
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import MANIFEST
from orchestrator.checkpoint.reader import read_into
from orchestrator.distributed.exchange import SingleProcess
from orchestrator.errors import CheckpointError, DamagedError, MissingExtraError
from orchestrator.sharding.layout import Layout
from tests.lab.checkpoints import files_of, shards_of, tamper, write

ROOT = Path(__file__).parents[2]
READER = ROOT / "recipes" / "read_checkpoint.py"
TENSORS = {
    "model.a": torch.rand(5, 4),
    "model.b": torch.rand(7).bfloat16(),
    "model.c": torch.arange(24).reshape(2, 3, 4),
    "model.flags": torch.tensor([True, False, True]),
    "model.none": torch.zeros(0, 3),
    "optimizer.step.a": torch.tensor(3.0),
}


@pytest.fixture(scope="module")
def reader():
    spec = importlib.util.spec_from_file_location("read_checkpoint", READER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["sha256", "blake3"])
def saved(request, tmp_path):
    if request.param != "sha256":
        pytest.importorskip(request.param)
    layout = Layout(replicate=2, fsdp=2, tensor=2)
    shards = {rank: shards_of(TENSORS, layout, rank, {"model.a": 1}) for rank in range(layout.devices)}
    results = write(tmp_path, shards.__getitem__, layout.devices, hash=request.param)
    assert len(set(results)) == 1, results
    return results[0]


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_the_small_reader_reads_what_the_product_wrote_bit_for_bit(saved, reader):
    found = dict(reader.read_tensors(saved))
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].shape == tuple(tensor.shape)
        assert np.ascontiguousarray(found[name]).tobytes() == _bits(tensor)


def test_the_small_reader_is_small_and_needs_little():
    text = READER.read_text()
    assert len(text.splitlines()) <= 105
    code = f"import sys; sys.modules['torch'] = None; sys.argv = ['x']; import runpy; runpy.run_path({str(READER)!r})"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert "orchestrator." not in text


def test_the_small_reader_notices(saved, reader):
    for name in [*files_of(saved), MANIFEST]:
        content = (saved / name).read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            (saved / name).write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            with pytest.raises(Exception, match=r"."):
                dict(reader.read_tensors(saved))
        (saved / name).write_bytes(content)
    tamper(saved, lambda data: data["tensors"]["model.a"]["shards"].pop())
    with pytest.raises(ValueError, match="exactly once"):
        dict(reader.read_tensors(saved))


def test_the_small_reader_on_the_command_line(saved):
    result = subprocess.run([sys.executable, READER, saved], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == len(TENSORS)


def test_unknown_keys_are_ignored_and_part_of_the_digest(saved, reader):
    def add(data):
        data["note"] = {"anything": [1, "two"]}
        data["tensors"]["model.a"]["quantized"] = False
        data["tensors"]["model.a"]["shards"][0]["more"] = 1
        data["files"]["state.json"]["modified"] = "today"

    tamper(saved, add)
    Checkpoint(saved).verify()
    assert len(dict(reader.read_tensors(saved))) == len(TENSORS)
    text = (saved / MANIFEST).read_text()
    (saved / MANIFEST).write_text(text.replace("today", "later"))
    with pytest.raises(CheckpointError, match="digest does not match"):
        Checkpoint(saved)


def test_what_is_required_and_unknown_is_refused_by_name(saved, reader, monkeypatch):
    needs = json.loads((saved / MANIFEST).read_text()).get("requires", [])
    tamper(saved, lambda data: data.update(requires=[*needs]))
    Checkpoint(saved).verify()
    tamper(saved, lambda data: data.update(requires=[*needs, "compressed-pieces"]))
    with pytest.raises(CheckpointError, match="needs what this version does not know") as caught:
        Checkpoint(saved)
    assert "compressed-pieces" in str(caught.value.got)
    with pytest.raises(ValueError, match="compressed-pieces"):
        dict(reader.read_tensors(saved))
    monkeypatch.setattr(format_module, "FEATURES", frozenset({"compressed-pieces", "blake3"}))
    Checkpoint(saved).verify()


def test_the_kind_of_hash_is_part_of_what_is_required(saved, reader):
    """Hashes of one kind are not taken for those of another, by nobody."""
    blake3 = "requires" in json.loads((saved / MANIFEST).read_text())
    tamper(saved, lambda data: data.pop("requires") if blake3 else data.update(requires=["blake3"]))
    with pytest.raises(DamagedError):
        Checkpoint(saved).verify()
    with pytest.raises(DamagedError):
        Checkpoint(saved).state()
    with pytest.raises(DamagedError):
        read_into(Checkpoint(saved), shards_of(TENSORS, Layout(), 0), check=SingleProcess())
    with pytest.raises(ValueError, match="is damaged in bytes"):
        dict(reader.read_tensors(saved))


def test_a_hash_whose_library_is_missing_is_named(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "blake3", None)
    if "requires" not in json.loads((saved / MANIFEST).read_text()):
        Checkpoint(saved).verify()
        return
    with pytest.raises(MissingExtraError, match=r"BLAKE3[\s\S]*do:[\s\S]*blake3"):
        Checkpoint(saved)


@pytest.mark.parametrize("junk", [None, 5, "ab", {}, [1], [None], [[]]])
def test_a_requirement_that_is_none(saved, junk):
    tamper(saved, lambda data: data.update(requires=junk))
    with pytest.raises(CheckpointError):
        Checkpoint(saved)


def test_the_schema_holds_for_what_is_written_and_not_for_what_is_not(saved):
    import jsonschema_rs

    schema = json.loads(Path(format_module.__file__).with_name("manifest.schema.json").read_text())
    jsonschema_rs.meta.validate(schema)
    validator = jsonschema_rs.Draft202012Validator(schema)
    good = json.loads((saved / MANIFEST).read_text())
    validator.validate(good)
    for change in (
        lambda data: data.pop("step"),
        lambda data: data["files"]["state.json"].update(bytes=-1),
        lambda data: data["files"]["state.json"]["pieces"][0].append(1),
        lambda data: data["tensors"].update({"a b": good["tensors"]["model.a"]}),
        lambda data: data["tensors"]["model.a"].update(dtype="F8"),
        lambda data: data["tensors"]["model.a"]["shards"][0].pop("stop"),
    ):
        bad = json.loads(json.dumps(good))
        change(bad)
        assert not validator.is_valid(bad)


def test_what_only_the_schema_forbids_is_refused(saved, monkeypatch):
    """It is really used: a manifest that all other checks let through."""
    stricter = json.loads(Path(format_module.__file__).with_name("manifest.schema.json").read_text())
    stricter["properties"]["step"] = {"const": 77}
    import jsonschema_rs

    monkeypatch.setattr(format_module, "schema", lambda: jsonschema_rs.Draft202012Validator(stricter))
    with pytest.raises(CheckpointError, match="the manifest is damaged: 77 was expected"):
        Checkpoint(saved)
