"""What is to run on an engine, as every engine needs it."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.config.schema import RunConfig
from orchestrator.distributed.world import LAUNCHED
from orchestrator.errors import ConfigError
from orchestrator.hardware.target_table import target_of

LAUNCH = "launch"
"""The folder of a run directory that holds what was submitted; the next submission of the run gets `launch-2`."""
_ONE_COMMAND_PER_HOST = ("kubernetes", "skypilot", "ray")  # which starts the host's processes: distributed/job_host.py
_MAX_NAME = 40
_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")


@dataclass(frozen=True)
class EngineJob:
    """A training as an engine starts it: one command line, the same on every host and at every start.

    Attributes:
        name: of the job: letters of a DNS label (lower case, digits, hyphens), at most 40 of them.
        run_id: by which every start finds the run: the command has `resume=auto` and this `run_id`.
        command: the words behind the Python interpreter: `-m orchestrator train ...`.
        config: composed from the same words; what is `auto` in it is decided on the machine.
        nodes: hosts.
        devices_per_node: accelerators of a host, as `hardware.devices` has them; None: all that the host has.
        processes_per_node: processes that the engine starts on a host: one per device, or one per host where a process
            drives all of them (XLA), and where the product starts the others itself, on a single host.
        environment: variables for every process.
        run_dir: of the run, absolute.
        folder: of the run directory, where what was rendered and submitted is kept: `<run>/launch`, absolute.
        sweep: the command of each job of a sweep, for an engine that takes arrays; `command` is that of the first.
    """

    name: str
    run_id: str
    command: tuple[str, ...]
    config: RunConfig
    nodes: int
    devices_per_node: int | None
    processes_per_node: int
    environment: Mapping[str, str]
    run_dir: Path
    folder: Path
    sweep: tuple[tuple[str, ...], ...] = field(default=())


def new_run_id(name: str) -> str:
    """Make an identity for a run: readable, unique, a DNS label.

    Args:
        name: of the run.
    """
    stamp = f"{time.strftime('%m%d-%H%M')}-{secrets.token_hex(2)}"
    return f"{_label(name)[: _MAX_NAME - len(stamp) - 1].rstrip('-')}-{stamp}"


def job_name(run_id: str) -> str:
    """Return a run's identity as the name of a job: itself, where it is a short DNS label, else one that is like it.

    Args:
        run_id: of the run.
    """
    if len(run_id) <= _MAX_NAME and _NAME.fullmatch(run_id):
        return run_id
    digest = hashlib.sha256(run_id.encode()).hexdigest()[:8]
    return f"{_label(run_id)[: _MAX_NAME - len(digest) - 1].rstrip('-')}-{digest}"


def _label(text: str) -> str:
    label = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "run"
    return label if label[0].isalpha() else f"r-{label}"


def engine_job(config: RunConfig, run_id: str, words: Sequence[str]) -> EngineJob:
    """Make the job of a run.

    Args:
        config: composed from `words`.
        run_id: of the run.
        words: of `train`, without `resume` and `run_id`.

    Raises:
        ConfigError: it cannot be said how many processes a host has.
    """
    hardware, launch = config.hardware, config.launch
    if hardware.target == "auto" and launch.name not in _ONE_COMMAND_PER_HOST:
        raise ConfigError(
            "the hardware of another machine cannot be looked up from here",
            got="hardware=auto",
            allowed="cpu, cuda, rocm, tpu, trainium",
            fix="name it: hardware=cuda",
        )
    known = None if hardware.devices == "auto" else hardware.devices
    if known is None and hardware.target == "cpu":
        known = 1
    one_command = launch.name in _ONE_COMMAND_PER_HOST
    target = None if one_command else target_of(hardware)
    if known is None and target is not None and target.strategy != "xla" and launch.nodes > 1:
        raise ConfigError(
            "on several hosts it must be said how many devices each of them has: every one gets a process",
            got=f"hardware.devices=auto with launch.nodes={launch.nodes}",
            fix="set hardware.devices, such as hardware.devices=8",
        )
    # On a single host the product starts the processes itself, and starts them again.
    processes = 1 if launch.nodes == 1 or known is None or target is None else target.processes(known)
    from orchestrator.runs import run_directory  # with NumPy, which --help does without

    run_dir = run_directory.named(config, run_id).absolute()
    return EngineJob(
        name=job_name(run_id),
        run_id=run_id,
        command=inner_command(run_id, words),
        config=config,
        nodes=launch.nodes,
        devices_per_node=known,
        processes_per_node=processes,
        environment={LAUNCHED: launch.name},
        run_dir=run_dir,
        folder=_free_folder(run_dir),
    )


def inner_command(run_id: str, words: Sequence[str]) -> tuple[str, ...]:
    """Return the words behind the interpreter that are right at every start of a run.

    Args:
        run_id: of the run.
        words: of `train`, without `resume` and `run_id`.
    """
    return ("-m", "orchestrator", "train", "resume=auto", f"run_id={run_id}", *words)


def _free_folder(run_dir: Path) -> Path:
    folder, number = run_dir / LAUNCH, 1
    while folder.exists():
        number += 1
        folder = run_dir / f"{LAUNCH}-{number}"
    return folder
