"""The fit finds constants again that runs were made with, and leaves what runs say nothing of."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import yaml

from orchestrator.planner.estimate.memory import step_memory
from orchestrator.planner.estimate.time import step_time
from orchestrator.planner.evidence import calibration
from orchestrator.planner.evidence.published import PublishedRun
from orchestrator.planner.spec import ParallelPlan
from scripts.fit_planner import ROOT, Constant, account, fit, memory_residual, time_residual
from tests.planner.shapes import LLAMA_8B, LLAMA_70B, cluster, job

PRIORS = yaml.safe_load((ROOT / "scripts" / "planner_priors.yaml").read_text(encoding="utf-8"))
PLACE = ("stacks", "composer", "constants")


def made_runs(truth: calibration.Calibration) -> list[PublishedRun]:
    """Runs whose measured figures are what `truth` says."""
    runs = []
    for chip in ("a100-80", "h100-sxm"):
        for model in (LLAMA_8B, LLAMA_70B):
            for seq_len in (2048, 8192, 32768):
                for remat in ("none", "full"):
                    work = job(model, 64, seq_len, stack="composer")
                    machine, plan = cluster(chip, 64), ParallelPlan(fsdp=64, remat=remat)
                    seconds = step_time(work, machine, plan, truth).step
                    memory = step_memory(work, machine, plan, truth).total
                    key = f"{chip}-{model.name}-{seq_len}-{remat}"
                    runs.append(PublishedRun(key, "made", f"made:{model.name}", work, machine, plan, seconds, memory))
    return runs


def test_constants_are_found_again():
    start = calibration.parse(PRIORS, "composer", "h100-sxm")
    truth = replace(start, gemm=0.75, attention=0.3)
    wanted = [Constant((*PLACE, name), 1.5) for name in ("gemm", "attention")]
    found = calibration.parse(fit(PRIORS, made_runs(truth), wanted, time_residual), "composer", "h100-sxm")
    assert found.gemm == pytest.approx(0.75, rel=0.02)
    assert found.attention == pytest.approx(0.3, rel=0.02)


def test_constants_of_memory_are_found_again():
    truth = replace(calibration.parse(PRIORS, "composer", ""), kept=1.3, logit_bytes=14.0)
    wanted = [Constant((*PLACE, name), 1.0) for name in ("kept", "logit_bytes")]
    found = calibration.parse(fit(PRIORS, made_runs(truth), wanted, memory_residual), "composer", "")
    assert found.kept == pytest.approx(1.3, rel=0.03)
    assert found.logit_bytes == pytest.approx(14.0, rel=0.03)


def test_one_row_that_is_far_off_does_not_move_the_rest():
    truth = replace(calibration.parse(PRIORS, "composer", "h100-sxm"), gemm=0.75)
    runs = made_runs(truth)
    assert runs[0].seconds is not None
    runs[0] = replace(runs[0], seconds=runs[0].seconds * 10)
    found = calibration.parse(
        fit(PRIORS, runs, [Constant((*PLACE, "gemm"), 1.0)], time_residual), "composer", "h100-sxm"
    )
    assert found.gemm == pytest.approx(0.75, rel=0.03)


def test_a_constant_that_the_runs_say_nothing_of_is_not_written():
    truth = replace(calibration.parse(PRIORS, "composer", "h100-sxm"), gemm=0.75)
    wanted = [Constant((*PLACE, name), 0.5) for name in ("gemm", "expert_hidden")]
    found = fit(PRIORS, made_runs(truth), wanted, time_residual)
    assert set(found["stacks"]["composer"]["constants"]) == {"gemm"}
    assert "constants" not in PRIORS["stacks"]["composer"], "the priors are left as they are"


def test_a_verdict_pulls_only_where_it_is_wrong():
    constants = calibration.parse(PRIORS, "composer", "h100-sxm")
    run = next(run for run in made_runs(constants) if run.key == "a100-80-llama3_70b-32768-none")
    total = step_memory(run.job, run.cluster, run.plan, constants).total
    capacity = step_memory(run.job, run.cluster, run.plan, constants).capacity
    assert capacity is not None
    assert total > 1.2 * capacity
    assert memory_residual(replace(run, memory=None, out_of_memory=True), constants) == 0
    wrong = memory_residual(replace(run, memory=None, out_of_memory=False), constants)
    assert wrong == pytest.approx(math.log(total / capacity) + 0.05)


def test_what_was_fitted_is_written_down():
    runs = made_runs(calibration.parse(PRIORS, "composer", "h100-sxm"))
    found = account(PRIORS, [run for run in runs if "h100" in run.key])
    assert found["rows"] == 12
    assert found["families"] == ["made:llama3_70b", "made:llama3_8b"]
    assert found["median_error_of_fitted_rows"] == 0
