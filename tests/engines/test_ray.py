"""Jobs on Ray: what is submitted, and a real local Ray whose workers start the product."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from orchestrator.engines.engine_table import engine_of
from orchestrator.engines.ray_engine import SPEC, RayEngine
from orchestrator.errors import ConfigErrors, LaunchError
from tests.lab.engine_jobs import ENGINES_INSTALLED, ENGINES_PYTHON, FakeClient, changed, job_of, submission
from tests.lab.run_server import ROOT
from tests.lab.runs import small_overrides

WORDS = ("launch=ray", "hardware=cuda", "hardware.devices=8", "launch.nodes=2", "layout.fsdp=16", "runs_dir=/shared")


def test_a_worker_is_a_host_with_its_devices():
    rendered = RayEngine().render(job_of(*WORDS, "launch.address=http://head:8265"))
    spec = json.loads(rendered.files[SPEC])
    assert (spec["hosts"], spec["spread"], spec["resources"]) == (2, True, {"CPU": 1.0, "GPU": 8.0})
    assert rendered.submit[:6] == ("ray", "job", "submit", "--no-wait", "--address", "http://head:8265")
    assert json.loads(rendered.submit[-1]) == spec
    assert RayEngine().problems(job_of(*WORDS), rendered) == []
    trainium = changed(job_of(*WORDS), {"hardware.target": "trainium", "hardware.devices": 64})
    assert json.loads(RayEngine().render(trainium).files[SPEC])["resources"] == {"CPU": 1.0, "neuron_cores": 64.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hardware.target": "auto"}, "hardware must be named"),
        ({"hardware.devices": "auto"}, "how many devices"),
        ({"hardware.target": "tpu", "hardware.devices": "auto"}, "how many chips"),
        ({"runs_dir": "runs"}, "a folder of its own"),
    ],
)
def test_what_ray_cannot_place_is_refused(changes, said):
    with pytest.raises(ConfigErrors) as error:
        RayEngine().render(changed(job_of(*WORDS), changes))
    assert [said in problem.what for problem in error.value.problems] == [True]


def test_an_edited_job_is_looked_at_again():
    job = job_of(*WORDS)
    rendered = RayEngine().render(job)
    for text, said in (("{", "no JSON"), ("[]", "lacks keys"), ('{"hosts": "2"}', "lacks keys")):
        (problem,) = RayEngine().problems(job, type(rendered)({SPEC: text}, ()))
        assert said in problem.what


def test_ray_submits_asks_and_stops(tmp_path, monkeypatch):
    client = FakeClient("ray", tmp_path, monkeypatch)
    engine, found = engine_of("ray"), submission("ray", "tiny-job", tmp_path, address="http://head:8265")
    assert engine.submit(job_of(*WORDS), engine.render(job_of(*WORDS))) == "tiny-job"
    answers = {
        "Status for job 'tiny-job': RUNNING\nStatus message: Job is currently running.": "running",
        "Status for job 'tiny-job': PENDING": "waiting",
        "Job 'tiny-job' succeeded": "finished",
        "Job 'tiny-job' failed\nStatus message: exit code 1": "failed",
        "Job 'tiny-job' was stopped": "cancelled",
    }
    for answer, state in answers.items():
        client.answer(answer)
        assert engine.status(found).state == state
    client.answer("?")
    with pytest.raises(LaunchError, match="no state"):
        engine.status(found)
    engine.cancel(found)
    assert client.calls[-1] == "job stop --no-wait --address http://head:8265 tiny-job"


@pytest.mark.slow
@pytest.mark.skipif(not ENGINES_INSTALLED, reason="scripts/setup engines makes the environment with Ray")
def test_a_real_ray_trains_on_two_workers_and_starts_again_after_a_loss(tmp_path):
    """The first start of worker 1 kills its process after the first commit; the job goes on from there and ends."""
    words = ["hardware.devices=1", "layout.fsdp=2", "train.max_steps=60", "checkpoint.every_steps=5"]
    line = ["-m", "orchestrator", "train", *small_overrides(tmp_path, *words), "resume=auto", "run_id=job"]
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/bash
if [ "$ORCHESTRATOR_HOST" = 1 ] && mkdir '{tmp_path}/killed' 2>/dev/null; then
  {sys.executable} "$@" & pid=$!
  until compgen -G '{tmp_path}/runs/*/job/checkpoints/*/manifest.json' >/dev/null; do sleep 0.1; done
  kill -9 $pid; exit 1
fi
exec {sys.executable} "$@"
""")
    python.chmod(0o755)
    spec = {
        "name": "job",
        "python": str(python),
        "command": line,
        "folder": str(tmp_path),
        "hosts": 2,
        "spread": False,
        "resources": {"CPU": 1},
        "max_restarts": 2,
        "storage": str(tmp_path / "ray"),
        "environment": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    }
    # Ray ends workers where other processes fill the memory of the machine.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_memory_monitor_refresh_ms": "0", "TMPDIR": "/tmp"}
    command = [ENGINES_PYTHON, "-m", "orchestrator.engines.ray_driver", json.dumps(spec)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (run_dir,) = (tmp_path / "runs").glob("*/job")
    record = json.loads((run_dir / "run.json").read_text())
    assert record["status"] == "finished"
    assert [leg["start_step"] > 0 for leg in record["legs"]] == [False, True]
    assert all(leg["hosts"] == 2 for leg in record["legs"])
