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
from orchestrator.hardware.host import EFA_VARIABLES
from orchestrator.installing import importable

SCRIPT = "job.sbatch"
CANCELLED = "cancelled"  # a file of this name tells the script that it is not to start again
LINES = "slurm-*.out"
_GPUS = {"cuda": "--nv", "rocm": "--rocm"}

# What each process runs in. When one has failed, srun ends the others and reports the largest code of all, which is
# theirs then (143): which one failed, and how, is known here alone. A signal goes to this shell, too, which waits.
_RECORDING = r"""trap : TERM INT
"$@"
code=$?
case $code in 0 | 130 | 143) ;; *) echo "$code" >"$ORCHESTRATOR_CODES.$SLURM_PROCID" ;; esac
exit "$code"
"""
_MAX_STOPS = 10  # in a row without a new checkpoint: the time limit is shorter than a start
_WAIT_SECONDS = 120  # for the others, when the first process has ended: the node of one may be gone without a word

_BODY = r"""
# Slurm signals a job that it stops: the processes save and end by themselves, and this shell waits for them.
signalled=
trap 'signalled=1' TERM
newest() { # checkpoint that is committed
  local found='' manifest
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
  exit "$code"
}
in_a_row() { # counts in a file, anew for each new checkpoint: sets `count`
  local last='' checkpoint
  count=0
  checkpoint=$(newest)
  [ -e "$1" ] && { read -r count; read -r last; } <"$1"
  [ "$checkpoint" = "$last" ] || count=0
  count=$((count + 1))
  printf '%s\n%s\n' "$count" "$checkpoint" >"$1"
}
attempt=0
while :; do
  attempt=$((attempt + 1))
  export ORCHESTRATOR_CODES="$folder/codes-$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$attempt"
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
  [ "$code" = 0 ] && exit 0
  for file in "$ORCHESTRATOR_CODES".*; do
    [ -e "$file" ] || continue
    read -r found <"$file"
    case $found in
      2 | 3) code=$found ;;
      *) case $code in 2 | 3) ;; *) code=$found ;; esac ;;
    esac
  done
  case $code in
    2 | 3 | 126 | 127) exit "$code" ;; # the same again would end the same
    130 | 143) # saved on request: time limit, preemption
      in_a_row "$failures-stops"
      if [ -n "$checkpoints" ] && [ "$count" -gt "$max_stops" ]; then
        echo "launch: stopped $count times without a new checkpoint: given up. Give it more time, or save more often"
        exit "$code"
      fi
      requeue
      ;;
  esac
  # A process was lost, or failed. Failures in a row are counted, without a new checkpoint between them.
  in_a_row "$failures"
  if [ "$count" -gt "$max_restarts" ]; then
    echo "launch: failed with exit code $code, $count times without a new checkpoint: given up"
    exit "$code"
  fi
  echo "launch: failed with exit code $code, started again ($count of $max_restarts)"
  # Once on the same nodes, which takes no time. They may be the cause, and Slurm may find that out meanwhile.
  [ "$attempt" -gt 1 ] && requeue
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
    efa = EFA_VARIABLES if launch.efa else {}
    environment = {**_environment(launch), **job.environment, **efa, **launch.environment}
    lines += [*exports(environment), f"cd {shlex.quote(os.getcwd())} || exit 2"]
    lines += [f"folder={shlex.quote(str(job.folder))}", f"max_restarts={launch.max_restarts}"]
    lines.append(f"max_stops={_MAX_STOPS}")
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
    from orchestrator.runs import run_directory  # with NumPy, which --help does without

    srun = ["srun", "--kill-on-bad-exit=1", f"--wait={_WAIT_SECONDS}"]
    if (cpus := cpus_per_task(job)) is not None:
        srun.append(f"--cpus-per-task={cpus}")  # since 22.05 a step does not take over the job's
    run_id = next(word for word in command if word.startswith("run_id=")).partition("=")[2]
    run_dir = job.run_dir if not job.sweep else run_directory.named(job.config, run_id).absolute()
    place = run_directory.checkpoints_dir(run_dir, job.config)
    return [
        f"checkpoints={shlex.quote(str(place.absolute())) if isinstance(place, Path) else ''}",
        f'failures="$folder"/{failures}',
        f"srun=({shlex.join([*srun, *_wrapped(job, command)])})",
    ]


def _wrapped(job: EngineJob, command: Sequence[str]) -> list[str]:
    """Return what srun starts: options of srun for a container, or a container's own program, and in it the command."""
    launch = cast(SlurmLaunch, job.config.launch)
    recording = ["bash", "-c", _RECORDING, "bash"]
    if launch.container_image is None:
        return [*recording, launch.python or sys.executable, *command]
    inner, here = [launch.python or "python", *command], os.getcwd()
    places = dict.fromkeys([here, str(Path(job.config.runs_dir).absolute())])
    mounts = [*(f"{place}:{place}" for place in places), *launch.container_mounts]
    if launch.container_kind == "pyxis":
        options = [f"--container-image={launch.container_image}", f"--container-mounts={','.join(mounts)}"]
        return [*options, f"--container-workdir={here}", *recording, *inner]
    binds = [word for mount in mounts for word in ("--bind", mount)]
    gpus = [_GPUS[job.config.hardware.target]] if job.config.hardware.target in _GPUS else []
    return [*recording, "apptainer", "exec", *gpus, *binds, "--pwd", here, launch.container_image, *inner]


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
        "cpus-per-task": cpus_per_task(job),
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


def cpus_per_task(job: EngineJob) -> int | None:
    """Return the processors of a task of srun; None for Slurm's own default, which is one.

    Args:
        job: what is to run.
    """
    wanted, devices = cast(SlurmLaunch, job.config.launch).cpus_per_task, job.devices_per_node
    if wanted is None and job.nodes == 1 and devices is not None and devices > 1 and not is_exclusive(job):
        return devices  # the node's only task starts a process for each, and they would share its processor
    return wanted


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
