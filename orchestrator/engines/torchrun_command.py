"""The command line of torchrun on one host: an elastic agent that starts the processes, and starts them again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import cast

from orchestrator.config.launch_schema import SshLaunch, TorchrunLaunch
from orchestrator.engines.engine_job import EngineJob
from orchestrator.engines.shell_text import bad_variables, exports
from orchestrator.errors import ConfigError
from orchestrator.hardware.target_table import target_of

# Without the first an agent that comes back never meets the others: each holds on to the store of its first round. The
# second is for a save: an agent that is asked to stop kills its processes after 30 s.
_ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}
_MONITOR_SECONDS = 1  # torchrun's own is 0.1, which costs processor time; a process that ends is seen so much later
_JOIN_SECONDS = 600  # for all hosts to come; then the job goes on with those that are there, if they are enough
_LAST_CALL_SECONDS = 10  # for more hosts, when there are enough


def torchrun_words(job: EngineJob, python: str, endpoint: str | None, is_host: bool | None = None) -> list[str]:
    """Return the words that start the agent of one host.

    Args:
        job: what is to run.
        python: interpreter of that host.
        endpoint: HOST:PORT where the hosts meet; None for a single host.
        is_host: that host keeps the rendezvous; None: torchrun finds out by the name.
    """
    launch = cast(TorchrunLaunch | SshLaunch, job.config.launch)
    least = job.nodes if launch.min_nodes is None else launch.min_nodes
    nodes = str(job.nodes) if least == job.nodes else f"{least}:{job.nodes}"
    conf = f"join_timeout={_JOIN_SECONDS},last_call_timeout={_LAST_CALL_SECONDS}"
    conf += "" if is_host is None else f",is_host={int(is_host)}"
    meeting = [f"--rdzv-endpoint={endpoint}", f"--rdzv-conf={conf}"] if endpoint else ["--rdzv-endpoint=localhost:0"]
    return [
        *(python, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={_processes(job)}"),
        *("--rdzv-backend=c10d", *meeting, f"--rdzv-id={job.run_id}"),
        *(f"--max-restarts={job.config.launch.max_restarts}", f"--monitor-interval={_MONITOR_SECONDS}"),
        *job.command,
    ]


def _processes(job: EngineJob) -> int | str:
    target = target_of(job.config.hardware)
    if job.devices_per_node is None:
        return 1 if target.strategy == "xla" else "gpu"
    return target.processes(job.devices_per_node)


def torchrun_environment(job: EngineJob) -> dict[str, str]:
    """Return the variables of the agent and its processes.

    Args:
        job: what is to run.
    """
    launch = cast(TorchrunLaunch | SshLaunch, job.config.launch)
    return {**job.environment, **_ENVIRONMENT, **launch.environment}


def torchrun_script(words: list[str], environment: Mapping[str, str], directory: str) -> str:
    """Return a shell script that runs an agent in the foreground.

    Args:
        words: of the agent.
        environment: variables.
        directory: that it runs in.
    """
    lines = ["#!/bin/sh", *exports(environment), f"cd {shlex.quote(directory)} || exit 2", f"exec {shlex.join(words)}"]
    return "\n".join(lines) + "\n"


def torchrun_problems(job: EngineJob) -> Iterator[ConfigError]:
    """Yield what is wrong with a job for torchrun.

    Args:
        job: what is to run.
    """
    launch = cast(TorchrunLaunch | SshLaunch, job.config.launch)
    least = launch.min_nodes
    if least is not None and not 1 <= least <= job.nodes:
        yield ConfigError("'launch.min_nodes' is out of range", got=least, allowed=f"1 to {job.nodes}, the hosts")
    if job.devices_per_node is None and job.config.hardware.target == "trainium":
        yield ConfigError("torchrun counts GPUs alone", got="hardware.devices=auto", fix="set hardware.devices=64")
    yield from bad_variables("launch.environment", launch.environment)
