"""What is to run on an engine, as every engine needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config.schema import RunConfig


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
            drives all of them (XLA, or where the product or torchrun starts the others).
        environment: variables for every process.
        folder: of the run directory, where what was rendered and submitted is kept: `<run>/launch`.
    """

    name: str
    run_id: str
    command: tuple[str, ...]
    config: RunConfig
    nodes: int
    devices_per_node: int | None
    processes_per_node: int
    environment: Mapping[str, str]
    folder: Path
