"""Runs that keep their checkpoints in an object store, through the command line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

pytest.importorskip("s3fs")
pytest.importorskip("moto")
pytest.importorskip("gcp_storage_emulator")

from orchestrator.checkpoint import storage, store_timeouts
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.reader import read_into
from orchestrator.checkpoint.run_checkpoints import committed
from orchestrator.checkpoint.storage import children, locate, write_file
from orchestrator.config.convert import to_dict
from orchestrator.runs import shared_folder
from orchestrator.sharding.shard import Shard
from tests.lab.cli import only_run, run
from tests.lab.ranks import run_ranks
from tests.lab.runs import checkpoint, losses, read_rows, resolved_run, small_config, small_overrides
from tests.lab.slow import cases, slow
from tests.lab.store import reachable, serve
from tests.lab.tensors import read_all

# What a store's library does is tested in tests/checkpoint; here, once each, that runs get there.
on_s3 = pytest.mark.parametrize("server", ["s3"], indirect=True)
on_each = pytest.mark.parametrize("server", cases(["s3", "gs"], quick=["s3"]), indirect=True)
DTYPES = {"F32": torch.float32, "I64": torch.int64}


@pytest.fixture(scope="module")
def server(request):
    with serve(request.param) as store, reachable(store):
        yield store


@pytest.fixture(autouse=True)
def _healthy(server, monkeypatch):
    monkeypatch.setattr(store_timeouts, "_PAUSE_SECONDS", 0.01)
    server.faults.clear()


def _everything(path) -> dict[str, torch.Tensor]:
    found = Checkpoint(path)
    found.verify()
    shards = [
        Shard(name, t.shape, tuple(slice(0, size) for size in t.shape), torch.zeros(t.shape, dtype=DTYPES[t.dtype]))
        for name, t in found.manifest.tensors.items()
    ]
    read_into(found, shards)
    return {shard.name: shard.data for shard in shards}


def _train(*words, code=0):
    result = run("train", *words)
    assert result.returncode == code, result.stderr
    return result


@on_s3
def test_a_run_saves_there_and_goes_on_from_there_also_on_another_machine(server, tmp_path):
    """Ten steps, the machine is lost with its run directory, ten more on another layout: the weights of twenty."""
    place = f"{server.place}/moves"
    words = small_overrides(tmp_path, "hardware.devices=2", "layout.fsdp=2", "optim.schedule.kind=constant")
    _train(*words, f"runs_dir={tmp_path / 'whole'}")
    whole = only_run(tmp_path / "whole")

    first = _train(*words, f"checkpoint.dir={place}", "train.max_steps=10")
    run_dir = only_run(tmp_path / "runs")
    kept = locate(place) / run_dir.parent.name / run_dir.name
    assert f"saved {kept}/step-00000010" in first.stdout
    assert not (run_dir / "checkpoints").exists()
    write_file(kept / "step-00000015" / "rank-00000.safetensors", [b"left by a save that was killed"])

    # In place: the run directory is here.
    again = _train(f"runs_dir={tmp_path / 'runs'}", "resume=latest", "train.max_steps=20")
    assert "resumed at step 10" in again.stdout
    assert only_run(tmp_path / "runs") == run_dir
    assert [path.name for path in committed(kept)] == ["step-00000020", "step-00000010"]
    assert not storage.there(kept / "step-00000015")
    assert losses(read_rows(run_dir)) == losses(read_rows(whole))
    found, wanted = _everything(kept / "step-00000020"), read_all(checkpoint(whole))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    # Elsewhere: nothing is here but the address; by checkpoint, and as the newest of the store.
    shutil.rmtree(tmp_path / "runs")
    fresh = (f"runs_dir={tmp_path / 'elsewhere'}", "train.max_steps=22", "hardware.devices=1", "layout.fsdp=1")
    named = _train(*fresh, f"resume={kept}/step-00000020")
    assert "resumed at step 20" in named.stdout
    moved = only_run(tmp_path / "elsewhere")
    assert json.loads((moved / "run.json").read_text())["legs"][-1]["resumed_from"] == f"{kept}/step-00000020"
    assert [path.name for path in committed(locate(place) / moved.parent.name / moved.name)] == ["step-00000022"]
    shutil.rmtree(tmp_path / "elsewhere")
    latest = _train(f"runs_dir={tmp_path / 'third'}", "resume=latest", f"checkpoint.dir={place}", "train.max_steps=24")
    assert "resumed at step 22" in latest.stdout


@on_s3
@slow
def test_a_store_that_fails_for_a_while_costs_that_checkpoint_and_no_more(server, tmp_path):
    place = f"{server.place}/fails"
    server.fail(r"^COMMIT .*/step-00000005/manifest\.json", status=403)
    words = small_overrides(tmp_path, f"checkpoint.dir={place}", "checkpoint.every_steps=5", "train.max_steps=10")
    result = _train(*words)
    assert "warning: the checkpoint of step 5 could not be written: told to fail" in result.stdout
    run_dir = only_run(tmp_path / "runs")
    assert [path.name for path in children(locate(place) / run_dir.parent.name / run_dir.name)] == [
        "owner.json",
        "step-00000010",
    ]


@on_each
def test_a_place_that_cannot_be_written_is_said_before_the_training(server, tmp_path):
    words = small_overrides(tmp_path, f"checkpoint.dir={server.scheme}://no-such-bucket/x")
    result = _train(*words, code=2)
    assert "error: the directory of the checkpoints cannot be written: " in result.stderr
    assert "bucket" in result.stderr.replace("no-such-bucket/x", "")
    assert "Traceback" not in result.stderr
    assert "model      " not in result.stdout


@slow
@on_each
def test_a_run_goes_on_and_another_of_its_name_is_refused(server, tmp_path):
    """Two machines that do not see each other, and started in the same second."""
    place = f"{server.place}/shared"
    _train(*small_overrides(tmp_path, f"checkpoint.dir={place}", "train.max_steps=2", "checkpoint.every_steps=null"))
    again = _train(f"runs_dir={tmp_path / 'runs'}", "resume=latest", "train.max_steps=4")
    assert "resumed at step 2" in again.stdout
    run_dir = only_run(tmp_path / "runs")
    kept = locate(place) / run_dir.parent.name / run_dir.name
    assert [path.name for path in committed(kept)] == ["step-00000004", "step-00000002"]
    assert _everything(kept / "step-00000004")
    other = tmp_path / "other machine" / run_dir.parent.name / run_dir.name
    other.mkdir(parents=True)
    shutil.copy(run_dir / "config.yaml", other)
    result = _train(f"resume={other}", f"runs_dir={other.parent.parent}", "train.max_steps=6", code=2)
    assert "another run keeps its checkpoints there" in result.stderr
    assert str(run_dir) in result.stderr


@on_s3
@slow
def test_the_last_save_goes_to_the_run_directory_where_the_store_does_not_take_it(server, tmp_path):
    """It is said where it is; the run is finished; and `latest` finds it, newer than what the store has."""
    place = f"{server.place}/gone"
    server.fail(r"^(COMMIT|START) .*/step-00000010/", status=403)
    words = small_overrides(
        tmp_path,
        f"checkpoint.dir={place}",
        "checkpoint.every_steps=5",
        "train.max_steps=10",
        "optim.schedule.kind=constant",
    )
    result = _train(*words)
    run_dir = only_run(tmp_path / "runs")
    last = checkpoint(run_dir, 10)
    assert f"saved      in {last}, and not in {place}" in result.stdout
    assert f"continue   python -m orchestrator train resume={last}" in result.stdout
    assert "warning: the checkpoint of step 10 could not be written: told to fail" in result.stdout
    facts = json.loads((run_dir / "run.json").read_text())
    assert facts["status"] == "finished"
    assert facts["legs"][-1]["saved_elsewhere"]["checkpoint"] == str(last)
    Checkpoint(last).verify()
    kept = locate(place) / run_dir.parent.name / run_dir.name
    assert [path.name for path in committed(kept)] == ["step-00000005"]

    server.faults.clear()
    again = _train(f"runs_dir={tmp_path / 'runs'}", "resume=latest", "train.max_steps=12")
    assert "resumed at step 10" in again.stdout
    assert committed(kept)[0].name == "step-00000012"
    assert [path.name for path in committed(last.parent)] == ["step-00000010"]


def _work_there(world, data, kept, run_dirs):
    from orchestrator.config.convert import from_dict
    from orchestrator.config.schema import RunConfig
    from orchestrator.errors import SaveError
    from orchestrator.launch.run import work

    resolved = resolved_run(from_dict(RunConfig, data), world, run_dirs[world.rank], checkpoints=locate(kept))
    try:
        return work(resolved, world)
    except SaveError as error:
        return str(error)


@on_s3
@pytest.mark.parametrize(
    "seen", [True, pytest.param(False, marks=slow)], ids=["a shared run directory", "one for each"]
)
def test_ranks_save_to_their_run_directory_together_or_not_at_all(server, tmp_path, monkeypatch, seen):
    monkeypatch.setattr(shared_folder, "WAIT_SECONDS", 0.3)
    kept = f"{server.place}/ranks-{seen}"
    words = ("layout.fsdp=2", "train.max_steps=2", "checkpoint.handover.enabled=false", f"checkpoint.dir={kept}")
    run_dirs = [tmp_path / "run", tmp_path / ("run" if seen else "another")]
    for run_dir in run_dirs:
        run_dir.mkdir(exist_ok=True)
    server.fail(r"^COMMIT .*/rank-00001", status=403)
    codes = run_ranks(2, _work_there, to_dict(small_config(tmp_path, *words)), kept, run_dirs)
    facts = json.loads((run_dirs[0] / "run.json").read_text())
    if seen:
        assert codes == [0, 0]
        Checkpoint(checkpoint(run_dirs[0], 2)).verify()
        assert "told to fail (rank 1)" in facts["legs"][-1]["saved_elsewhere"]["because"]
    else:
        assert all("nor could it be written below the run directory: not all processes" in code for code in codes)
        assert facts["status"] == "failed"
        assert not any(committed(run_dir / "checkpoints") for run_dir in run_dirs)
    assert committed(locate(kept)) == []
