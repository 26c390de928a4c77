"""Numbers that are not finite: they never reach the weights, no checkpoint holds them, and the run says so."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig, TrainConfig
from orchestrator.errors import DIVERGED
from orchestrator.training.divergence import Diverged, FiniteGuard
from tests.lab.cli import only_run, run
from tests.lab.poison import left_out, poisoned
from tests.lab.ranks import run_ranks
from tests.lab.runs import checkpoint, losses, resolved_run, small_config, small_overrides
from tests.lab.slow import cases, slow
from tests.lab.tensors import read_all

LAYOUTS = {
    "1": (1, []),
    "fsdp2_tensor2": (4, ["layout.fsdp=2", "layout.tensor=2"]),
    "pipeline2": (2, ["layout.pipeline=2"]),
    "fsdp2": (2, ["layout.fsdp=2"]),
    "tensor2": (2, ["layout.tensor=2", "layout.fsdp=1"]),
    "replicate2": (2, ["layout.replicate=2", "layout.fsdp=1"]),
    "replicate2_context2": (4, ["layout.replicate=2", "layout.context=2", "layout.fsdp=1"]),
}


def _strict(path: Path) -> list[dict]:
    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def _train(config, size, run_dir, poison=(), out=()):
    """Exit codes of the ranks. `poison`: steps, layer, phase and rank (None: all)."""
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_ranks(size, _rank, to_dict(config), run_dir, poison, out)


def _rank(world, data, run_dir, poison, out):
    from orchestrator.launch.run import work

    with ExitStack() as faults:
        if poison:
            steps, layer, phase, rank = poison
            faults.enter_context(poisoned(steps, layer, phase, rank in (None, world.rank)))
        if out:
            faults.enter_context(left_out(out))
        return work(resolved_run(from_dict(RunConfig, data), world, run_dir), world)


CASES = [
    ("fsdp2", "weights", 1, []),
    ("tensor2", "summed", 1, []),
    ("replicate2", "weights", 1, []),
    ("replicate2", "summed", 1, []),
    ("pipeline2", "weights", 1, ["train.micro_batch_size=2"]),
    ("fsdp2", "summed", 0, []),
    ("tensor2", "backward", 1, []),
    ("1", "forward", None, []),
    ("1", "backward", None, ["hardware.precision=bf16", "train.remat=full", "train.global_batch_tokens=64"]),
    ("fsdp2_tensor2", "forward", 1, ["train.micro_batch_size=2"]),
    ("replicate2_context2", "backward", 2, []),
    ("pipeline2", "forward", 1, []),
    ("pipeline2", "backward", 1, ["layout.schedule=interleaved", "model.layers=4"]),
]


@pytest.mark.parametrize(
    ("layout", "phase", "rank", "words"), cases(CASES, quick=[CASES[0], CASES[1], CASES[3], *CASES[7:9], CASES[10]])
)
def test_the_run_stops_says_where_and_keeps_the_last_good_checkpoint(tmp_path, capfd, layout, phase, rank, words):
    size, degrees = LAYOUTS[layout]
    # Nobody looks at step 7, so the host hears of it one step late.
    words = [*words, "train.max_steps=12", "checkpoint.every_steps=3", "logger.every_steps=3", "checkpoint.keep_last=2"]
    config, run_dir = small_config(tmp_path, *degrees, *words), tmp_path / "run"
    codes = _train(config, size, run_dir, ([7], 1, phase, rank))
    assert codes == [DIVERGED] * size
    record = json.loads((run_dir / "run.json").read_text())
    about = record["legs"][-1]["diverged"]
    assert (record["status"], about["step"], about["values"]["grad_norm"]) == ("diverged", 7, "nan")
    diagnosis = about["diagnosis"]
    assert diagnosis["reproduced"]
    assert not diagnosis["state"]
    ours = [rank] if rank is not None else list(range(size))
    if phase == "summed":  # what a fault in the sum, or behind it, looks like: no layer has given it
        assert (diagnosis["layer"], diagnosis["gradients"]) == ("", ["layers.1.mlp.up.weight"])
        assert diagnosis["gradient_ranks"] == diagnosis["met"]["layers.1.mlp.up.weight"] == ours
    else:
        assert (diagnosis["layer"], diagnosis["phase"], diagnosis["micro_batch"]) == ("layers.1", phase, 0)
        assert diagnosis["ranks"] == ours

    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000006"]
    assert all(tensor.isfinite().all() for tensor in read_all(checkpoint(run_dir, 6)).values())
    rows = _strict(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 8)), "what came after had no effect"
    assert rows[-1]["grad_norm"] is None
    assert rows[-1]["nonfinite"]["grad_norm"] == "nan"
    said = capfd.readouterr().err
    assert "diverged at step 7" in said
    assert ("began in layers.1" if phase != "summed" else "layers.1.mlp.up.weight, rank 1 of 2") in said or rank == 0
    assert f"resume={checkpoint(run_dir, 3)} runs_dir={tmp_path / 'runs'} optim.lr=0.001" in said
    assert "whose weights gave these numbers" in said, "the checkpoint of step 6 leads to step 7"
    report = (run_dir / "report.html").read_text()
    assert 'class="status diverged">diverged at step 7' in report
    assert "the last finite one" in report or phase != "forward"


@pytest.mark.parametrize("layout", cases(["1", "fsdp2_tensor2", "pipeline2"], quick=["1"]))
def test_a_skipped_step_is_to_the_bit_one_that_was_not_taken(tmp_path, layout):
    size, degrees = LAYOUTS[layout]
    words = [*degrees, "train.max_steps=8", "model.dropout=0.1", "train.micro_batch_size=2", "logger.every_steps=5"]
    words += ["checkpoint.every_steps=null", "train.on_nonfinite=skip", "train.max_skips=2"]
    config = small_config(tmp_path, *words)
    skipped, without = tmp_path / "skipped", tmp_path / "without"
    assert _train(config, size, skipped, poison=([3, 4], 0, "forward", None)) == [0] * size
    assert _train(config, size, without, out=[3, 4]) == [0] * size
    ours, theirs = read_all(checkpoint(skipped, 8)), read_all(checkpoint(without, 8))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows = [row for row in _strict(skipped / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows if row.get("skipped")] == [3, 4]
    assert [row["loss"] for row in rows if not row.get("skipped")] == [
        loss for step, loss in enumerate(losses(_strict(without / "metrics.jsonl")), 1) if step not in (3, 4)
    ]
    record = json.loads((skipped / "run.json").read_text())
    assert (record["status"], record["legs"][-1]["skipped_steps"]) == ("finished", 2)


def _judge(guard, values):
    """Let the guard see these losses, a step each; returns the steps that it left out."""
    out = []
    for step, value in enumerate(values, 1):
        if bool(guard.judge(step, torch.tensor(value), torch.tensor(1.0))):
            out.append(step)
        guard.settle(later=1)
    guard.settle()
    return out


@pytest.fixture
def parallel():
    from orchestrator.config.schema import HardwareConfig
    from orchestrator.distributed.world import World
    from orchestrator.hardware.target_table import resolve
    from orchestrator.sharding.layout import Layout
    from orchestrator.strategies.dtensor import DTensorStrategy

    return DTensorStrategy(resolve(HardwareConfig(target="cpu")), World(), Layout(1, 1, 1, 1), "fp32")


def test_more_skips_in_a_row_than_allowed_stop_the_run(parallel):
    nan, inf = float("nan"), float("inf")
    guard = FiniteGuard(parallel, TrainConfig(on_nonfinite="skip", max_skips=2))
    assert _judge(guard, [1.0, nan, inf, 1.0, -inf, nan, 2.0]) == [2, 3, 5, 6]
    assert guard.skipped == 4
    with pytest.raises(Diverged) as caught:
        _judge(guard, [1.0, nan, nan, nan, 1.0])
    assert (caught.value.step, caught.value.source) == (4, "step")


def test_a_run_that_is_to_stop_makes_no_update_after_the_bad_step(parallel):
    guard = FiniteGuard(parallel, TrainConfig())
    assert not guard.judge(1, torch.tensor(1.0), torch.tensor(1.0))
    assert guard.judge(2, torch.tensor(1.0), torch.tensor(float("inf")))
    assert guard.judge(3, torch.tensor(1.0), torch.tensor(1.0)), "the host has not heard of step 2 yet"
    with pytest.raises(Diverged, match="step 2"):
        guard.settle(later=1)


@slow
def test_a_diverged_run_goes_on_from_its_last_finite_checkpoint_with_a_lower_rate(tmp_path):
    """Diverged by its learning rate, while saves are written beside it; then resumed as the message says."""
    words = ["train.max_steps=3", "checkpoint.every_steps=1", "checkpoint.handover.enabled=false"]
    words += ["optim.schedule.kind=constant", "optim.schedule.warmup_steps=0", "train.eval_every=4"]
    runs = tmp_path / "runs"
    result = run("train", *small_overrides(tmp_path, *words))
    assert result.returncode == 0, result.stderr
    run_dir = only_run(runs)
    result = run("train", f"runs_dir={runs}", "resume=latest", "train.max_steps=8", "optim.lr=1e38")
    assert result.returncode == DIVERGED, result.stderr
    assert "Traceback" not in result.stderr
    record = json.loads((run_dir / "run.json").read_text())
    assert record["status"] == "diverged"
    assert Path(record["legs"][-1]["diverged"]["checkpoint"]).parent == run_dir / "checkpoints"
    _strict(run_dir / "metrics.jsonl")
    found = sorted((run_dir / "checkpoints").glob("step-*/manifest.json"))
    assert found, "the last good one is there"
    for manifest in found:
        assert all(tensor.isfinite().all() for tensor in read_all(manifest.parent).values())

    (command,) = [line.partition("train ")[2] for line in result.stderr.splitlines() if line.startswith("  do: ")]
    # The one of step 4 was saved, and is finite, but its weights are those that gave no finite loss.
    assert command == f"resume={checkpoint(run_dir, 3)} runs_dir={runs} train.max_steps=8 optim.lr=0.003"
    result = run("train", *command.split())
    assert result.returncode == 0, result.stderr
    (branched,) = {path.parent for path in runs.glob("*/*/config.yaml")} - {run_dir}
    assert json.loads((branched / "run.json").read_text())["status"] == "finished"
    rows = [row for row in _strict(branched / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["loss"] < rows[0]["loss"]
