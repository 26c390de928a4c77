"""A job that loses its TPU machine goes on on another vendor's chips, by the command line that the first one had.

Rehearsed: the devices are processes of this CPU that go by the vendors' names and runtimes (docs/chips.md), the bucket
is a server of S3 on this machine, and the machine is lost by SIGKILL of everything on it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto")

from orchestrator.checkpoint.run_checkpoints import committed
from orchestrator.checkpoint.storage import locate
from tests.lab.cli import kill_all, run, start, wait_until
from tests.lab.runs import read_rows, small_overrides
from tests.lab.store import reachable, serve

STEPS = 60
TPU = ("hardware=tpu", "hardware.runtime=torch_tpu", "hardware.simulate=4", "layout.fsdp=4")
TRAINIUM = ("hardware=trainium", "hardware.simulate=2", "layout.tensor=2", "layout.fsdp=1")


@pytest.mark.slow
def test_a_lost_tpu_slice_goes_on_on_trainium_and_the_curve_is_kept(tmp_path):
    with serve("s3") as store, reachable(store):
        place = f"{store.place}/moves"
        common = (f"train.max_steps={STEPS}", "optim.schedule.kind=constant", "checkpoint.every_steps=5", "layout=auto")

        def words(folder: str, *more: str) -> list[str]:
            return small_overrides(tmp_path, f"runs_dir={tmp_path / folder}", *common, *more)

        whole = run("train", *words("whole", *TPU, "run_id=whole"))
        assert whole.returncode == 0, whole.stderr
        job = ("resume=auto", "run_id=job", f"checkpoint.dir={place}")
        first = start("train", *words("first machine", *job, *TPU))
        kept = locate(place) / "tiny" / "job"
        wait_until(lambda: bool(committed(kept)), first)
        kill_all(first)
        saved = committed(kept)
        assert saved, "something was saved before the machine was lost"
        again = run("train", *words("second machine", *job, *TRAINIUM))
        assert again.returncode == 0, again.stderr
        step = saved[0].name.rpartition("-")[2].lstrip("0")
        assert f"resumed at step {step}" in again.stdout
        assert "agrees" in again.stdout
        (second,) = (tmp_path / "second machine").glob("*/job")
        record = json.loads((second / "run.json").read_text())
        assert [(leg["target"], leg["layout"]["fsdp"], leg["layout"]["tensor"]) for leg in record["legs"]] == [
            ("tpu", 4, 1),
            ("trainium", 1, 2),
        ]
        (reference,) = (tmp_path / "whole").glob("*/whole")
        expected, found = (_losses(one) for one in (reference, second))
        assert len(expected) == STEPS
        assert set(range(int(step) + 1, STEPS + 1)) <= set(found)
        apart = {step: abs(loss / expected[step] - 1) for step, loss in found.items()}
        # fp32 on another layout: 1e-7 at first, and it grows with the steps.
        assert max(apart[one] for one in apart if one <= int(step) + 5) < 1e-5, apart
        assert max(apart.values()) < 1e-3, apart


def _losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_rows(run_dir) if "loss" in row}
