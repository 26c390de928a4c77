"""What is rendered for Slurm: the options, and the script, run by bash with stand-ins for Slurm's commands."""

from __future__ import annotations

import functools
import os
import shlex
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from orchestrator.config.compose import compose
from orchestrator.config.schema import RunConfig
from orchestrator.engines.engine_job import EngineJob, engine_job
from orchestrator.engines.slurm_engine import SlurmEngine
from orchestrator.engines.slurm_rules import seconds_of
from orchestrator.engines.slurm_script import SCRIPT, sbatch_options

ENGINE = SlurmEngine()


@functools.cache
def composed() -> RunConfig:
    return compose(["launch=slurm", "hardware=cpu"]).config


def job(tmp_path: Path, hardware: str = "cpu", devices: int | None = None, **launch: Any) -> EngineJob:
    """A job, with keys of the launch group."""
    config = composed()
    target = replace(config.hardware, target=cast(Any, hardware), devices="auto" if devices is None else devices)
    place = str(tmp_path / "runs")
    config = replace(config, hardware=target, launch=replace(config.launch, **launch), runs_dir=place)
    return engine_job(config, "one", ["launch=slurm"])


def problems(job: EngineJob) -> list[str]:
    return [str(problem) for problem in ENGINE.problems(job, ENGINE.render(job))]


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        ({"nodes": 2}, ["--nodes=2", "--ntasks-per-node=1", "--requeue", "--open-mode=append"]),
        ({"hardware": "cuda", "devices": 8, "nodes": 4}, ["--ntasks-per-node=8", "--gres=gpu:8"]),
        ({"hardware": "cuda", "devices": 8}, ["--ntasks-per-node=1", "--gres=gpu:8"]),
        ({"hardware": "cuda", "devices": 4, "gres": "gpu:h100:4"}, ["--gres=gpu:h100:4"]),
        ({"hardware": "trainium", "devices": 64, "nodes": 2}, ["--ntasks-per-node=64", "--exclusive"]),
        ({"hardware": "trainium", "devices": 64, "gres": "neuron:16"}, ["--gres=neuron:16"]),
        ({"time": "1-12:00:00", "signal_seconds": 300}, ["--time=1-12:00:00", "--signal=TERM@300"]),
        ({"mem": "64G", "cpus_per_task": 4}, ["--mem=64G", "--cpus-per-task=4"]),
        ({"devices": 4}, ["--ntasks-per-node=1", "--cpus-per-task=4"]),
        ({"devices": 4, "cpus_per_task": 2}, ["--cpus-per-task=2"]),
        ({"extra": {"mail-type": "END"}}, ["--mail-type=END"]),
    ],
)
def test_options(tmp_path, keys, options):
    found = sbatch_options(job(tmp_path, **keys))
    assert set(options) <= set(found)
    assert problems(job(tmp_path, **keys)) == []


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"time": "tomorrow"}, "'launch.time' is no time limit"),
        ({"time": "12:75:00"}, "'launch.time' is no time limit"),
        ({"time": 0}, "a time limit of 0 is none"),
        ({"time": 2}, "asked to stop as soon as it starts"),
        ({"signal_seconds": 70000}, "'launch.signal_seconds' is out of range"),
        ({"mem": "64GB"}, "'launch.mem' is not as Slurm has it"),
        ({"partition": "gpu long"}, "'launch.partition' is not as Slurm has it"),
        ({"account": "-x"}, "'launch.account' is not as Slurm has it"),
        ({"qos": "a\n#SBATCH --uid=0"}, "'launch.qos' is not as Slurm has it"),
        ({"gres": "fpga:a:"}, "'launch.gres' is not as Slurm has it"),
        ({"gres": "gpu:2"}, "GPUs are asked for that hardware=cpu would not use"),
        ({"constraint": "a;b"}, "'launch.constraint' is not as Slurm has it"),
        ({"cpus_per_task": 0}, "'launch.cpus_per_task' is out of range"),
        ({"modules": ("cuda;rm",)}, "no name of a module"),
        ({"extra": {"requeue": "x"}}, "this option of sbatch has another place"),
        ({"extra": {"--wrap": "x"}}, "no option of sbatch"),
        ({"extra": {"comment": 'a"b'}}, "'launch.extra.comment' cannot be written"),
        ({"environment": {"A-B": "c"}}, "none of a variable"),
        ({"environment": {"A": "c\nd"}}, "has several lines"),
        ({"container_mounts": ("/a:/b",)}, "mounts without a container"),
        ({"container_image": "-x"}, "no name of an image"),
        ({"container_image": "x", "container_mounts": ("a:/b",)}, "no mount of a container"),
        ({"hardware": "cuda"}, "how many GPUs a node is to give"),
        ({"hardware": "cuda", "devices": 8, "gres": "gpu:a100:4"}, "different numbers of GPUs"),
    ],
)
def test_what_slurm_would_refuse_is_found_here(tmp_path, keys, said):
    found = problems(job(tmp_path, **keys))
    assert len(found) == 1, found
    assert said in found[0]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("2:30", 150),
        ("1:00:01", 3601),
        ("1-0", 86400),
        ("2-12:30", 217800),
        ("1:2:3:4", None),
        ("", None),
    ],
)
def test_time_limits(text, seconds):
    assert seconds_of(text) == seconds


def test_nothing_of_a_configuration_is_executed(tmp_path):
    """Quotes, blanks and what a shell would run arrive as they are; the script is one that bash can read."""
    place = tmp_path / "it's a $(touch hacked) %j"
    nasty = "';touch hacked;`touch hacked`$(touch hacked)"
    one = job(place, environment={"A": nasty}, python=nasty)
    one = replace(one, command=(*one.command, f"train.sample.prompt={nasty}"))
    text = ENGINE.render(one).files[SCRIPT]
    assert str(place).replace("%", "%%") in text, "a pattern of Slurm's own"
    ended, calls = run_script(tmp_path, text, ["0"])
    assert ended.returncode == 0, ended.stderr
    assert f"train.sample.prompt={nasty}" in calls[0]
    assert not [path for path in tmp_path.rglob("*") if path.name == "hacked"]
    assert not Path("hacked").exists()


@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_containers(tmp_path, kind):
    mounts = ("/data:/data:ro",)
    image = "nvcr.io#nvidia/pytorch:26.10"
    one = job(tmp_path, "cuda", 8, container_image=image, container_kind=kind, container_mounts=mounts)
    text = ENGINE.render(one).files[SCRIPT]
    own = f"{os.getcwd()}:{os.getcwd()}"
    assert (f"--container-mounts={own}" if kind == "pyxis" else f"apptainer exec --nv --bind {own}") in text
    assert "/data:/data:ro" in text
    assert " python -m orchestrator train resume=auto run_id=one " in text
    assert "PYTHONPATH" not in text, "the container has its own"
    assert problems(one) == []


FAKE_SRUN = """#!/bin/bash
# Ends as the next line of `plan` says: its exit code, and what each process recorded.
echo "$@" >>{folder}/calls
read -r code recorded <{folder}/plan
sed -i 1d {folder}/plan
saved={run}/checkpoints/$recorded
case $recorded in step-*) mkdir -p "$saved"; touch "$saved"/manifest.json; recorded= ;; esac
rank=0
for one in $recorded; do echo $one >"$ORCHESTRATOR_CODES.$rank"; rank=$((rank + 1)); done
exit $code
"""
FAKE_SCONTROL = """#!/bin/bash
case $1 in
  show) echo "JobId=7 JobState=$(cat {folder}/state) Reason=None" ;;
  *) echo "$@" >>{folder}/requeued ;;
esac
"""


def run_script(tmp_path: Path, text: str, plan: list[str], state: str = "RUNNING"):
    """Run a rendered script; what srun is to do at each call is a line of `plan`. Returns its end, and srun's calls."""
    folder = tmp_path / "fake"
    folder.mkdir(exist_ok=True)
    place = dict(line.split("=", 1) for line in text.splitlines() if line.startswith(("folder=", "checkpoints=")))
    launch = Path(*shlex.split(place["folder"]))
    launch.mkdir(parents=True, exist_ok=True)
    (folder / "plan").write_text("".join(f"{line}\n" for line in plan))
    (folder / "state").write_text(state)
    for name, content in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (folder / name).write_text(content.format(folder=shlex.quote(str(folder)), run=shlex.quote(str(launch.parent))))
        (folder / name).chmod(stat.S_IRWXU)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    ended = subprocess.run(["bash"], input=text, text=True, capture_output=True, env=environment, timeout=60)
    calls = (folder / "calls").read_text().splitlines()
    return ended, [call for call in calls if "resume=auto" in call]


@pytest.mark.parametrize(
    ("plan", "code", "starts", "requeued", "said"),
    [
        (["0"], 0, 1, False, ""),
        (["2"], 2, 1, False, ""),  # a mistake is one at every start
        (["143 2"], 2, 1, False, ""),  # one process found a mistake, srun ended the others
        (["3 3 1"], 3, 1, False, ""),
        (["127"], 127, 1, False, ""),
        (["143"], 143, 1, True, "queued again"),  # saved before the time limit, or for a preemption
        (["1", "0"], 0, 2, False, "started again (1 of 2)"),  # a process was lost: once on the same nodes
        (["143 1", "0"], 0, 2, False, "with exit code 1, started again (1 of 2)"),  # it was no signal from outside
        (["137", "137"], 137, 2, True, "started again (2 of 2)"),  # then on others
        (
            ["1 step-00000010", "1 step-00000020", "0"],
            1,
            2,
            True,
            "started again (1 of 2)",
        ),  # a failure is not in a row
    ],
)
def test_what_the_script_does_when_a_run_ends(tmp_path, plan, code, starts, requeued, said):
    text = ENGINE.render(job(tmp_path, max_restarts=2, backoff_seconds=0)).files[SCRIPT]
    ended, calls = run_script(tmp_path, text, plan)
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert len(calls) == starts
    assert (tmp_path / "fake" / "requeued").exists() == requeued
    assert said in ended.stdout


def test_failures_are_counted_over_requeues_and_only_without_a_new_checkpoint(tmp_path):
    text = ENGINE.render(job(tmp_path, max_restarts=2, backoff_seconds=0)).files[SCRIPT]
    assert run_script(tmp_path, text, ["1", "1"])[0].returncode == 1
    ended, _ = run_script(tmp_path, text, ["143"])
    assert "given up" not in ended.stdout, "a preemption is no failure"
    ended, _ = run_script(tmp_path, text, ["1"])
    assert "failed with exit code 1, 3 times without a new checkpoint: given up" in ended.stdout
    assert ended.returncode == 1
    ended, _ = run_script(tmp_path, text, ["1 step-00000010", "0"])
    assert "started again (1 of 2)" in ended.stdout, "it has gone on in between"


def test_a_time_limit_that_is_shorter_than_a_start_is_no_endless_loop(tmp_path):
    text = ENGINE.render(job(tmp_path)).files[SCRIPT]
    for _ in range(10):
        assert "queued again" in run_script(tmp_path, text, ["143"])[0].stdout
    assert "stopped 11 times without a new checkpoint: given up" in run_script(tmp_path, text, ["143"])[0].stdout
    ended, _ = run_script(tmp_path, text, ["143 step-00000010"])
    assert "queued again" in ended.stdout, "it has saved"


@pytest.mark.parametrize("how", ["file", "state"])
def test_what_was_cancelled_is_not_queued_again(tmp_path, how):
    one = job(tmp_path)
    text = ENGINE.render(one).files[SCRIPT]
    one.folder.mkdir(parents=True)
    if how == "file":
        (one.folder / "cancelled").touch()
    ended, _ = run_script(tmp_path, text, ["143"], state="RUNNING" if how == "file" else "CANCELLED")
    assert "cancelled, not queued again" in ended.stdout
    assert not (tmp_path / "fake" / "requeued").exists()
