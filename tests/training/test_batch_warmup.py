"""The global batch grows by steps: data, resume and figures follow from the configuration alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.batch_sizes import BatchSizes
from orchestrator.config.compose import compose
from orchestrator.config.schema import BatchStageConfig, RunConfig, ScheduleConfig, TrainConfig
from orchestrator.config.validate import validate
from orchestrator.errors import ConfigErrors
from orchestrator.launch.changes import changes
from orchestrator.optim.schedule import warmup_steps
from orchestrator.training.check import check_run
from tests.lab.runs import TINY, checkpoint, losses, read_rows, small_config, train
from tests.lab.slow import cases
from tests.lab.tensors import read_all

STAGES = "train.batch_warmup=[{steps: 2, tokens: 64}, {steps: 3, tokens: 128}]"
SHORT = (*TINY, "train.global_batch_tokens=256", "train.max_steps=8", "checkpoint.every_steps=1", STAGES)
SHORT += ("checkpoint.keep_last=9", "checkpoint.handover.enabled=false")
SIZES = [64, 64, 128, 128, 128, 256, 256, 256]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), max_size=4), st.integers(1, 9), st.integers(0, 200))
def test_sums_are_those_of_the_steps(stages, last, amount):
    train = TrainConfig(batch_warmup=tuple(BatchStageConfig(*one) for one in stages), global_batch_tokens=last)
    sizes = BatchSizes.of(train)
    by_step = [size for steps, size in stages for _ in range(steps)] + [last] * 220
    assert [sizes.at(step) for step in range(40)] == by_step[:40]
    assert [sizes.upto(step) for step in range(40)] == [sum(by_step[:step]) for step in range(40)]
    steps = sizes.steps_of(amount)
    assert sizes.upto(steps) >= amount
    assert steps == 0 or sizes.upto(steps - 1) < amount


def test_each_stage_is_checked():
    plain = RunConfig()
    wrong = tuple(BatchStageConfig(*one) for one in ((0, 256), (5, 300), (5, 8192)))
    found = validate(replace(plain, train=replace(plain.train, batch_warmup=wrong)))
    assert [problem.what for problem in found] == [
        "'train.batch_warmup[0].steps' is out of range",
        "'train.batch_warmup[1].tokens' is out of range",
        "'train.batch_warmup[2].tokens' is out of range",
    ]
    config = compose(["model=tiny", "layout.fsdp=4", "train.batch_warmup=[{steps: 5, tokens: 512}]"]).config
    with pytest.raises(ConfigErrors, match="512 tokens / 256 = 2 sequences"):
        check_run(config, 4, 256)


def test_tokens_of_a_warm_up_are_counted_through_the_stages():
    plain = RunConfig()
    stages = (BatchStageConfig(10, 1024), BatchStageConfig(10, 2048))
    schedule = ScheduleConfig(warmup_tokens=10 * 1024 + 4 * 2048)
    config = replace(
        plain, train=replace(plain.train, batch_warmup=stages), optim=replace(plain.optim, schedule=schedule)
    )
    assert warmup_steps(config) == 14


def test_what_is_behind_may_change_and_what_comes_has_to_be_allowed():
    saved = compose(["model=tiny", "train.batch_warmup=[{steps: 100, tokens: 1024}]"]).config
    other = compose(["model=tiny"]).config
    assert [(change.key, change.needs) for change in changes(saved, other, 50)] == [("train.batch_warmup", "batch")]
    assert [(change.key, change.needs) for change in changes(saved, other, 100)] == [("train.batch_warmup", None)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    tmp: Path = tmp_path_factory.mktemp("warmups")
    done: dict[tuple[str, ...], Path] = {}

    def run(*words: str, size: int = 1) -> Path:
        if words not in done:
            done[words] = tmp / f"run{len(done)}"
            train(small_config(tmp, *SHORT, *words), size, done[words])
        return done[words]

    run.tmp = tmp
    return run


def test_steps_have_their_sizes_and_no_sequence_is_passed_over(runs):
    rows = [row for row in read_rows(runs()) if "loss" in row]
    assert [row["tokens"] for row in rows] == np.cumsum(SIZES).tolist()
    speeds = [row["tokens_per_second"] * row["step_seconds"] for row in rows]
    assert speeds == pytest.approx(SIZES)


@pytest.mark.parametrize("layout", cases(["fsdp", "tensor", "pipeline"], quick=["fsdp"]))
def test_layouts_agree(runs, layout):
    shape = ["model.layers=2"] if layout == "pipeline" else []
    one = losses(read_rows(runs(*shape)))
    two = losses(read_rows(runs(*shape, f"layout.{layout}=2", size=2)))
    np.testing.assert_allclose(two, one, rtol=1e-5)


@pytest.mark.parametrize("step", cases([1, 3, 6], quick=[3]))
def test_a_run_resumes_within_every_stage_to_the_bit(runs, tmp_path, step):
    whole = runs()
    rows = train(small_config(runs.tmp, *SHORT), 1, tmp_path / "resumed", checkpoint(whole, step))
    assert losses(rows) == losses(read_rows(whole))[step:]
    before, after = (read_all(checkpoint(run_dir, 8)) for run_dir in (whole, tmp_path / "resumed"))
    assert all(torch.equal(before[key], after[key]) for key in before)
