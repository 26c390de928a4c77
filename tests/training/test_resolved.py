"""The record of a run with nothing left open: what is decided, and that a file is believed only where it is one."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.compose import compose
from orchestrator.config.convert import to_dict
from orchestrator.config.launch_schema import LaunchBase
from orchestrator.config.schema import MuonConfig, RunConfig
from orchestrator.errors import ConfigError, LayoutError
from orchestrator.hardware.target_table import get_target
from orchestrator.runs.run_directory import RunPaths
from orchestrator.sharding.layout import Layout
from orchestrator.training.resolved import (
    DECIDED,
    LEFT_OPEN,
    Resolved,
    flat,
    read_resolved,
    resolve_run,
    write_resolved,
)

# By the word `auto`, which their types do not tell from any other text.
TEXTS = {"hardware.chip", "hardware.compilation_cache", "resume"}


def _resolved(*words: str, devices: int = 4) -> Resolved:
    config = compose(["model=tiny", "train.seq_len=128", "train.global_batch_tokens=4096", *words]).config
    return resolve_run(config, get_target("cpu"), devices, 4000)


def _may_be_auto(cls: type, prefix: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _may_be_auto(hint, f"{prefix}{name}.")
        literals = [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is typing.Literal]
        if any("auto" in typing.get_args(part) for part in literals):
            yield prefix + name


def test_every_auto_of_the_schema_is_decided_or_left_open_for_a_reason():
    # Groups of several classes are looked at by one of them.
    groups = {*_may_be_auto(MuonConfig, "optim."), *_may_be_auto(LaunchBase, "launch.")}
    found = {*_may_be_auto(RunConfig), *groups, *TEXTS}
    assert found | {"layout.stage_layers"} == {*DECIDED, *LEFT_OPEN}, "an empty list is open, too"
    assert not set(DECIDED) & set(LEFT_OPEN)


def test_what_is_open_is_decided_and_what_the_user_has_said_is_kept():
    resolved = _resolved("layout.tensor=2", "optim=muon", "hardware.precision=bf16")
    config, asked = resolved.config, resolved.asked
    assert resolved.layout == Layout(fsdp=2, tensor=2)
    assert (config.hardware.target, config.hardware.devices, resolved.precision) == ("cpu", 4, "bf16")
    assert (resolved.chip, config.hardware.chip) == (None, "unknown")
    assert (resolved.micro_batch, resolved.remat, config.model.vocab_size) == (16, "none", 4096)
    assert (config.optim.ns_dtype, config.checkpoint.handover.seq_len, config.data.tokenizer.kind) == (
        "fp32",
        16,
        "bpe",
    )
    decided = {key for key, value in flat(to_dict(config)) if value != dict(flat(to_dict(asked)))[key]}
    assert decided <= set(DECIDED)
    assert {key for key, value in flat(to_dict(asked)) if value == "auto"} - decided <= {*LEFT_OPEN, "layout.name"}


def test_the_layers_of_a_pipeline_are_divided_by_their_cost():
    resolved = _resolved("layout.pipeline=4", "model.layers=8", "model.dim=128", "train.global_batch_tokens=8192")
    assert len(resolved.layout.stage_layers) == 4
    assert sum(resolved.layout.stage_layers) == 8
    assert resolved.layout.stage_layers[-1] < 2, "the last stage has the head"
    assert resolved.micro_batch == 4, "four micro-batches for each rank"
    assert Resolved.from_dict(resolved.to_dict()) == resolved
    kept = _resolved("layout.pipeline=4", "model.layers=8", "layout.stage_layers=[1,2,3,2]")
    assert kept.layout.stage_layers == (1, 2, 3, 2)


def test_degrees_that_do_not_fit_are_an_error():
    with pytest.raises(LayoutError, match="does not fit the devices"):
        _resolved("layout.tensor=3")


@pytest.fixture
def written(tmp_path) -> tuple[Resolved, Path]:
    paths = RunPaths(tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "step-00000010")
    resolved = replace(_resolved(), paths=paths, data="ab12", takes_older=True, why="planned")
    write_resolved(tmp_path, resolved)
    return resolved, tmp_path / "resolved.json"


def test_it_comes_back_from_its_file_as_it_was(written):
    resolved, path = written
    assert read_resolved(path.parent) == resolved


CHANGES: dict[str, tuple[Any, str]] = {
    "of another version": ({"version": 2}, "another kind or version"),
    "of another kind": ({"format": "orchestrator-plan"}, "another kind or version"),
    "without a key": ({"why": None}, "why is None"),
    "a key too many": ({"more": 1}, "missing or unknown: 'more'"),
    "devices as text": ({"devices": "4"}, "devices is '4'"),
    "devices as a truth value": ({"devices": True}, "devices is True"),
    "other devices": ({"devices": 8}, "does not fit the devices"),
    "half a place": ({"checkpoints": None}, "in its directory and in that of its checkpoints"),
    "a store of no known kind": ({"checkpoints": "ftp://host/x"}, "no resolved run"),
    "left open": ({"config.layout.fsdp": "auto"}, "layout.fsdp is left open"),
    "a degree below one": ({"config.layout.fsdp": -4, "config.layout.tensor": -1}, "layout.fsdp"),
    "not what was asked for": ({"config.train.max_steps": 7}, "train.max_steps is not what was asked for"),
    "a key that there is not": ({"config.train.speed": 7}, "train.speed"),
    "a value of another type": ({"asked.seed": "x"}, "seed"),
    "a size beyond bounds": ({"config.model.dim": -1, "asked.model.dim": -1}, "model.dim"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_is_not_one_is_one_clear_error(written, name):
    _, path = written
    changes, said = CHANGES[name]
    data = json.loads(path.read_text())
    for key, value in changes.items():
        *parents, last = key.split(".")
        part = data
        for parent in parents:
            part = part[parent]
        part[last] = value
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="this is no resolved run") as caught:
        read_resolved(path.parent)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b'{"format": 1, "format": 2}', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_record_at_all_is_one_clear_error(written, content):
    _, path = written
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="this is no resolved run"):
        read_resolved(path.parent)
    path.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        read_resolved(path.parent)


def test_what_processes_must_have_in_common_is_told_from_what_each_host_has_of_its_own():
    first, other = _resolved(), _resolved("optim.lr=1e-4", "data.workers=3", "hardware.threads=2", "runs_dir=/scratch")
    assert other.differences(first) == ["optim.lr=0.0001 (rank 0: 0.003)"]
    assert replace(first, data="ab").differences(replace(first, data="cd")) == ["data ab (rank 0: cd)"]
    assert first.differences(_resolved()) == []
