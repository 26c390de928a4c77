"""The identity of a run: a uuid that travels with it, and the name by which a restarted job finds it. No torch."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.atomic_files import write_atomically
from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigError

IDENTITY = ".run-id"  # file of the run directory that holds the uuid
OWN_VARIABLE = "ORCHESTRATOR_RUN_ID"
_UUID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class _Engine:
    """How an engine names a job: the same name when it starts the job again, and another one for every other job."""

    prefix: str
    variable: str
    scope: str = ""  # variable that tells jobs of equal number on different clusters apart
    unset: tuple[str, ...] = ("",)  # values that name no job


# The outermost engine first: a SkyPilot task may run torchrun inside of Slurm.
_ENGINES = (
    _Engine("sky", "SKYPILOT_TASK_ID"),
    _Engine("slurm", "SLURM_JOB_ID", scope="SLURM_CLUSTER_NAME"),
    _Engine("sagemaker", "TRAINING_JOB_NAME"),
    _Engine("batch", "AWS_BATCH_JOB_ID"),
    _Engine("vertex", "CLOUD_ML_JOB_ID"),
    _Engine("ray", "RAY_JOB_ID"),
    _Engine("torchrun", "TORCHELASTIC_RUN_ID", unset=("", "none")),
)


def job_of(environ: Mapping[str, str]) -> str | None:
    """Return the name that the engine gives this job, the same at each of its restarts; None where none names one.

    Args:
        environ: the environment of the process. `ORCHESTRATOR_RUN_ID` comes before every engine's own variable.
    """
    if own := environ.get(OWN_VARIABLE):
        return own
    for engine in _ENGINES:
        value = environ.get(engine.variable, "")
        if value not in engine.unset:
            parts = (engine.prefix, environ.get(engine.scope, "") if engine.scope else "", value)
            return re.sub(r"[^A-Za-z0-9._-]", "_", "-".join(part for part in parts if part))[:100]
    return None


def name_of(config: RunConfig, sweep_job: int | None = None, environ: Mapping[str, str] = os.environ) -> str:
    """Return the name by which `resume=auto` finds the run: `run_id`, or else the engine's name of the job.

    Args:
        config: the configuration.
        sweep_job: number of the job of a multirun, whose runs share all that names them; None for a single run.
        environ: environment variables of this process.

    Raises:
        ConfigError: there is neither.
    """
    name = config.run_id or job_of(environ)
    if name is None:
        variables = ", ".join(engine.variable for engine in _ENGINES)
        raise ConfigError(
            "resume=auto needs to know which run this is: no engine has given the job a name",
            got="run_id=null",
            allowed=f"run_id, or one of the variables {OWN_VARIABLE}, {variables}",
            fix="give the run a name of its own, the same at every start: run_id=NAME",
        )
    return name if sweep_job is None else f"{name}-{sweep_job}"


def uuid_of(run_dir: Path) -> str:
    """Return the run's uuid (32 hexadecimal digits), made at the first call. The caller holds the run directory.

    Args:
        run_dir: the run's directory.
    """
    path = run_dir / IDENTITY
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        text = ""
    if not text:
        text = uuid.uuid4().hex
        adopt_uuid(run_dir, text)
    return text


def adopt_uuid(run_dir: Path, value: str) -> None:
    """Make the run directory that of the run `value`: one that began in another place.

    Args:
        run_dir: the run's directory.
        value: the uuid.
    """
    write_atomically(run_dir / IDENTITY, value)


def is_uuid(value: object) -> bool:
    """Return whether `value`, of an untrusted file, has the form of a run's uuid."""
    return isinstance(value, str) and _UUID.fullmatch(value) is not None
