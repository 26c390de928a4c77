"""The handover check on real runs: every layout agrees with every other, a changed weight does not get through."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.cli.handover import main
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.errors import CheckpointError
from tests.lab.checkpoints import forge
from tests.lab.cli import only_run, run
from tests.lab.ranks import run_ranks
from tests.lab.runs import checkpoint, losses, read_rows, resolved_run, small_config, train
from tests.lab.slow import slow
from tests.lab.tensors import read_all

LAYOUTS = {
    "1": (1, []),
    "fsdp4": (4, ["layout.fsdp=4"]),
    "fsdp2_tensor2": (4, ["layout.fsdp=2", "layout.tensor=2"]),
    "context2": (2, ["layout.context=2"]),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory by layout, each trained once."""
    tmp = tmp_path_factory.mktemp("saved")
    done: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in done:
            size, words = LAYOUTS[name]
            done[name] = tmp / name
            train(small_config(tmp, *words, "model.dropout=0.1"), size, done[name])
        return done[name]

    get.tmp = tmp
    return get


def _check(world, data, sources):
    from orchestrator.launch.canary import check_model
    from orchestrator.launch.run import joined
    from orchestrator.strategies.served_model import ServedModel
    from orchestrator.training.placed_model import build_placed
    from orchestrator.training.restore import restore_weights

    resolved = resolved_run(from_dict(RunConfig, data), world, vocab_size=257)
    results = []
    with joined(resolved, world, resolved.target()) as (parallel, _):
        for source in sources:
            checkpoint, model = Checkpoint(source, look=False), build_placed(resolved.config, parallel)
            restore_weights(checkpoint, resolved.config, parallel, model, cast=False)
            results.append(check_model(ServedModel(model, parallel, checkpoint, resolved.config), {}))
    return results


def _results(config: RunConfig, size: int, sources: list[Path]) -> list[dict]:
    found = run_ranks(size, _check, to_dict(config), sources)
    assert all(other == found[0] for other in found), "ranks disagree"
    return found[0]


@pytest.mark.parametrize("target", LAYOUTS)
def test_every_layout_agrees_with_every_other(saved, target):
    size, words = LAYOUTS[target]
    sources = [checkpoint(saved(name), 10) for name in LAYOUTS]
    for name, result in zip(LAYOUTS, _results(small_config(saved.tmp, *words), size, sources), strict=True):
        assert result["verdict"] == "agrees", result
        assert result["changed"] == ([] if name == target else ["layout"])
        assert result["loss"]["saved"] > 1
        if name == target:
            assert [result[key]["difference"] for key in ("loss", "grad_norm", "logits")] == [0, 0, 0]


def test_a_number_of_groups_that_the_rows_do_not_divide(saved):
    words = ["layout.fsdp=3", "train.global_batch_tokens=384"]
    (result,) = _results(small_config(saved.tmp, *words), 3, [checkpoint(saved("fsdp4"), 10)])
    assert result["verdict"] == "agrees", result


def test_bf16_agrees_within_its_own_tolerance(saved):
    config = small_config(saved.tmp, "hardware.precision=bf16", "layout.fsdp=2")
    (result,) = _results(config, 2, [checkpoint(saved("1"), 10)])
    assert (result["verdict"], result["changed"]) == ("agrees", ["layout", "precision"])
    assert result["logits"]["difference"] > 1e-4, "was it bf16?"


def _forged(source: Path, target: Path, name: str, change) -> Path:
    shutil.copytree(source, target)
    forge(target, name, change)
    return target


def test_one_weight_scaled_by_a_hundredth_is_caught(saved, tmp_path):
    """Each tensor, and one element of each, with hashes that fit: on the layout of the save and on another one."""
    source = checkpoint(saved("1"), 10)
    names = [name for name in Checkpoint(source).manifest.tensors if name.startswith("model.")]

    def one(tensor: torch.Tensor) -> None:
        tensor.view(-1)[tensor.numel() // 2] *= 1.01

    whole = [_forged(source, tmp_path / f"w{at}", name, lambda t: t.mul_(1.01)) for at, name in enumerate(names)]
    single = [_forged(source, tmp_path / f"s{at}", name, one) for at, name in enumerate(names)]
    for size, words in LAYOUTS["1"], LAYOUTS["fsdp2_tensor2"]:
        results = _results(small_config(saved.tmp, *words), size, [source, *whole, *single])
        assert results[0]["verdict"] == "agrees"
        for name, result in zip([*names, *names], results[1:], strict=True):
            assert result["verdict"] == "differs", name
            assert result["other_bits"] == [name]
        felt = [not result["logits"]["agrees"] for result in results[1 : len(names) + 1]]
        assert np.mean(felt) > 0.5, "the logits should feel most of the tensors"


def test_a_resume_stops_before_the_first_step(saved, tmp_path):
    source = checkpoint(saved("1"), 10)
    bad = _forged(source, tmp_path / "bad", "optimizer.exp_avg.norm.weight", lambda t: t.mul_(1.01))
    words = [f"runs_dir={tmp_path / 'runs'}", f"resume={bad}"]
    stopped = run("train", *words)
    assert stopped.returncode == 2
    assert "Traceback" not in stopped.stderr
    assert "optimizer.exp_avg.norm.weight has other bits" in stopped.stderr
    run_dir = only_run(tmp_path / "runs")
    (entry,) = json.loads((run_dir / "handover.json").read_text())
    assert (entry["verdict"], entry["went_on"], entry["leg"]) == ("differs", False, 1)
    assert "differs, stopped" in (run_dir / "report.html").read_text()
    assert max(row["step"] for row in read_rows(run_dir)) == 10, "it trained on"

    shutil.rmtree(run_dir)
    went_on = run("train", *words, "checkpoint.handover.on_mismatch=warn")
    assert went_on.returncode == 0, went_on.stderr
    assert "handover   differs" in went_on.stdout
    run_dir = only_run(tmp_path / "runs")
    assert json.loads((run_dir / "run.json").read_text())["legs"][1]["handover"]["verdict"] == "differs"


def test_a_run_that_moved_keeps_one_curve(saved, tmp_path):
    """From a checkpoint that was carried away alone: rows, legs and the check come into the new run directory."""
    source = tmp_path / "carried" / "step-00000010"
    shutil.copytree(checkpoint(saved("1"), 10), source)
    words = [f"runs_dir={tmp_path / 'runs'}", f"resume={source}", "hardware.devices=2", "layout.fsdp=2"]
    moved = run("train", *words)
    assert moved.returncode == 0, moved.stderr
    assert "handover   agrees" in moved.stdout
    run_dir = only_run(tmp_path / "runs")
    before, after = read_rows(saved("1")), read_rows(run_dir)
    assert losses(after)[:10] == losses(before)[:10]
    assert len(losses(after)) == 20
    facts = json.loads((run_dir / "run.json").read_text())
    assert [(leg["leg"], leg["start_step"], leg["end_step"]) for leg in facts["legs"]] == [(0, 0, 10), (1, 10, 20)]
    assert [leg["devices"] for leg in facts["legs"]] == [1, 2]
    handover = facts["legs"][1]["handover"]
    assert (handover["verdict"], handover["changed"]) == ("agrees", ["layout"])
    report = (run_dir / "report.html").read_text()
    assert "leg 1: cpu, fsdp 2" in report
    assert "<h2>Handovers</h2>" in report
    # The next one carries both.
    last = json.loads((checkpoint(run_dir) / "history.json").read_text())
    assert len(last["legs"]) == 2
    assert [row["step"] for row in last["rows"] if "loss" in row] == list(range(1, 21))


COMPILED = ["hardware.compile=true", "train.max_steps=6"]


@pytest.mark.parametrize("words", [["model.dropout=0.1"], pytest.param(COMPILED, marks=slow)])
def test_the_training_does_not_notice(tmp_path, words):
    """With and without the reference: bitwise the same losses, weights and optimizer."""
    ends = []
    for enabled in ("true", "false"):
        run_dir = tmp_path / enabled
        more = ["checkpoint.every_steps=2", f"checkpoint.handover.enabled={enabled}", "checkpoint.handover.seq_len=24"]
        rows = train(small_config(tmp_path, *words, *more), 1, run_dir)
        ends.append((losses(rows), read_all(checkpoint(run_dir, len(losses(rows))))))
    assert ends[0][0] == ends[1][0]
    assert ends[0][1].keys() == ends[1][1].keys()
    assert all(torch.equal(ends[0][1][name], ends[1][1][name]) for name in ends[0][1])


def test_a_checkpoint_without_a_reference_is_no_failure(tmp_path):
    train(small_config(tmp_path, "checkpoint.handover.enabled=false"), 1, tmp_path / "old")
    source = checkpoint(tmp_path / "old", 10)
    assert "reference.safetensors" not in Checkpoint(source).manifest.files
    run_dir = tmp_path / "new"
    train(small_config(tmp_path), 1, run_dir, source)
    (entry,) = json.loads((run_dir / "handover.json").read_text())
    assert (entry["verdict"], entry["went_on"]) == ("unchecked", True)
    with pytest.raises(CheckpointError, match="carries no reference batch"):
        main([str(source), "hardware=cpu"])


def test_the_verb(saved, capfd):
    source = str(checkpoint(saved("fsdp4"), 10))
    assert main([source, "hardware.devices=2", "layout.tensor=2", "layout.fsdp=1"]) == 0
    shown = capfd.readouterr().out
    for words in ("fsdp=4", "tensor=2", "changed        layout", "gradient norm", "verdict        agrees"):
        assert words in shown
    assert main([source, "layout=auto", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["verdict"] == "agrees"
    with pytest.raises(CheckpointError, match="which checkpoint"):
        main(["hardware=cpu"])


@slow
def test_the_verb_says_that_it_differs(saved, tmp_path, capfd):
    source = checkpoint(saved("1"), 10)
    bad = _forged(source, tmp_path / "bad", "model.layers.0.attn_norm.weight", lambda t: t.mul_(1.01))
    assert main([str(bad), "hardware=cpu"]) == 1
    shown = capfd.readouterr().out
    assert "model.layers.0.attn_norm.weight has other bits" in shown
    assert "verdict        differs" in shown
