"""Tasks between the steps of a training: what `evaluate` gives for the checkpoint of the step."""

from __future__ import annotations

import json

import pytest

from orchestrator.errors import ConfigErrors
from orchestrator.report.run_report import write_report
from tests.evaluation.test_harness import evaluated
from tests.lab import harness as lab
from tests.lab.ranks import run_ranks
from tests.lab.runs import TINY, checkpoint, read_rows, small_config, work_ranks

pytest.importorskip("lm_eval")


def test_tasks_in_a_run_are_those_of_its_checkpoints(tmp_path):
    lab.preload()
    tasks = lab.write_tasks(tmp_path / "tasks")
    settings = (
        f"{{names: [lab_choices, lab_answers], include: ['{tasks}'], every_steps: 2, limit: 4, batch_tokens: 512}}"
    )
    words = [*TINY, "layout.fsdp=2", "train.max_steps=4", "checkpoint.every_steps=2", f"train.tasks={settings}"]
    config = small_config(tmp_path, *words, "logger.tensorboard=true")
    assert work_ranks(config, 2, tmp_path / "run") == [0, 0]
    rows = [row for row in read_rows(tmp_path / "run") if "tasks" in row]
    assert [row["step"] for row in rows] == [2, 4]
    kept = [json.loads((tmp_path / "run" / "tasks" / f"step-{step:08d}.json").read_text()) for step in (2, 4)]
    request = {"names": ["lab_choices", "lab_answers"], "include": [str(tasks)], "limit": 4, "bootstrap": 0}
    for row, results in zip(rows, kept, strict=True):
        saved = str(checkpoint(tmp_path / "run", row["step"]))
        (found,) = run_ranks(1, evaluated, saved, [], request, {}, config.model.max_seq_len)
        assert found["results"] == results["results"]
        assert row["task/lab_choices/acc"] == found["results"]["lab_choices"]["acc,none"]
    write_report(tmp_path / "run")
    assert "Tasks: acc" in (tmp_path / "run" / "report.html").read_text()
    assert _tags(tmp_path / "run" / "tensorboard") >= {"tasks/lab_choices/acc", "tasks/lab_answers/exact_match"}


def _tags(folder) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return set(events.Tags()["scalars"])


def test_a_task_that_there_is_not_ends_the_run_before_its_first_step(tmp_path):
    config = small_config(tmp_path, *TINY, f"train.tasks.names=['{tmp_path}/none.yaml']")
    with pytest.raises(AssertionError, match=r"no such file of a task"):
        work_ranks(config, 1, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_settings_are_checked(tmp_path):
    with pytest.raises(ConfigErrors, match=r"train\.tasks\.limit"):
        small_config(tmp_path, "train.tasks.limit=0")
