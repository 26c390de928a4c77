"""What a sweep tells of its jobs, and what Hydra's sweeper gets of each."""

from __future__ import annotations

import math
import textwrap
from typing import Any, ClassVar

import pytest
from hydra.experimental.callback import Callback

from orchestrator.config.compose import run_composed
from orchestrator.config.sweep import Scored, Sweep
from orchestrator.errors import DIVERGED, DONE, FAILED, ConfigError


def test_the_table_has_what_differs_and_marks_the_best(capsys):
    sweep = Sweep()
    ends = [Scored(DONE, 5.25, "val_loss"), Scored(DONE, 5.125, "val_loss"), Scored(DIVERGED, math.inf, "val_loss")]
    for number, (lr, ended) in enumerate(zip(["1e-3", "3e-4", "9"], ends, strict=True)):
        values = {"model": "tiny", "optim.lr": lr}
        assert sweep.run(number, f"optim.lr={lr}", values, lambda ended=ended: ended) == ended.objective
    assert sweep.run(3, "x", {"model": "tiny", "optim.lr": "0"}, _refuse) is None
    assert sweep.conclude() == DIVERGED
    table = """
        job  optim.lr  val_loss
        0    1e-3      5.25
        1    3e-4      5.125  <- best
        2    9         inf
        3    0         failed
        """
    assert textwrap.dedent(table).strip() in capsys.readouterr().out


def test_more_is_better_where_that_is_so():
    sweep = Sweep()
    for number, rate in enumerate((900.0, 1000.0)):
        sweep.run(number, "", {"a": str(number)}, lambda rate=rate: Scored(DONE, rate, "tokens_per_second", False))
    assert sweep.table().endswith("1    1  1000  <- best")


def test_one_job_and_jobs_without_a_number_have_no_table():
    sweep = Sweep()
    sweep.run(0, "", {}, lambda: Scored(DONE, 1.0))
    assert sweep.table() == ""
    other = Sweep()
    for number in (0, 1):
        other.run(number, "", {}, lambda: Scored(DONE))
    assert other.table() == ""


class Seen(Callback):
    """Hydra's callback: what the launcher gives back to the sweeper."""

    values: ClassVar[list[float | None]] = []

    def on_job_end(self, config: Any, job_return: Any, **kwargs: Any) -> None:
        self.values.append(job_return.return_value)


def test_hydras_sweeper_gets_the_objective_of_each_job(tmp_path, capsys):
    def task(composed):
        return Scored(DONE, composed.config.optim.lr * 2, composed.config.train.objective)

    callback = f"+hydra.callbacks.seen._target_={Seen.__module__}.Seen"
    words = ["-m", "optim.lr=0.5,0.25", "train.objective=loss", callback, f"hydra.sweep.dir={tmp_path}"]
    assert run_composed(words, "test", task) == DONE
    assert Seen.values == [1.0, 0.5]
    assert "1    0.25      0.5  <- best" in capsys.readouterr().out


@pytest.mark.parametrize("code", [DONE, FAILED])
def test_a_single_run_prints_no_table(code, capsys):
    assert run_composed([], "test", lambda composed: Scored(code, 1.0)) == code
    assert capsys.readouterr().out == ""


def _refuse() -> Scored:
    raise ConfigError("no")
