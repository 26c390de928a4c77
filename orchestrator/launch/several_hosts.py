"""Start the processes of one host of a job whose hosts an engine has started. No torch here."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from orchestrator.distributed.job_host import VARIABLES, JobHost
from orchestrator.distributed.local_processes import Ended, run_local
from orchestrator.errors import ConfigError
from orchestrator.hardware.target_table import device_count
from orchestrator.launch.plan import Plan


def processes_here(plan: Plan) -> int:
    """Return the number of processes that drive this host's devices.

    Args:
        plan: the run that the command line means.
    """
    target, hardware = plan.target, plan.config.hardware
    return target.processes(device_count(hardware, target, target.probe()))


def start_processes(host: JobHost, processes: int, words: Sequence[str], sweep: bool) -> Ended:
    """Run this command line once per process, as one process of the job each, and wait for them.

    Every process finds its place by `ORCHESTRATOR_RANK` and the like, resolves the run and joins the others, as one
    that torchrun or srun has started. Its exit code is the host's, which an engine acts on.

    Args:
        host: this one among those of the job.
        processes: of this host.
        words: of `train`.
        sweep: whether the command line is a multirun.

    Raises:
        ConfigError: it is.
    """
    if sweep:
        raise ConfigError(
            "the jobs of a multirun on several hosts are started by their engine, each by itself",
            got=f"-m on host {host.number} of {host.count}",
            fix="python -m orchestrator launch ... -m KEY=A,B",
        )
    worlds = [host.world(rank, processes) for rank in range(processes)]
    # What says which host this is would make each of them start processes, too.
    return run_local(
        [sys.executable, "-m", "orchestrator", "train", *words],
        [dict.fromkeys(VARIABLES, "") for _ in worlds],
        worlds=worlds,
    )
