"""A run whose side channels all fail goes on and is saved, and its status is the true one."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.errors import STOPPED
from orchestrator.runs import record
from tests.lab.runs import TINY, checkpoint, read_rows, small_config, train, work_ranks

SHORT = (
    *TINY,
    "train.max_steps=6",
    "checkpoint.every_steps=3",
)


def status(run_dir: Path) -> str:
    return json.loads((run_dir / "run.json").read_text())["status"]


def test_every_side_channel_at_once(tmp_path, monkeypatch, capfd):
    """Full disks under the files that grow, and something in the way of those that are replaced."""
    monkeypatch.setattr(record, "LAST_TRIES_SECONDS", 0.1)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in ("metrics.jsonl", "samples.jsonl"):
        (run_dir / name).symlink_to("/dev/full")
    (run_dir / "tensorboard").write_text("a file")
    for name in ("run.json.partial", "report.html.partial"):
        (run_dir / name).mkdir()
    words = ("train.eval_every=2", "train.sample.every_steps=2", "logger.tensorboard=true", "logger.progress=true")
    config = small_config(tmp_path, *SHORT, *words)
    assert work_ranks(config, 1, run_dir) == [0]
    Checkpoint(checkpoint(run_dir, 6)).verify()
    errors = capfd.readouterr().err
    for name in ("metrics.jsonl", "samples.jsonl", "tensorboard", "run.json", "report"):
        said = [line for line in errors.splitlines() if line.startswith((f"warning: {name} ", f"warning: the {name}"))]
        assert len([line for line in said if "cannot be" in line or "could not be written:" in line]) == 1, errors
    assert "warning: metrics.jsonl: 9 rows are lost: No space left on device" in errors
    assert "warning: the status 'finished' cannot be written to run.json" in errors

    for name in ("run.json.partial", "report.html.partial"):
        (run_dir / name).rmdir()
    for name in ("metrics.jsonl", "samples.jsonl", "tensorboard"):
        (run_dir / name).unlink()
    shutil.rmtree(run_dir / "checkpoints")
    train(config, 1, run_dir)
    assert status(run_dir) == "finished"
    assert len(read_rows(run_dir)) == 9, "6 steps, and evaluations at 2, 4 and 6"


def test_what_can_be_written_again_is_complete(tmp_path, monkeypatch):
    """The disk has no room from step 2 to step 4."""
    from orchestrator.observe import sink

    append, calls = sink.Appended.append, [0]

    def sometimes(self, data, newline_before=False):
        calls[0] += 1
        if 2 <= calls[0] <= 4:
            raise OSError(28, "No space left on device")
        append(self, data, newline_before)

    monkeypatch.setattr(sink.Appended, "append", sometimes)
    monkeypatch.setattr(sink, "_PAUSE_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(sink, "_SHARE_OF_TIME", 0.0)
    run_dir = tmp_path / "run"
    rows = train(small_config(tmp_path, *SHORT), 1, run_dir)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_samples_can_be_left_out_and_begin_as_the_corpus_does(tmp_path):
    assert work_ranks(small_config(tmp_path, *SHORT, "train.sample.tokens=0"), 1, tmp_path / "none") == [0]
    assert not (tmp_path / "none" / "samples.jsonl").exists()
    config = small_config(tmp_path, *SHORT, "train.sample.tokens=2", "train.sample.every_steps=3")
    assert work_ranks(config, 1, tmp_path / "run") == [0]
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6], "at the end not a second time"
    text = "".join(path.read_text() for path in sorted((tmp_path / "corpus").iterdir()))
    assert all(row["prompt"] and row["prompt"] in text for row in rows)
    assert all(row["text"].startswith(row["prompt"]) for row in rows)


def test_a_sample_that_fails_on_all_ranks_is_said(tmp_path, monkeypatch, capfd):
    from orchestrator.inference import decoding

    def fail(*args):
        raise RuntimeError("probability tensor contains nan")

    monkeypatch.setattr(decoding, "choose_rows", fail)
    assert work_ranks(small_config(tmp_path, *SHORT), 2, tmp_path / "run") == [0, 0]
    assert status(tmp_path / "run") == "finished"
    assert "warning: the sample of step 6 failed: RuntimeError('probability" in capfd.readouterr().err


def test_a_run_whose_last_save_fails_has_failed(tmp_path, monkeypatch):
    from orchestrator.checkpoint import writer

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "commit_ranks", refuse)
    run_dir = tmp_path / "run"
    with pytest.raises(AssertionError, match="SaveError: the checkpoint of step 6 could not be written: No space left"):
        work_ranks(small_config(tmp_path, *SHORT), 1, run_dir)
    assert status(run_dir) == "failed"
    assert (run_dir / "report.html").exists()


def test_a_prune_that_fails_leaves_the_new_checkpoint(tmp_path, monkeypatch, capfd):
    from orchestrator.training.callbacks import checkpointing

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpointing, "prune", refuse)
    run_dir = tmp_path / "run"
    assert work_ranks(small_config(tmp_path, *SHORT), 2, run_dir) == [0, 0]
    assert "warning: old checkpoints could not be removed: Permission denied" in capfd.readouterr().err
    assert status(run_dir) == "finished"
    Checkpoint(checkpoint(run_dir, 6)).verify()


def test_a_signal_in_the_last_step(tmp_path, monkeypatch, capfd):
    """All steps are done, so the run is finished; what it was asked to leave out, a resume does, and nothing else."""
    from orchestrator.training.module import LanguageModule

    step = LanguageModule.training_step

    def interrupted(self, batch, index):
        step(self, batch, index)
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    config, run_dir = small_config(tmp_path, *SHORT), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModule, "training_step", interrupted)
        assert work_ranks(config, 1, run_dir)[0] in STOPPED
    assert "left out   the last evaluation and sample" in capfd.readouterr().out
    facts = json.loads((run_dir / "run.json").read_text())
    assert (facts["status"], facts["left_out"]) == ("finished", ["evaluation", "sample"])
    assert not (run_dir / "samples.jsonl").exists()

    assert work_ranks(config, 1, run_dir, checkpoint(run_dir, 6)) == [0]
    facts = json.loads((run_dir / "run.json").read_text())
    assert (facts["status"], "left_out" in facts, len(facts["legs"])) == ("finished", False, 2)
    assert [row["step"] for row in read_rows(run_dir) if "val_loss" in row] == [6]
    assert len((run_dir / "samples.jsonl").read_text().splitlines()) == 1
    assert [path.name for path in (run_dir / "checkpoints").glob("step-*6*")] == ["step-00000006"], "not saved again"


def test_each_leg_says_what_energy_it_took_or_why_that_is_not_known(tmp_path):
    assert work_ranks(small_config(tmp_path, *SHORT), 1, tmp_path / "run") == [0]
    (leg,) = json.loads((tmp_path / "run" / "run.json").read_text())["legs"]
    assert leg["energy"]["seconds"] > 0
    assert leg["energy"].keys() & {"joules", "not_measured"}
