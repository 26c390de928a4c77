"""Faults of processes and disks. A short fault campaign: `scripts/fault_campaign` runs the long one."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from tests.lab import fault_table
from tests.lab.cli import only_run, run
from tests.lab.faults import KINDS, campaign
from tests.lab.runs import small_overrides
from tests.lab.tensors import read_all


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_again_and_again_loses_nothing(tmp_path, kind):
    tally = campaign(tmp_path, kills=3, steps=8, seed=1, report=lambda tally: None, kind=kind)
    assert tally.kills == 3
    assert tally.checked >= 3


@pytest.mark.parametrize("name", ["the reader of standard output goes"])
def test_a_row_of_the_table_of_faults(tmp_path, name):
    """One of those that `scripts/fault_table` runs; most have a faster test of their own."""
    fault_table.ROWS[name](tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, with room for two checkpoints and a half."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3000k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk(small_disk, tmp_path):
    """The save in the middle fails, training goes on; the last one insists; nothing that was there is harmed."""
    words = small_overrides(
        tmp_path,
        f"checkpoint.dir={small_disk}",
        "checkpoint.every_steps=5",
        "checkpoint.keep_last=4",
        "hardware.devices=2",
        "launch.max_restarts=0",
    )
    result = run("train", *words)
    assert result.returncode == 1, "it may be tried again"
    assert json.loads((only_run(tmp_path / "runs") / "run.json").read_text())["status"] == "failed"
    assert "warning: the checkpoint of step 15 could not be written: No space left on device (rank" in result.stdout
    assert "error: the checkpoint of step 20 could not be written: No space left on device (rank" in result.stderr
    assert "earlier checkpoints are untouched" in result.stderr
    kept = sorted(small_disk.glob("*/*/step-*"))
    assert [path.name for path in kept] == ["step-00000005", "step-00000010"], "and no left-overs"
    for path in kept:
        Checkpoint(path).verify()

    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    result = run("train", f"runs_dir={tmp_path / 'runs'}", "resume=latest")
    assert result.returncode == 0, result.stderr
    assert "resumed at step 10" in result.stdout
    whole = run("train", *words, f"runs_dir={tmp_path / 'whole'}", "checkpoint.dir=auto")
    assert whole.returncode == 0, whole.stderr
    reference = read_all(only_run(tmp_path / "whole") / "checkpoints" / "step-00000020")
    found = read_all(kept[0].parent / "step-00000020")
    assert all(torch.equal(found[name], reference[name]) for name in reference)
