"""The batch script of a run for Slurm. Everything that comes from the configuration is quoted."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from orchestrator.config.launch_schema import SlurmLaunch
from orchestrator.engines.engine_job import EngineJob
from orchestrator.engines.shell_text import exports
from orchestrator.installing import importable
from orchestrator.runs import run_directory

SCRIPT = "job.sbatch"
CANCELLED = "cancelled"  # a file of this name tells the script that it is not to start again
LINES = "slurm-*.out"
_EFA = {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1", "FI_EFA_FORK_SAFE": "1"}
_GPUS = {"cuda": "--nv", "rocm": "--rocm"}

_BODY = r"""
# Slurm signals a job that it stops: the processes save and end by themselves, and this shell waits for them.
signalled=
trap 'signalled=1' TERM
newest() {
  local found= manifest
  if [ -n "$checkpoints" ]; then
    for manifest in "$checkpoints"/step-*/manifest.json; do [ -e "$manifest" ] && found=$manifest; done
  fi
  printf '%s' "$found"
}
state() {
  local found
  found=$(scontrol show job --oneliner "$SLURM_JOB_ID") && found=${found#*JobState=} && printf '%s' "${found%% *}"
}
requeue() {
  if [ -e "$folder/cancelled" ] || [ "$(state)" = CANCELLED ]; then
    echo "launch: cancelled, not queued again"
  else
    echo "launch: queued again"
    scontrol requeue "$SLURM_JOB_ID"
  fi
}
again=
while :; do
  "${srun[@]}" &
  step=$!
  wait "$step"
  code=$?
  # A signal ends `wait`, and not what is waited for.
  while [ -n "$signalled" ]; do
    signalled=
    wait "$step"
    code=$?
  done
  case $code in
    0) rm -f "$failures"; exit 0 ;;
    2 | 3 | 126 | 127) exit "$code" ;; # the same again would end the same
    130 | 143) requeue; exit "$code" ;; # saved on request: time limit, preemption, a node that is lost
  esac
  # A process was lost, or failed. Failures in a row are counted, without a new checkpoint between them.
  last=none
  count=0
  [ -e "$failures" ] && { read -r count; read -r last; } <"$failures"
  checkpoint=$(newest)
  [ "$checkpoint" = "$last" ] || count=0
  count=$((count + 1))
  printf '%s\n%s\n' "$count" "$checkpoint" >"$failures"
  if [ "$count" -gt "$max_restarts" ]; then
    echo "launch: failed with exit code $code, $count times without a new checkpoint: given up"
    exit "$code"
  fi
  if [ -n "$again" ] && [ "$count" -gt 1 ]; then
    # These nodes may be the cause, and Slurm may find that out meanwhile.
    requeue
    exit "$code"
  fi
  again=1
  echo "launch: failed with exit code $code, started again ($count of $max_restarts)"
  sleep "$backoff"
done
"""


def slurm_script(job: EngineJob) -> str:
    """Render the batch script of a job or a sweep.

    Args:
        job: what is to run.
    """
    launch = cast(SlurmLaunch, job.config.launch)
    lines = ["#!/bin/bash", *(f"#SBATCH {_quoted_option(word)}" for word in sbatch_options(job)), "set -u", ""]
    if launch.modules:
        lines.append(shlex.join(["module", "load", *launch.modules]) + " || exit 2")
    environment = {**_environment(launch), **job.environment, **(_EFA if launch.efa else {}), **launch.environment}
    lines += [*exports(environment), f"cd {shlex.quote(os.getcwd())} || exit 2"]
    lines += [f"folder={shlex.quote(str(job.folder))}", f"max_restarts={launch.max_restarts}"]
    lines.append(f"backoff={launch.backoff_seconds:g}")
    if job.sweep:
        lines.append("case $SLURM_ARRAY_TASK_ID in")
        for number, command in enumerate(job.sweep):
            lines += [f"{number})", *(f"  {line}" for line in _start(job, command, f"failures-{number}")), "  ;;"]
        lines.append("esac")
    else:
        lines += _start(job, job.command, "failures")
    return "\n".join(lines) + "\n" + _BODY


def _environment(launch: SlurmLaunch) -> dict[str, str]:
    """Return what makes this package importable on the nodes, where they run the interpreter of this process."""
    return {} if launch.container_image or launch.python else importable()


def _start(job: EngineJob, command: Sequence[str], failures: str) -> list[str]:
    launch = cast(SlurmLaunch, job.config.launch)
    srun = ["srun", "--kill-on-bad-exit=1"]
    if launch.cpus_per_task is not None:
        srun.append(f"--cpus-per-task={launch.cpus_per_task}")  # since 22.05 a step does not take over the job's
    run_id = next(word for word in command if word.startswith("run_id=")).partition("=")[2]
    run_dir = job.run_dir if not job.sweep else run_directory.named(job.config, run_id).absolute()
    place = run_directory.checkpoints_dir(run_dir, job.config)
    return [
        f"checkpoints={shlex.quote(str(place.absolute())) if isinstance(place, Path) else ''}",
        f'failures="$folder"/{failures}',
        f"srun=({shlex.join([*srun, *_interpreter(job), *command])})",
    ]


def _interpreter(job: EngineJob) -> list[str]:
    """Return the words up to the interpreter: options of srun for a container, or a container's own program."""
    launch = cast(SlurmLaunch, job.config.launch)
    if launch.container_image is None:
        return [launch.python or sys.executable]
    python, here = launch.python or "python", os.getcwd()
    places = dict.fromkeys([here, str(Path(job.config.runs_dir).absolute())])
    mounts = [*(f"{place}:{place}" for place in places), *launch.container_mounts]
    if launch.container_kind == "pyxis":
        options = [f"--container-image={launch.container_image}", f"--container-mounts={','.join(mounts)}"]
        return [*options, f"--container-workdir={here}", python]
    binds = [word for mount in mounts for word in ("--bind", mount)]
    gpus = [_GPUS[job.config.hardware.target]] if job.config.hardware.target in _GPUS else []
    return ["apptainer", "exec", *gpus, *binds, "--pwd", here, launch.container_image, python]


def sbatch_options(job: EngineJob) -> list[str]:
    """Return the options of sbatch, as words.

    Args:
        job: what is to run.
    """
    launch = cast(SlurmLaunch, job.config.launch)
    output = str(job.folder).replace("%", "%%") + ("/slurm-%A_%a.out" if job.sweep else "/slurm-%j.out")
    values: dict[str, object] = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.processes_per_node,
        "cpus-per-task": launch.cpus_per_task,
        "gres": gres(job),
        "mem": launch.mem,
        "time": launch.time,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "reservation": launch.reservation,
        "constraint": launch.constraint,
        "output": output,
        "open-mode": "append",
        "signal": f"TERM@{launch.signal_seconds}" if launch.signal_seconds else None,
        **launch.extra,
    }
    options = [f"--{name}={value}" for name, value in values.items() if value is not None]
    if is_exclusive(job):
        options.append("--exclusive")
    if job.sweep:
        most = f"%{launch.jobs_at_once}" if launch.jobs_at_once else ""
        options.append(f"--array=0-{len(job.sweep) - 1}{most}")
    return [*options, "--requeue"]


def gres(job: EngineJob) -> str | None:
    """Return the devices of a node as Slurm counts them; None where whole nodes are asked for.

    Args:
        job: what is to run.
    """
    launch = cast(SlurmLaunch, job.config.launch)
    if launch.gres is None and job.config.hardware.target in _GPUS and job.devices_per_node is not None:
        return f"gpu:{job.devices_per_node}"
    return launch.gres


def is_exclusive(job: EngineJob) -> bool:
    """Return whether the job wants its nodes for itself.

    Args:
        job: what is to run.
    """
    wanted = cast(SlurmLaunch, job.config.launch).exclusive
    return gres(job) is None and job.config.hardware.target != "cpu" if wanted is None else wanted


def _quoted_option(word: str) -> str:
    """Quote as sbatch reads the lines of a script: a blank or a `#` would end the option."""
    name, separator, value = word.partition("=")
    return f'{name}{separator}"{value}"' if set(value) & set(" #'\t") else word
