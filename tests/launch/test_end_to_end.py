"""Whole runs through the command line: killed, interrupted, resumed, moved, refused."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from tests.lab.cli import kill_all, only_run, run, start, wait_until
from tests.lab.processes import ranks_below
from tests.lab.runs import checkpoint, losses, read_rows, small_overrides
from tests.lab.slow import slow
from tests.lab.tensors import read_all


def _bits(directory):
    return {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in read_all(directory).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs, by layout."""
    done = {}

    def get(*layout):
        if layout not in done:
            tmp = tmp_path_factory.mktemp("whole")
            result = run("train", *small_overrides(tmp, *layout))
            assert result.returncode == 0, result.stderr
            done[layout] = (only_run(tmp / "runs"), result)
        return done[layout]

    return get


LAYOUTS = [
    ("model.dropout=0.1",),
    ("hardware.devices=2", "layout.fsdp=2", "model.dropout=0.1"),
    ("hardware.devices=4", "layout.fsdp=2", "layout.tensor=2", "model.dropout=0.1"),
]


@pytest.mark.parametrize(
    ("layout", "how"),
    [
        pytest.param(LAYOUTS[0], "latest", marks=slow, id="1 process"),
        pytest.param(LAYOUTS[1], "auto", id="2 processes"),
        pytest.param(LAYOUTS[2], "auto", marks=slow, id="4 processes"),
    ],
)
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(whole, tmp_path, layout, how):
    """By the newest run, and by the command line that it was started with, as an engine repeats it."""
    reference, _ = whole(*layout)
    words = small_overrides(tmp_path, *layout, *(["resume=auto", "run_id=job"] if how == "auto" else []))
    process = start("train", *words)
    runs = tmp_path / "runs"
    wait_until(lambda: any(runs.glob("*/*/checkpoints/step-00000010/manifest.json")), process)
    kill_all(process)
    run_dir = only_run(runs)
    if checkpoint(run_dir, 20).exists():
        # It was faster than the signal: take the last checkpoint away, as if the kill had come before it.
        (checkpoint(run_dir, 20) / "manifest.json").unlink(missing_ok=True)
    again = words if how == "auto" else [f"runs_dir={runs}", "resume=latest"]
    result = run("train", *again)
    assert result.returncode == 0, result.stderr
    assert only_run(runs) == run_dir
    assert "resumed at step 10" in result.stdout
    if how == "auto":
        assert run_dir.name == "job"
        third = run("train", *again)
        assert (third.returncode, "the run has all its steps" in third.stdout) == (0, True), "a requeue loop ends"
    assert losses(read_rows(run_dir)) == losses(read_rows(reference))
    assert _bits(checkpoint(run_dir)) == _bits(checkpoint(reference))


def test_a_signal_saves_at_a_step_boundary_and_the_run_goes_on(whole, tmp_path):
    layout = ("hardware.devices=2", "train.max_steps=4000", "checkpoint.every_steps=null", "logger.every_steps=1")
    process = start("train", *small_overrides(tmp_path, *layout))
    runs = tmp_path / "runs"
    wait_until(lambda: any(path.stat().st_size > 1000 for path in runs.glob("*/*/metrics.jsonl")), process)
    # To all of them, as a terminal and Slurm do, and once more by the launcher: one request.
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
    for member in family:
        member.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert output.count("stopping   SIGTERM") == 1
    run_dir = only_run(runs)
    saved = sorted((run_dir / "checkpoints").iterdir())
    assert len(saved) == 1
    step = json.loads((saved[0] / "manifest.json").read_text())["step"]
    assert step == max(row["step"] for row in read_rows(run_dir)) > 0
    assert json.loads((run_dir / "run.json").read_text())["status"] == "interrupted"
    assert f"resume={run_dir}" in output

    words = [f"runs_dir={runs}", f"resume={run_dir}", f"train.max_steps={step + 3}", "hardware.devices=1"]
    refused = run("train", *words)
    assert (refused.returncode, "resume_allow=[schedule]" in refused.stderr) == (2, True), refused.stderr
    result = run("train", *words, "resume_allow=[schedule]")
    assert result.returncode == 0, result.stderr
    facts = json.loads((run_dir / "run.json").read_text())
    assert [leg["devices"] for leg in facts["legs"]] == [2, 1]
    assert (facts["status"], facts["legs"][1]["start_step"]) == ("finished", step)


def _listens(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM, as the kernel says: for SIGINT Python itself has one."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(lines["SigCgt"], 16) >> signal.SIGTERM - 1 & 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("moment", ["imports", "processes start"])
def test_a_signal_in_start_up_is_obeyed_at_once_and_leaves_nothing(tmp_path, number, moment):
    runs = tmp_path / "runs"
    process = start("train", *small_overrides(tmp_path, "hardware.devices=2", "train.max_steps=4000"))
    if moment == "imports":
        wait_until(lambda: _listens(process.pid), process)
    else:
        wait_until(lambda: any(runs.glob("*/*/config.yaml")), process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert [line.partition(":")[0] for line in output.splitlines() if line.startswith("stopping")] == [
        f"stopping   {number.name}"
    ]
    assert "Traceback" not in output
    assert not list(runs.glob("*/*")), "a run directory was left"


def test_a_killed_process_is_named_and_the_run_goes_on_from_its_checkpoint(tmp_path):
    layout = ("hardware.devices=2", "layout.fsdp=2", "train.max_steps=4000", "launch.max_restarts=0")
    process = start("train", *small_overrides(tmp_path, *layout))
    runs = tmp_path / "runs"
    wait_until(lambda: any(runs.glob("*/*/checkpoints/*/manifest.json")), process)
    first = ranks_below(process.pid)[0]
    first.kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    run_dir = only_run(runs)
    assert f"error: process 0 of 2 (pid {first.pid}) was ended by SIGKILL, last seen after step" in output
    assert f"checkpoint {run_dir / 'checkpoints' / 'step-'}" in output
    assert f"continue   python -m orchestrator train resume={run_dir}" in output
    assert "Traceback" not in output
    facts = json.loads((run_dir / "run.json").read_text())
    assert facts["status"] == "failed"
    assert facts["legs"][0]["end_step"] >= 10


@slow
def test_a_stopped_multirun_starts_no_further_job(tmp_path):
    words = small_overrides(tmp_path, "train.max_steps=4000", "checkpoint.every_steps=null")
    process = start("train", *words, "-m", "optim.lr=1e-3,3e-4")
    runs = tmp_path / "runs"
    wait_until(lambda: any(path.stat().st_size > 1000 for path in runs.glob("*/*/metrics.jsonl")), process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert output.count("--- job") == 1
    assert len(list((only_run(runs) / "checkpoints").iterdir())) == 1


def test_the_run_directory_is_complete(whole):
    run_dir, result = whole(*LAYOUTS[0])
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "report.html"} <= names
    report = (run_dir / "report.html").read_text()
    assert "<svg" in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert str(run_dir) in result.stdout
    assert "sample of generated text" in result.stdout
    row = next(row for row in read_rows(run_dir) if "loss" in row)
    assert {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "step_seconds", "mfu"} <= row.keys()


@slow
def test_generate_continues_a_prompt_from_a_checkpoint(whole):
    run_dir, _ = whole(*LAYOUTS[0])
    words = [f"checkpoint={run_dir}", "prompt=def f(x):", "tokens=12", "seed=3"]
    first, second = run("generate", *words), run("generate", *words)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def f(x):")
    assert len(first.stdout) > len("def f(x):\n")
    assert first.stdout == second.stdout


def _damage(path: Path) -> bytes:
    """Flip a bit of a file, and return what it holds then."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    return bytes(content)


def test_resume_falls_back_to_the_newest_valid_checkpoint_and_says_so(whole, tmp_path):
    """The last checkpoint of a run that has finished is damaged: its last steps are done again."""
    words = small_overrides(tmp_path)
    assert run("train", *words).returncode == 0
    run_dir = only_run(tmp_path / "runs")
    damaged = checkpoint(run_dir, 20) / "rank-00000.safetensors"
    content = _damage(damaged)
    result = run("train", f"runs_dir={tmp_path / 'runs'}", "resume=latest", "checkpoint.keep_last=5")
    assert result.returncode == 0, result.stderr
    assert "skipping" in result.stderr
    assert "rank-00000.safetensors" in result.stderr
    assert "resumed at step 10" in result.stdout
    assert damaged.read_bytes() == content, "the damaged checkpoint was written over"
    assert (
        torch.equal(
            read_all(run_dir / "checkpoints" / "step-00000020.2")["model.norm.weight"],
            read_all(run_dir / "checkpoints" / "step-00000010")["model.norm.weight"],
        )
        is False
    )


MISTAKES = {
    "unknown key": (["optim.lrr=1"], "optim.lr"),
    "unknown option": (["model=tinny"], "tiny"),
    "new key": (["+newkey=1"], "newkey"),
    "wrong type": (["train.max_steps=soon"], "whole number"),
    "impossible layout": (["hardware.devices=4", "layout.tensor=3"], "tensor 3"),
    "layout against model": (["hardware.devices=8", "layout.tensor=8"], "model.kv_heads"),
    "batch against layout": (["hardware.devices=3"], "8 sequences"),
    "missing data": (["data.sources=[{path: /nowhere/*.txt, weight: 1}]"], "/nowhere"),
    "no such checkpoint": (["resume=/nowhere"], "/nowhere"),
    "nothing to resume": (["resume=latest"], "no valid checkpoint"),
    "absent hardware": (["hardware=tpu"], "tpu"),
    "absent gpu": (["hardware=cuda"], "cuda"),
    "too many devices": (["hardware.devices=5000"], "5000"),
    "vocabulary": (["model.vocab_size=100"], "tokenizer 257"),
}


@pytest.mark.parametrize("words", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_gets_one_clear_message_and_changes_nothing(tmp_path, words):
    overrides, expected = words
    result = run("train", *small_overrides(tmp_path), *overrides)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert expected in result.stderr
    assert any(line.strip().startswith(("do:", "allowed:")) for line in result.stderr.splitlines())
    assert not list((tmp_path / "runs").glob("*/*")), "a run directory was made"


def test_several_mistakes_are_reported_together(tmp_path):
    result = run("train", *small_overrides(tmp_path), "optim.lrr=1", "model=tinny", "train.max_steps=soon", "seed=-1")
    assert result.returncode == 2
    for part in ("optim.lrr", "tinny", "train.max_steps"):
        assert part in result.stderr


def test_resuming_with_another_model_is_refused_before_anything_is_lost(whole, tmp_path):
    words = small_overrides(tmp_path)
    assert run("train", *words).returncode == 0
    run_dir = only_run(tmp_path / "runs")
    before = {path: path.stat().st_size for path in (run_dir / "checkpoints").rglob("*")}
    result = run(
        "train",
        f"runs_dir={tmp_path / 'runs'}",
        "resume=latest",
        "model.layers=3",
        "train.max_steps=30",
        "resume_allow=[schedule]",
    )
    assert result.returncode == 2
    assert "does not hold the model that the configuration describes" in result.stderr
    assert {path: path.stat().st_size for path in (run_dir / "checkpoints").rglob("*")} == before


def test_a_finished_run_is_not_resumed_by_accident(whole):
    run_dir, _ = whole(*LAYOUTS[0])
    result = run("train", f"resume={run_dir}")
    assert result.returncode == 2
    assert "no steps left" in result.stderr
    assert "train.max_steps" in result.stderr


def test_a_multirun_trains_once_per_value(tmp_path):
    result = run("train", *small_overrides(tmp_path, "train.max_steps=2"), "-m", "optim.lr=1e-3,3e-4")
    assert result.returncode == 0, result.stderr
    runs = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/*/run.json")]
    assert [run["legs"][0]["end_step"] for run in runs] == [2, 2]
    (page,) = (tmp_path / "runs" / "sweeps").glob("*/sweep.html")
    assert "0.0003" in page.read_text()
    assert f"sweep      {page}" in result.stdout


@pytest.mark.parametrize("launcher", [pytest.param("local", marks=slow), "torchrun"])
def test_processes_that_read_damage_go_on_from_an_older_checkpoint_together(tmp_path, launcher):
    """Of three checkpoints the newest two are damaged, each in the part of another process."""
    pytest.importorskip("blake3")
    words = small_overrides(tmp_path, "hardware.devices=2", "layout.fsdp=2", "checkpoint.keep_last=9")
    words.append("checkpoint.hash=blake3")
    assert run("train", *words, "train.max_steps=30").returncode == 0
    run_dir = only_run(tmp_path / "runs")
    damaged = [checkpoint(run_dir, 30) / "rank-00001.safetensors", checkpoint(run_dir, 20) / "rank-00000.safetensors"]
    contents = [_damage(path) for path in damaged]
    again = [
        "train",
        f"runs_dir={tmp_path / 'runs'}",
        f"resume={run_dir}",
        "train.max_steps=31",
        "resume_allow=[schedule]",
    ]
    again.append("checkpoint.hash=sha256")  # of what is written from now on
    result = run(*again) if launcher == "local" else _torchrun(*again)
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if "skipping" in line]
    assert [path.parent.name in line for path, line in zip(damaged, said, strict=True)] == [True, True]
    assert "resumed at step 10" in result.stdout
    leg = json.loads((run_dir / "run.json").read_text())["legs"][-1]
    assert (leg["start_step"], leg["end_step"], Path(leg["resumed_from"]).name) == (10, 31, "step-00000010")
    assert leg["handover"]["verdict"] == "agrees"
    manifests = [json.loads((checkpoint(run_dir, step) / "manifest.json").read_text()) for step in (10, 31)]
    assert [manifest.get("requires") for manifest in manifests] == [["blake3"], None]
    assert [path.read_bytes() for path in damaged] == contents, "a damaged checkpoint was written over"
    steps = [row["step"] for row in read_rows(run_dir) if "loss" in row and row["leg"] == leg["leg"]]
    assert steps == list(range(11, 32))


@slow
def test_a_damaged_checkpoint_that_is_asked_for_stops_the_run(tmp_path):
    words = small_overrides(tmp_path, "hardware.devices=2", "layout.fsdp=2")
    assert run("train", *words).returncode == 0
    named = checkpoint(only_run(tmp_path / "runs"), 10)
    _damage(named / "rank-00001.safetensors")
    result = run("train", f"runs_dir={tmp_path / 'runs'}", f"resume={named}")
    assert result.returncode == 2
    assert "error: the checkpoint is damaged: rank-00001.safetensors" in result.stderr
    assert "skipping" not in result.stderr


def _torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    engine = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "orchestrator"]
    return subprocess.run([sys.executable, *engine, *words], capture_output=True, text=True, timeout=240)


@slow
def test_torchrun_starts_the_processes_as_well(tmp_path):
    result = _torchrun("train", *small_overrides(tmp_path, "train.max_steps=3"))
    assert result.returncode == 0, result.stderr
    facts = json.loads((only_run(tmp_path / "runs") / "run.json").read_text())
    assert (facts["legs"][0]["engine"], facts["legs"][0]["devices"], facts["status"]) == ("torchrun", 2, "finished")
