"""Which run a command line means: by run_id, by the engine's job, by name; and that two runs never pass for one."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config.compose import compose
from orchestrator.config.convert import to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.errors import CheckpointError, ConfigError, ConfigErrors
from orchestrator.launch import plan
from orchestrator.launch.plan import Plan, find_plan
from orchestrator.launch.start import open_run
from orchestrator.runs import identity, listing, run_directory
from orchestrator.training.resolved import Resolved, read_resolved, resolve_run
from tests.lab.checkpoints import write_whole
from tests.runs.test_resume import TENSORS

ENGINES = {
    "own": ({"ORCHESTRATOR_RUN_ID": "mine", "SLURM_JOB_ID": "7"}, "mine"),
    "slurm": ({"SLURM_JOB_ID": "7"}, "slurm-7"),
    "two clusters": ({"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "north"}, "slurm-north-7"),
    "skypilot around slurm": ({"SKYPILOT_TASK_ID": "sky-1/a b", "SLURM_JOB_ID": "7"}, "sky-sky-1_a_b"),
    "torchrun": ({"TORCHELASTIC_RUN_ID": "abc"}, "torchrun-abc"),
    "torchrun without a name": ({"TORCHELASTIC_RUN_ID": "none"}, None),
    "ray": ({"RAY_JOB_ID": "01000000"}, "ray-01000000"),
    "none": ({}, None),
}


@pytest.fixture(autouse=True)
def _no_engine(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SKYPILOT_", "TORCHELASTIC_", "RAY_"))]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("case", ENGINES)
def test_the_name_that_an_engine_gives_a_job(case):
    environ, name = ENGINES[case]
    assert identity.job_of(environ) == name


def test_run_id_comes_before_the_engine_and_jobs_of_a_sweep_are_told_apart():
    config = compose(["run_id=mine"]).config
    assert identity.name_of(config, None, {"SLURM_JOB_ID": "7"}) == "mine"
    assert identity.name_of(config, 3, {}) == "mine-3"


def test_resume_auto_without_a_name_says_how_to_give_one():
    with pytest.raises(ConfigError, match="resume=auto needs to know which run this is") as caught:
        identity.name_of(RunConfig(), None, {})
    assert "run_id=NAME" in caught.value.fix
    assert "SLURM_JOB_ID" in caught.value.allowed


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "x" * 101, "two words", "tab\t"])
def test_a_run_id_that_is_no_folder_name_is_refused(name):
    with pytest.raises(ConfigErrors, match="run_id"):
        compose([f"run_id='{name}'"])


class Place:
    """A folder of runs, and what a command line makes of it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def settle(self, *words: str) -> Plan:
        return find_plan(compose([f"runs_dir={self.folder}", "model=tiny", *words]), main=True, alone=True)

    def add(self, name: str, stamp: str, *steps: int, **state) -> Path:
        run_dir = self.folder / name / stamp
        run_dir.mkdir(parents=True)
        words = [f"runs_dir={self.folder}", "model=tiny", f"name={name}"]
        config = compose(words).config
        run_directory.write_config(run_dir, config)
        for step in steps:
            self.save(run_dir, step, config, **state)
        os.utime(run_dir / "config.yaml", (10**9 + len(list(self.folder.glob("*/*"))),) * 2)
        return run_dir

    def save(self, run_dir: Path, step: int, config: RunConfig, **state) -> Path:
        state = {"data": {"fingerprint": "f", "global_batch_sequences": 16, "next_sequence": 16 * step}, **state}
        return write_whole(run_dir / "checkpoints", TENSORS, step=step, state=state, config=to_dict(config))


@pytest.fixture
def place(tmp_path, monkeypatch):
    # Which run is meant is decided before its model is looked at; these checkpoints hold none.
    monkeypatch.setattr(plan, "holds_model", lambda *unused: None)
    return Place(tmp_path / "runs")


def test_auto_starts_once_and_then_goes_on_under_one_command_line(place, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    words = ("resume=auto", "name=exp")
    first = place.settle(*words)
    assert (first.resume_from, first.run_dir, first.name) == (None, None, "slurm-41")
    run_dir = run_directory.create(first.config, first.name)
    assert run_dir == place.folder / "exp" / "slurm-41"
    run_directory.write_config(run_dir, first.config)
    again = place.settle(*words)
    assert (again.resume_from, again.name) == (None, "slurm-41"), "it ended before its first save"
    saved = place.save(run_dir, 10, first.config)
    # Another job of the same name has saved later.
    place.add("exp", "slurm-42", 20)
    plan = place.settle(*words)
    assert (plan.resume_from, plan.run_dir, plan.config.resume) == (saved, run_dir, "auto")
    monkeypatch.setenv("SLURM_JOB_ID", "43")
    assert place.settle(*words).resume_from is None, "another submission is another run"


def test_auto_with_the_weights_of_another_run_takes_them_at_the_first_start_only(place, monkeypatch):
    run_dir = place.add("exp", "mine", 10)
    plan = place.settle("resume=auto", "run_id=mine", "name=exp", "train.init_from=/gone")
    assert plan.run_dir == run_dir
    assert plan.config.train.init_from is None


def test_auto_ends_where_the_run_is_finished(place):
    place.add("exp", "mine", 300)
    plan = place.settle("resume=auto", "run_id=mine", "name=exp")
    assert plan.finished is not None
    assert "step 300 of train.max_steps=300" in plan.finished


def test_auto_does_not_start_over_where_all_checkpoints_are_damaged(place):
    run_dir = place.add("exp", "mine", 10)
    (run_dir / "checkpoints" / "step-00000010" / "state.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="no valid checkpoint was found"):
        place.settle("resume=auto", "run_id=mine", "name=exp")


def test_a_run_id_that_is_taken_is_refused_and_one_whose_start_failed_is_not(place):
    place.add("exp", "mine", 10)
    with pytest.raises(ConfigError, match="there is a run of this run_id already"):
        place.settle("run_id=mine", "name=exp")
    place.add("exp", "failed")
    assert place.settle("run_id=failed", "name=exp").name == "failed"


def test_latest_stays_within_what_the_command_line_asks_for(place):
    old, new = place.add("one", "1", 10), place.add("two", "1", 20)
    assert place.settle("resume=latest").run_dir == new
    assert place.settle("resume=latest", "name=one").run_dir == old
    with pytest.raises(CheckpointError, match="no run here is the one that is asked for: name=three") as caught:
        place.settle("resume=latest", "name=three")
    assert "name=two" in caught.value.got
    with pytest.raises(CheckpointError, match="model=tiny_gpt2"):
        place.settle("resume=latest", "model=tiny_gpt2")


def test_latest_does_not_go_over_to_another_experiment_while_the_newest_has_no_checkpoint(place, capsys):
    old, new = place.add("one", "1", 10), place.add("two", "1")
    assert place.settle("resume=latest").run_dir == old, "a start that failed is nothing"
    assert capsys.readouterr().err == "", "and is not warned of for ever"
    (new / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    os.utime(new / "metrics.jsonl", (2 * 10**9, 2 * 10**9))
    with pytest.raises(CheckpointError, match="the one before it has another name") as caught:
        place.settle("resume=latest")
    assert f"resume={old}" in caught.value.fix
    same = place.add("two", "0", 5)
    assert place.settle("resume=latest").run_dir == same


def test_the_folder_of_a_name_stands_for_its_newest_run(place):
    place.add("one", "1", 10)
    new = place.add("one", "2", 10)
    place.add("two", "1", 10)
    assert place.settle(f"resume={place.folder / 'one'}").run_dir == new
    assert listing.newest_run(str(place.folder)).parent.name == "two"


def test_a_run_that_moved_stays_the_same_run_and_one_that_branches_off_is_another(place, tmp_path):
    uuid = "0123456789abcdef" * 2
    elsewhere = Place(tmp_path / "elsewhere")
    run_dir = elsewhere.add("exp", "1", 10, 20, run=uuid)
    identity.adopt_uuid(run_dir, uuid)
    carried = tmp_path / "carried"
    (run_dir / "checkpoints" / "step-00000020").rename(carried)
    assert place.settle(f"resume={carried}").uuid == uuid
    place.add("exp", "1")
    identity.adopt_uuid(place.folder / "exp" / "1", uuid)
    assert place.settle(f"resume={carried}").uuid is None, "the run itself is here"
    identity.adopt_uuid(place.folder / "exp" / "1", "f" * 32)
    place.save(run_dir, 20, RunConfig(), run=uuid)
    assert place.settle(f"resume={run_dir / 'checkpoints' / 'step-00000010'}").uuid is None
    for wrong in ("../../x", 5, None, "0" * 31, "G" * 32):
        assert not identity.is_uuid(wrong)


def test_a_branch_does_not_take_the_name_of_its_run(place):
    run_dir = place.add("exp", "mine", 10, 20)
    plan = place.settle(f"resume={run_dir / 'checkpoints' / 'step-00000010'}")
    assert (plan.name, plan.config.run_id, plan.run_dir) == (None, None, None)


def test_two_runs_that_start_in_one_second_are_two(tmp_path):
    configs = [compose([f"runs_dir={tmp_path}", f"name={name}"]).config for name in "ab"]
    ids = {identity.uuid_of(run_directory.create(config)) for config in configs}
    assert len(ids) == 2


def _resolved(plan: Plan) -> Resolved:
    return resolve_run(plan.config, plan.target, 1, 257)


def test_nothing_is_left_of_a_start_that_failed_and_all_of_one_that_trained(place):
    run_dir = place.add("exp", "1")
    run_directory.write_run(run_dir, {"legs": []})
    (run_dir / "checkpoints" / "step-00000010").mkdir(parents=True)
    listing.discard_empty(run_dir)
    assert not run_dir.parent.exists()
    kept = [place.add("exp", "saved", 10), place.add("exp", "trained"), place.add("exp", "noted")]
    (kept[1] / "metrics.jsonl").write_text("{}\n")
    (kept[2] / "notes.txt").write_text("mine")
    for run_dir in kept:
        listing.discard_empty(run_dir)
        assert (run_dir / "config.yaml").exists()


def test_the_directory_of_a_run_that_another_process_is_starting_is_left_alone(place):
    """Submitted twice: the second finds it without a step, and held."""
    words = ("resume=auto", "run_id=mine", "name=exp")
    run_dir = place.add("exp", "mine")
    plan = replace(place.settle(*words), patient=False)
    with run_directory.lock(run_dir):
        with pytest.raises(CheckpointError, match="another process is training"), contextlib.ExitStack() as held:
            open_run(plan, _resolved(plan), held)
        assert (run_dir / "config.yaml").exists()


def test_a_start_that_comes_to_nothing_leaves_no_directory(place):
    with contextlib.ExitStack() as held:
        plan = place.settle("resume=auto", "run_id=mine", "name=exp")
        resolved = open_run(plan, _resolved(plan), held)
        run_dir = resolved.place.run_dir
        assert (run_dir / "config.yaml").exists()
        assert read_resolved(run_dir) == resolved, "its processes read what was decided"
    assert not run_dir.exists()


def test_a_job_that_starts_again_on_another_host_is_the_owner_of_its_checkpoints(tmp_path, monkeypatch):
    """Its run directory went with the host; in the store it left its uuid and its name."""
    written: dict[str, bytes] = {}
    monkeypatch.setattr(run_directory, "is_remote", lambda path: True)
    monkeypatch.setattr(run_directory.lease, "take_lease", lambda *unused: contextlib.nullcontext())
    monkeypatch.setattr(run_directory, "claim", lambda path, content: written.setdefault(str(path), content))
    hosts = [tmp_path / "first", tmp_path / "second", tmp_path / "stranger"]
    for host in hosts:
        host.mkdir()
    run_directory.hold(tmp_path / "store", hosts[0], "slurm-7")
    run_directory.hold(tmp_path / "store", hosts[1], "slurm-7")
    assert identity.uuid_of(hosts[0]) == identity.uuid_of(hosts[1])
    assert json.loads(next(iter(written.values())))["run_id"] == "slurm-7"
    for name in ("slurm-8", None):
        with pytest.raises(CheckpointError, match="another run keeps its checkpoints there"):
            run_directory.hold(tmp_path / "store", hosts[2], name)
