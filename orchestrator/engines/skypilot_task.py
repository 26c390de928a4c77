"""The task of a SkyPilot job: where it may run, how the product is installed there, and the command."""

from __future__ import annotations

import shlex
from typing import Any

from orchestrator.config.launch_schema import SkypilotLaunch
from orchestrator.distributed.job_host import HOST, HOSTS, STORE
from orchestrator.distributed.world import DEFAULT_PORT
from orchestrator.engines.engine_job import EngineJob
from orchestrator.engines.shell_text import exports
from orchestrator.engines.skypilot_candidates import SkyCandidate
from orchestrator.errors import INTERRUPTED, TERMINATED

_VENV = "$HOME/orchestrator-venv"
# What is found on arrival decides what is installed: the same script runs on every vendor's machines.
_SETUP = """\
set -e
package={package} neuron_index={neuron_index}
command -v uv >/dev/null || python3 -m pip install --quiet --user uv
export PATH="$HOME/.local/bin:$PATH"
uv venv --quiet --allow-existing --python 3.12 "{venv}"
if [ -e /dev/neuron0 ]; then
  uv pip install --quiet --python "{venv}/bin/python" --extra-index-url "$neuron_index" \\
    "$package[remote]" 'torch-neuronx==2.13.*' 'neuronx-cc==2.*'
elif [ -e /dev/accel0 ] || {{ [ -d /dev/vfio ] && [ ! -e /dev/nvidia0 ]; }}; then
  uv pip install --quiet --python "{venv}/bin/python" "$package[remote,tpu-native]"
else
  uv pip install --quiet --python "{venv}/bin/python" "$package[remote]"
fi
"{venv}/bin/python" -m orchestrator doctor
"""
_RUN = """\
set -e
{exports}
export {host}="$SKYPILOT_NODE_RANK" {hosts}="$SKYPILOT_NUM_NODES"
export {store}="tcp:$(printf '%s\\n' "$SKYPILOT_NODE_IPS" | head -n 1):{port}"
{python} {command}
"""


def task(job: EngineJob, launch: SkypilotLaunch, candidates: list[SkyCandidate]) -> dict[str, Any]:
    """Return the task.

    Args:
        job: what is to run.
        launch: its `launch` group.
        candidates: where it may run, in the order of preference.
    """
    python = "python" if launch.image else f'"{_VENV}/bin/python"'
    run = _RUN.format(
        exports="\n".join(exports(job.environment)) or ":",
        host=HOST,
        hosts=HOSTS,
        store=STORE,
        port=DEFAULT_PORT,
        python=python,
        command=shlex.join(job.command),
    )
    install = _SETUP.format(
        package=shlex.quote(launch.package), neuron_index=shlex.quote(launch.neuron_index or ""), venv=_VENV
    )
    chosen = "ordered" if launch.choose == "ordered" else "any_of"
    return {
        "name": job.name,
        **({"workdir": launch.workdir} if launch.workdir else {}),
        "num_nodes": job.nodes,
        "resources": {chosen: [_resources(launch, candidate) for candidate in candidates]},
        **({"secrets": dict.fromkeys(launch.secrets)} if launch.secrets else {}),
        **({} if launch.image else {"setup": install}),
        "run": run,
    }


def _resources(launch: SkypilotLaunch, candidate: SkyCandidate) -> dict[str, Any]:
    accelerators = candidate.name if candidate.is_tpu else f"{candidate.name}:{candidate.count}"
    return {
        **({"infra": candidate.infra} if candidate.infra else {}),
        "accelerators": accelerators,
        **({"accelerator_args": {"runtime_version": candidate.runtime_version}} if candidate.is_tpu else {}),
        "use_spot": candidate.spot,
        **({"image_id": f"docker:{launch.image}"} if launch.image else {}),
        **({"disk_size": launch.disk_gb} if launch.disk_gb else {}),
        "job_recovery": {
            "strategy": launch.strategy,
            # SkyPilot cannot be told never to try again: a mistake is tried as often as a failure.
            "max_restarts_on_errors": launch.max_restarts,
            "recover_on_exit_codes": [INTERRUPTED, TERMINATED],  # as often as it happens
        },
    }
