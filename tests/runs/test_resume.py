"""Where a resumed run goes on, and with which configuration."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import yaml

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import MANIFEST
from orchestrator.config.compose import compose
from orchestrator.config.convert import to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.errors import CheckpointError, ConfigError, ConfigErrors
from orchestrator.runs import resume, run_directory
from tests.lab.checkpoints import write_whole

TENSORS = {"model.a": torch.arange(4.0)}


class Runs:
    """Run directories with checkpoints, the first the oldest."""

    def __init__(self, folder: Path):
        self.folder, self.said = folder, []

    def add(self, stamp: str, *steps: int, age: int = 0, **changes) -> Path:
        run_dir = self.folder / "tiny" / stamp
        run_dir.mkdir(parents=True)
        config = replace(RunConfig(), runs_dir=str(self.folder), **changes)
        run_directory.write_config(run_dir, config)
        for step in steps:
            write_whole(run_directory.checkpoints_dir(run_dir, config), TENSORS, step=step)
        os.utime(run_dir / "config.yaml", (10**9 - age, 10**9 - age))
        return run_dir

    def find(self, what: object = "latest", verify: bool = True) -> resume.ResumePoint:
        return resume.find(str(what), str(self.folder), verify, self.said.append)


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path / "runs")


def _damage(checkpoint: Path) -> None:
    data = (checkpoint / "state.json").read_bytes()
    (checkpoint / "state.json").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def _step(path: Path, step: int) -> Path:
    return path / "checkpoints" / f"step-{step:08d}"


def test_latest_is_the_run_that_was_worked_on_last(runs):
    old, new = runs.add("2", 10, age=100), runs.add("1", 10, 20)
    found = runs.find()
    assert (found.directory, found.run_dir, found.saved) == (_step(new, 20), new, {"name": "test", "seed": 1})
    (old / "metrics.jsonl").write_text("")
    os.utime(old / "metrics.jsonl", (2 * 10**9, 2 * 10**9))
    assert runs.find().run_dir == old


def test_latest_passes_over_a_run_without_a_checkpoint(runs):
    old = runs.add("1", 10, age=100)
    runs.add("2")
    assert runs.find().directory == _step(old, 10)


def test_a_run_directory_goes_on_from_its_newest_valid_checkpoint(runs):
    run = runs.add("1", 10, 20, 30)
    _damage(_step(run, 30))
    (_step(run, 20) / MANIFEST).unlink()
    point = runs.find(run)
    assert (point.directory, point.run_dir) == (_step(run, 10), run)
    assert len(runs.said) == 1
    assert "step-00000030" in runs.said[0]


def test_checkpoints_elsewhere_are_found_through_the_run(runs, tmp_path):
    config = replace(RunConfig().checkpoint, dir=str(tmp_path / "fast"))
    run = runs.add("1", 10, checkpoint=config)
    assert runs.find(run).directory == tmp_path / "fast" / "tiny" / "1" / "step-00000010"


def test_the_newest_checkpoint_goes_on_in_its_run(runs):
    run = runs.add("1", 10, 20)
    for path in (_step(run, 20), f"{_step(run, 20)}/"):
        point = runs.find(path)
        assert (point.directory, point.run_dir) == (_step(run, 20), run)


def test_a_relative_path_is_the_same(runs, monkeypatch):
    run = runs.add("1", 10)
    monkeypatch.chdir(_step(run, 10))
    assert runs.find(".").run_dir == run
    monkeypatch.chdir(run)
    assert runs.find(".").directory.resolve() == _step(run, 10)


def test_an_older_checkpoint_branches_off(runs):
    run = runs.add("1", 10, 20)
    point = runs.find(_step(run, 10))
    assert (point.directory, point.run_dir) == (_step(run, 10), None)


def test_the_newest_checkpoint_of_a_checkpoint_dir_of_ones_own_goes_on_in_its_run(runs, tmp_path):
    """With `checkpoint.dir` the checkpoint does not lie in the run directory; their names tell that they belong."""
    run = runs.add("1")
    elsewhere = tmp_path / "elsewhere" / run.parent.name / run.name
    write_whole(elsewhere, TENSORS, step=10, config={"runs_dir": str(runs.folder)})
    found = runs.find(elsewhere / "step-00000010").run_dir
    assert found is not None
    assert found.resolve() == run.resolve()


def test_a_run_with_an_unreadable_configuration_is_passed_over(runs):
    good, bad = runs.add("1", 10), runs.add("2", 20)
    (bad / "config.yaml").write_text("}{")
    assert runs.find("latest").directory.resolve() == _step(good, 10).resolve()
    assert any("2" in line for line in runs.said)


def test_a_checkpoint_that_was_carried_here_starts_a_new_run(runs, tmp_path):
    for name in ("step-00000007", "from-the-other-cloud"):
        write_whole(tmp_path / "carried", TENSORS, step=7).rename(tmp_path / name)
        assert runs.find(tmp_path / name).run_dir is None


@pytest.mark.parametrize("what", ["latest", "run"])
def test_nothing_valid_there(runs, what):
    run = runs.add("1", 10)
    _damage(_step(run, 10))
    with pytest.raises(CheckpointError, match="no valid checkpoint was found"):
        runs.find(run if what == "run" else what)
    assert len(runs.said) == 2, "the damaged checkpoint, and the run that has no other"
    assert runs.find(run, verify=False).directory == _step(run, 10)


def test_nothing_there_at_all(runs, tmp_path):
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        runs.find("latest")
    (tmp_path / "file").write_text("")
    for what in (tmp_path / "nowhere", tmp_path, tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="no checkpoint was found here") as caught:
            runs.find(what)
        assert "latest, a run directory" in caught.value.allowed


@pytest.mark.parametrize("kind", ["gone", "file", "uncommitted", "damaged"])
def test_a_checkpoint_that_is_asked_for_is_not_replaced_by_another(runs, kind):
    run = runs.add("1", 10, 20)
    path = _step(run, 20)
    if kind == "damaged":
        _damage(path)
    elif kind == "uncommitted":
        (path / MANIFEST).unlink()
    else:
        path.rename(run / "aside")
        if kind == "file":
            path.write_text("")
    with pytest.raises(CheckpointError):
        runs.find(path)


# The configuration


def _saved(**changes) -> dict:
    return to_dict(replace(compose(["model=tiny_gpt2", "optim.lr=1e-3", "train.seq_len=64"]).config, **changes))


def _point(saved: dict, run_dir: Path | None = None) -> resume.ResumePoint:
    checkpoint = cast(Checkpoint, SimpleNamespace(directory=Path("/carried/step-00000001")))
    return resume.ResumePoint(checkpoint, run_dir, saved)


def _merge(*overrides: str, saved: dict | None = None, run_dir: Path | None = None, said: list | None = None):
    return resume.merge(
        _point(saved or _saved(), run_dir), compose(overrides), [].append if said is None else said.append
    )


def test_without_overrides_nothing_changes_but_resume():
    assert _merge("resume=latest") == replace(
        compose(["model=tiny_gpt2", "optim.lr=1e-3", "train.seq_len=64"]).config, resume="latest"
    )


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ([], ["optim=sgd"]),
        (["optim=muon"], ["optim=adamw"]),
        ([], ["optim._target_=torch.optim.RAdam"]),
        (["optim._target_=torch.optim.RAdam"], ["optim._target_=torch.optim.NAdam"]),
    ],
)
def test_a_resumed_run_keeps_its_optimizer(saved, words):
    with pytest.raises(ConfigError, match="a resumed run keeps its optimizer") as caught:
        _merge(*words, saved=to_dict(compose(["model=tiny_gpt2", *saved]).config))
    assert "train.init_from=/carried/step-00000001" in caught.value.fix


def test_an_optimizer_of_the_users_has_to_be_named_again():
    saved = to_dict(compose(["optim._target_=torch.optim.RAdam", "optim.lr=0.5", "optim.arguments.eps=1e-6"]).config)
    with pytest.raises(ConfigErrors, match=r"optim\._target_=torch\.optim\.RAdam"):
        _merge(saved=saved)
    merged = _merge("optim._target_=torch.optim.RAdam", saved=saved)
    # Named, and otherwise as it was saved.
    assert (merged.optim.lr, merged.optim.arguments) == (0.5, {"eps": 1e-6})


def test_the_saved_optimizer_keeps_its_keys():
    saved = to_dict(compose(["optim=muon", "optim.lr=0.5", "optim.adamw.lr=0.25"]).config)
    merged = _merge("optim.lr=0.1", saved=saved)
    assert (merged.optim.name, merged.optim.lr, merged.optim.adamw.lr) == ("muon", 0.1, 0.25)


def test_a_key_replaces_that_key():
    merged = _merge("resume=latest", "train.max_steps=7", "optim.schedule.warmup_steps=3")
    assert (merged.train.max_steps, merged.train.seq_len) == (7, 64)
    assert (merged.optim.schedule.warmup_steps, merged.optim.lr) == (3, 1e-3)
    assert merged.model.name == "tiny_gpt2"


def test_a_group_replaces_that_group():
    saved = _saved(hardware=replace(RunConfig().hardware, target="cuda", devices=8, precision="bf16"))
    merged = _merge("hardware=cpu", "layout=tensor", saved=saved)
    assert merged.hardware == compose(["hardware=cpu"]).config.hardware
    assert merged.layout.tensor == "auto"
    assert merged.optim.lr == 1e-3


def test_a_tpu_run_goes_on_through_another_library():
    saved = _saved(hardware=replace(RunConfig().hardware, target="tpu"))
    del saved["hardware"]["runtime"]  # as of a version that had one library only
    assert _merge("resume=latest", saved=saved).hardware.runtime == "auto"
    merged = _merge("resume=latest", "hardware.runtime=torch_tpu", saved=saved)
    assert (merged.hardware.target, merged.hardware.runtime) == ("tpu", "torch_tpu")
    assert _merge("resume=latest", "hardware=cuda", saved=to_dict(merged)).hardware.runtime == "auto"


def test_a_key_of_a_group_that_is_replaced_too():
    merged = _merge("hardware.devices=3", "hardware=cpu")
    assert (merged.hardware.target, merged.hardware.devices) == ("cpu", 3)


def _own(runs, **changes) -> tuple[dict, Path]:
    run_dir = runs.add("1", 10, **changes)
    return to_dict(replace(RunConfig(), runs_dir=str(runs.folder), **changes)), run_dir


def test_a_new_variable_of_the_environment(runs):
    saved, run_dir = _own(runs, hardware=replace(RunConfig().hardware, environment={"OLD": "1"}))
    words = (f"runs_dir={runs.folder}", "+hardware.environment.NEW=x")
    assert _merge(*words, saved=saved, run_dir=run_dir).hardware.environment == {"OLD": "1", "NEW": "x"}


HOSTILE = {
    "hardware": replace(RunConfig().hardware, environment={"LD_PRELOAD": "/tmp/evil.so"}),
    "checkpoint": replace(
        RunConfig().checkpoint,
        signing_key="/home/me/key.pem",
        model_signing_key="/home/me/ec.pem",
        statement=True,
        dir="s3://evil/place",
        keep_last=7,
    ),
    "runs_dir": "/etc/cron.d",
}


def test_a_strangers_checkpoint_sets_no_environment_and_uses_no_key_and_no_place(runs):
    said: list[str] = []
    merged = _merge(saved=_saved(**HOSTILE), said=said)
    assert merged.hardware.environment == {}
    assert (merged.checkpoint.signing_key, merged.checkpoint.dir, merged.runs_dir) == (None, "auto", "runs")
    assert (merged.checkpoint.model_signing_key, merged.checkpoint.statement) == (None, False)
    assert (merged.checkpoint.keep_last, merged.train.seq_len) == (7, 64), "the rest is the saved run's"
    keys = ("signing_key", "model_signing_key", "statement", "dir")
    assert [text.split()[2] for text in said] == ["hardware.environment", *(f"checkpoint.{key}" for key in keys)]


def test_a_strangers_checkpoint_does_not_pass_for_one_of_a_run_here(runs):
    """It names a run directory that is there; what counts is what that says, not the checkpoint."""
    _, run_dir = _own(runs)
    merged = _merge(f"runs_dir={runs.folder}", saved=_saved(**HOSTILE), run_dir=run_dir)
    assert (merged.hardware.environment, merged.checkpoint.signing_key) == ({}, None)
    elsewhere = _merge(saved=_saved(**HOSTILE), run_dir=run_dir)
    assert elsewhere.hardware.environment == {}, "a run directory that is none of runs_dir is a stranger's too"


def test_where_a_checkpoint_was_found_the_run_goes_on_keeping_others(runs, tmp_path):
    place = replace(RunConfig().checkpoint, dir="/carried")
    assert _merge(saved=_saved(checkpoint=place)).checkpoint.dir == "/carried"


@pytest.mark.parametrize("junk", [{"hardware": 5}, {"checkpoint": []}, {"train": None}, {"optim": {"lr": {}}}])
def test_a_saved_configuration_that_is_none(junk):
    with pytest.raises(ConfigErrors):
        _merge("train.max_steps=7", saved={**_saved(), **junk})


def test_settings_of_hydra_are_not_the_runs():
    assert _merge("hydra.verbose=true") == _merge()


@pytest.fixture
def own(tmp_path):
    folder = tmp_path / "own" / "experiment"
    folder.mkdir(parents=True)
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text("# @package _global_\ntrain: {seq_len: 32}\n")
    return str(folder.parent)


def test_a_resumed_run_keeps_its_experiment(own):
    saved = _saved(experiment="one")
    assert resume.merge(_point(saved), compose(["experiment=one", "seed=3"], own)).experiment == "one"
    assert resume.merge(_point(saved), compose(["experiment=one"], own)).train.seq_len == 64
    assert _merge(saved=saved).experiment == "one"
    with pytest.raises(ConfigError, match="a resumed run keeps its experiment") as caught:
        resume.merge(_point(saved), compose(["experiment=two"], own))
    assert (caught.value.got, caught.value.allowed) == ("experiment=two", "experiment=one")


def test_the_saved_data_is_not_changed():
    saved = _saved()
    before = yaml.safe_dump(saved)
    _merge("train.max_steps=7", "hardware=cpu", saved=saved)
    assert yaml.safe_dump(saved) == before


def test_a_saved_configuration_of_another_version_is_refused_with_its_keys():
    with pytest.raises(ConfigErrors, match=r"no key 'optim\.momentum'"):
        _merge(saved={**_saved(), "optim": {"momentum": 0.9}})
