"""A run whose host is taken away: it is saved in time, on all ranks, and says so."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest

from orchestrator.checkpoint.run_checkpoints import committed
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.errors import TERMINATED
from orchestrator.hardware import preemption_notice
from tests.lab.metadata import serve_metadata
from tests.lab.ranks import run_ranks
from tests.lab.runs import TINY, resolved_run, small_config

ENDLESS = (*TINY, "train.max_steps=100000", "checkpoint.every_steps=null", "layout.fsdp=2")


def _work(world, data, run_dir, host):
    os.environ["GCE_METADATA_HOST"] = host
    preemption_notice.noticing.__wrapped__.__defaults__ = (lambda notice: None, 0.1)
    from orchestrator import stopping
    from orchestrator.launch.run import work

    with stopping.listening(announce=False):
        return work(resolved_run(from_dict(RunConfig, data), world, run_dir), world)


def _preempt_a_run_that_trains(metadata, run_dir):
    rows = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (rows.exists() and rows.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    metadata.preempt()


@pytest.mark.parametrize("grace", ["null", "20"])
def test_a_notice_to_one_host_saves_the_run_on_all(tmp_path, grace):
    config = small_config(tmp_path, *ENDLESS, "launch.notices=gce", f"launch.grace_seconds={grace}")
    (tmp_path / "run").mkdir()
    with serve_metadata() as metadata:
        thread = threading.Thread(target=_preempt_a_run_that_trains, args=(metadata, tmp_path / "run"))
        thread.start()
        codes = run_ranks(2, _work, to_dict(config), tmp_path / "run", metadata.host)
        thread.join()
    assert codes == [TERMINATED] * 2
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "interrupted"
    (leg,) = record["legs"]
    assert leg["notice"] == "Google Cloud takes this host away in about 30 s (preempted), to process 0"
    assert 0 < leg["seconds_left"] < (30 if grace == "null" else 20)
    (saved,) = committed(tmp_path / "run" / "checkpoints")
    assert saved.name == f"step-{leg['end_step']:08d}"
