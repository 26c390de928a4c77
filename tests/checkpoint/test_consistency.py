"""Hashes that fit are not enough: parts that contradict each other, and manifests that are work without end."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.checkpoint import format as format_module
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.consistency import contradictions
from orchestrator.checkpoint.format import STATE
from orchestrator.checkpoint.signing import trust
from orchestrator.checkpoint.storage import resolved
from orchestrator.config.convert import to_dict
from orchestrator.config.schema import ModelConfig, RunConfig
from orchestrator.errors import CheckpointError, ConfigError, ConfigErrors
from orchestrator.models.shapes import parameter_shapes
from orchestrator.runs.stored_model import model_of
from tests.lab.checkpoints import tamper, write_whole

MODEL = {"vocab_size": 32, "dim": 8, "layers": 2, "heads": 2, "kv_heads": 1, "mlp_dim": 16}
TENSORS = {f"model.{name}": torch.zeros(shape) for name, shape in parameter_shapes(ModelConfig(**MODEL))}
ROOT = Path(__file__).parents[2]


def _config(**model: object) -> dict:
    config = to_dict(RunConfig())
    config["model"].update({**MODEL, **model})
    return config


def _write(folder: Path, **options: object) -> Path:
    return write_whole(folder, TENSORS, **{"config": _config(), **options})


def test_what_was_written_means_what_it_says(tmp_path):
    checkpoint = Checkpoint(_write(tmp_path))
    assert list(contradictions(checkpoint)) == []
    assert model_of(checkpoint).vocab_size == 32


HUGE = {
    "layers": {"layers": 10_000},
    "dim": {"dim": 1 << 20},
    "mlp": {"mlp_dim": 1 << 22},
    "window of a table": {"positions": "learned", "max_seq_len": 1 << 30},
    "head": {"head_dim": 1 << 16},
    "fewer layers": {"layers": 1},
    "another kind": {"activation": "gelu"},
    "tied": {"tied_embeddings": True},
}
NEVER = {
    "layers": {"layers": 10**9},
    "dim": {"dim": 1 << 40},
    "vocabulary": {"vocab_size": 10**12},
    "no heads": {"heads": 0},
    "no context": {"max_seq_len": 0},
    "a norm of nothing": {"norm_eps": float("nan")},
    "a norm below nothing": {"norm_eps": -1.0},
    "a name": {"name": "\x1b[31m"},
    "a type": {"dim": None},
}


@pytest.mark.parametrize("change", HUGE.values(), ids=HUGE)
def test_a_strangers_model_is_held_against_the_manifest_before_it_is_built(tmp_path, change):
    checkpoint = Checkpoint(_write(tmp_path, config=_config(**change)))
    begin = time.process_time()
    with pytest.raises(CheckpointError, match="does not hold the model"):
        model_of(checkpoint)
    assert time.process_time() - begin < 2


@pytest.mark.parametrize("change", NEVER.values(), ids=NEVER)
def test_a_strangers_value_that_no_model_has(tmp_path, change):
    with pytest.raises(ConfigErrors) as caught:
        model_of(Checkpoint(_write(tmp_path, config=_config(**change))))
    assert str(caught.value).isascii()


STATES = {
    "no data": {"data": None},
    "a list": {"data": []},
    "no fingerprint": {"data": {"fingerprint": None}},
    "a number": {"data": {"fingerprint": 3}},
    "no batch": {"data": {"fingerprint": "x", "global_batch_sequences": None}},
    "a batch of nothing": {"data": {"fingerprint": "x", "global_batch_sequences": 0}},
    "another step": {"step": 7},
    "a layout of words": {"layout": {"fsdp": "x"}},
    "devices without end": {"devices": 1 << 70},
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_state_of_the_wrong_types(tmp_path, state):
    checkpoint = Checkpoint(_write(tmp_path, state={"step": 1, **state}))
    with pytest.raises(CheckpointError, match=r"state\.json"):
        checkpoint.state()
    assert len(list(contradictions(checkpoint))) == 1


def test_a_file_or_a_tensor_that_does_not_belong(tmp_path):
    path = _write(tmp_path)
    tamper(path, lambda data: data["files"].pop(STATE))
    assert list(contradictions(Checkpoint(path))) == ["state.json is missing"]
    path = write_whole(tmp_path, {**TENSORS, "optimizer.exp_avg.norm.weight": torch.zeros(9)}, 2, config=_config())
    found = list(contradictions(Checkpoint(path)))
    assert any("has shape (9,), its weight (8,)" in line for line in found)
    assert any("exp_avg.embed.weight is missing" in line for line in found)
    with pytest.raises(CheckpointError, match="does not hold"):
        model_of(Checkpoint(write_whole(tmp_path, {**TENSORS, "model.x": torch.zeros(1)}, 3, config=_config())))


def test_a_header_that_contradicts_the_manifest(tmp_path):
    path = _write(tmp_path)

    def swap(data: dict) -> None:
        one, other = (data["tensors"][f"model.layers.{n}.attn.q.weight"]["shards"][0] for n in (0, 1))
        one["key"] = other["key"]

    tamper(path, swap)
    found = list(contradictions(Checkpoint(path)))
    assert any("stands for several shards" in line for line in found)
    assert any("belongs to no tensor" in line for line in found)


def test_a_manifest_that_is_work_without_end(tmp_path, monkeypatch):
    path = _write(tmp_path, extra={"notes": b"x" * 5000})
    manifest = json.loads((path / "manifest.json").read_text())

    def pieces(data: dict) -> None:
        data["files"]["notes"]["pieces"] = [[1, "0" * 64]] * 5000

    tamper(path, pieces)
    with pytest.raises(CheckpointError, match="too many pieces of file 'notes'"):
        Checkpoint(path)
    (path / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(format_module, "MAX_TENSORS", 5)
    with pytest.raises(CheckpointError, match="too many tensors"):
        Checkpoint(path)


def test_a_key_that_is_no_plain_file(tmp_path):
    pytest.importorskip("cryptography")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * (1 << 17))
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path / "large", tmp_path, f"{tmp_path}/a\0b"):
        with pytest.raises(ConfigError):
            trust([str(path)], False)


def test_a_directory_that_is_a_link_to_itself(tmp_path):
    path = tmp_path / "step-00000001"
    path.symlink_to(path)
    with pytest.raises(CheckpointError, match="leads back to itself"):
        resolved(path)


@pytest.mark.parametrize("how", ["link", "pipe", "device", "folder"])
def test_the_recipe_reads_plain_files_alone(tmp_path, how):
    spec = importlib.util.spec_from_file_location("read_checkpoint", ROOT / "recipes" / "read_checkpoint.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    path = _write(tmp_path)
    assert {name: value.shape for name, value in recipe.read_tensors(path)}.keys() == TENSORS.keys()
    assert all(isinstance(value, np.ndarray) for _, value in recipe.read_tensors(path))
    for name in ("config.yaml", "manifest.json"):
        path = _write(tmp_path)
        (path / name).rename(tmp_path / "outside")
        if how == "link":
            (path / name).symlink_to(tmp_path / "outside")
        elif how == "pipe":
            os.mkfifo(path / name)
        elif how == "device":
            (path / name).symlink_to("/dev/zero")
        else:
            (path / name).mkdir()
        with pytest.raises(ValueError, match="no plain file"):
            list(recipe.read_tensors(path))
