"""The driver of a job on Ray: one worker per host, each of which runs the product's command in a process of its own.

    python -m orchestrator.engines.ray_driver '{"hosts": 2, ...}'

It runs on the cluster, in Ray's environment. Training happens outside of Ray's worker: signals reach the main thread of
a process alone, and Ray would own torch's process group.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from orchestrator.distributed.job_host import HOST, HOSTS, STORE
from orchestrator.errors import DIVERGED, FAILED, MISTAKE

_PR_SET_PDEATHSIG = 1


class _ExitCodes:
    """The exit codes of the hosts, kept where they outlive a worker. An actor."""

    def __init__(self) -> None:
        self._codes: list[int] = []

    def add(self, code: int) -> None:
        self._codes.append(code)

    def all(self) -> list[int]:
        return self._codes


def main(text: str) -> int:
    """Run the job. Returns its exit code.

    Args:
        text: JSON of what `ray_engine` has rendered.
    """
    job = json.loads(text)
    ray.init()
    codes = ray.remote(_ExitCodes).options(num_cpus=0).remote()
    trainer = DataParallelTrainer(
        _host,
        train_loop_config={"job": job, "codes": codes},
        scaling_config=ScalingConfig(
            num_workers=job["hosts"],
            resources_per_worker=job["resources"],
            placement_strategy="STRICT_SPREAD" if job["spread"] else "PACK",
        ),
        run_config=RunConfig(
            name=job["name"],
            storage_path=job["storage"],
            failure_config=FailureConfig(max_failures=job["max_restarts"]),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        found = ray.get(codes.all.remote())
        final = [code for code in found if code in (MISTAKE, DIVERGED)]
        print(f"error: the job has failed on Ray: {str(error).strip()[-500:]}", file=sys.stderr)
        return int(final[-1]) if final else FAILED
    return 0


def _host(config: Mapping[str, Any]) -> None:
    """Run the command of one host to its end."""
    job, context = config["job"], get_context()
    # A port of the first host, chosen anew at every start.
    store = broadcast_from_rank_zero(f"tcp:{ray.util.get_node_ip_address()}:{_free_port()}")
    place = {HOST: str(context.get_world_rank()), HOSTS: str(context.get_world_size()), STORE: store}
    process = subprocess.Popen(
        [job["python"], *job["command"]],
        cwd=job["folder"],
        env={**os.environ, **job["environment"], **place},
        preexec_fn=_end_with_this_thread,
    )
    try:
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
    if code:
        ray.get(config["codes"].add.remote(code))
        raise RuntimeError(f"host {place[HOST]} of {place[HOSTS]} has ended with exit code {code}")


def _end_with_this_thread() -> None:
    """Let the kernel ask the process to save and stop when Ray kills the worker that waits for it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
