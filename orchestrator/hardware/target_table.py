"""The table of hardware targets, and the choice among them."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from orchestrator.chips.load import load_catalogue
from orchestrator.config.schema import HardwareConfig
from orchestrator.distributed.world import World, detect
from orchestrator.errors import HardwareError
from orchestrator.hardware import host
from orchestrator.hardware.target import Probe, Target

TARGETS: dict[str, str] = {
    "cuda": "orchestrator.hardware.cuda:CudaTarget",
    "rocm": "orchestrator.hardware.rocm:RocmTarget",
    "tpu": "orchestrator.hardware.tpu:TpuTarget",
    "trainium": "orchestrator.hardware.trainium:TrainiumTarget",
    "cpu": "orchestrator.hardware.cpu:CpuTarget",
}
"""Name → module:class, in the order in which `hardware.target=auto` prefers them."""

RUNTIMES: dict[tuple[str, str], str] = {
    ("tpu", "torch_tpu"): "orchestrator.hardware.torch_tpu:TorchTpuTarget",
    ("trainium", "torch_xla"): "orchestrator.hardware.trainium_xla:TrainiumXlaTarget",
}
"""(Name, `hardware.runtime`) → module:class, where a target can be driven in another way than by `TARGETS`."""

MAX_CPU_PROCESSES = 64
MAX_CPU_PROCESSES_PER_CORE = 8

_log = logging.getLogger(__name__)


def get_target(name: str, runtime: str = "auto", *, rehearses: bool = False) -> Target:
    """Return the target of that name, not probed yet.

    Args:
        name: a key of `TARGETS`.
        runtime: `hardware.runtime`.
        rehearses: whether `hardware.simulate` is set: what is rehearsed does not depend on what is installed here.

    Raises:
        HardwareError: there is none of that name.
    """
    if name not in TARGETS:
        raise HardwareError("there is no such hardware target", got=name, allowed=", ".join(("auto", *sorted(TARGETS))))
    if name == "tpu" and runtime == "auto" and not rehearses and _class(RUNTIMES[name, "torch_tpu"]).is_usual():
        runtime = "torch_tpu"
    target: Target = _class(RUNTIMES.get((name, runtime), TARGETS[name]))()
    return target


def _class(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def target_of(config: HardwareConfig) -> Target:
    """Return the target that `config` names, configured and not probed yet.

    Args:
        config: the `hardware` group of a run, whose target is not `auto`.

    Raises:
        HardwareError: there is none of that name.
    """
    target = get_target(config.target, config.runtime, rehearses=config.simulate is not None)
    target.use(config)
    return target


def runtimes(name: str) -> list[str]:
    """Return the values of `hardware.runtime` that a target knows.

    Args:
        name: a key of `TARGETS`.
    """
    found = {_class(TARGETS[name]).runtime, *(runtime for owner, runtime in RUNTIMES if owner == name)}
    return sorted(found)


def probe_all() -> dict[str, Probe]:
    """Look for every target, in the order of `TARGETS`. Never raises and imports no torch."""
    return {name: get_target(name).probe() for name in TARGETS}


def resolve(config: HardwareConfig) -> Target:
    """Return the target that a run uses, probed and found usable.

    `auto` takes the first usable one of `TARGETS`. Devices that are here but cannot be used are warned about:
    a run on the CPU of a machine with accelerators is hardly ever meant.

    Args:
        config: the `hardware` group of a run.

    Raises:
        HardwareError: the wanted target is not usable here, or has fewer devices than `config.devices`.
        ConfigError: `config.chip` is not in the catalogue.
    """
    if config.chip != "auto":
        load_catalogue().get(config.chip)
    if config.target == "auto":
        target = _first_usable()
    else:
        target = target_of(config)
        _check_rehearsal(config, target)
        if not target.probe().available:
            raise _unusable(target)
    device_count(config, target, target.probe())
    return target


def _check_rehearsal(config: HardwareConfig, target: Target) -> None:
    """Raise where there is nothing to rehearse, or not so many processes."""
    if config.simulate is None:
        return
    if not target.simulates:
        raise HardwareError(
            "hardware.simulate rehearses a TPU or Trainium job on this CPU",
            got=f"hardware.simulate={config.simulate} with hardware.target={target.name}",
            allowed="hardware=tpu or hardware=trainium",
            fix=f"leave it out; several processes on {target.name} are hardware.devices=...",
        )
    if target.simulates == "processes":
        _cpu_processes(config.simulate, "hardware.simulate")
        target.placement({})  # names the instance
    elif config.instance is not None:
        raise HardwareError(
            "hardware.instance is the machine of a rehearsal in processes; torch_xla's virtual devices have none",
            got=f"hardware.instance={config.instance} with hardware.runtime={target.runtime}",
            fix="leave it out, or set hardware.runtime=" + ("torch_tpu" if target.name == "tpu" else "torchneuron"),
        )


def device_count(config: HardwareConfig, target: Target, probe: Probe) -> int:
    """Return the number of devices on this host that a run uses: `auto` is 1 on a CPU, else all.

    Args:
        config: the `hardware` group of a run.
        target: the hardware.
        probe: of this machine.

    Raises:
        HardwareError: more are asked for than there are or than makes sense.
    """
    if config.devices == "auto":
        return 1 if target.name == "cpu" else probe.devices
    if config.devices < 1:
        raise HardwareError("hardware.devices must be at least 1", got=config.devices, allowed="auto, or 1 and more")
    if target.name == "cpu":
        return _cpu_processes(config.devices)
    if config.devices > probe.devices:
        raise HardwareError(
            f"hardware.devices asks for more {target.name} devices than this host has",
            got=config.devices,
            allowed=f"1 to {probe.devices}",
            fix=f"set hardware.devices={probe.devices}; more hosts are the launcher's part (launch)",
        )
    return config.devices


def job_devices(config: HardwareConfig, target: Target, world: World) -> int:
    """Return the number of devices of the whole job: those of this host's process, on as many as were started.

    Args:
        config: the `hardware` group of a run.
        target: the hardware.
        world: this process among the job's.

    Raises:
        HardwareError: one process drives all devices of a host, and a host has several processes; or the devices are
            virtual ones, which belong to a single process.
    """
    if target.strategy != "xla":
        if config.simulate not in (None, world.size) and world.engine:
            raise HardwareError(
                "a rehearsal has as many processes as devices",
                got=f"hardware.simulate={config.simulate} in {world.size} processes, started by {world.engine}",
                fix=f"hardware.simulate={world.size}, or start the command without {world.engine}",
            )
        return world.size
    if config.simulate is not None and world.size > 1:
        raise HardwareError(
            "virtual devices belong to one process: several hosts cannot be rehearsed",
            got=f"hardware.simulate={config.simulate} in {world.size} processes, started by {world.engine}",
            allowed="one process, with as many virtual devices as all hosts have",
            fix=f"without {world.engine}: hardware.simulate={config.simulate * world.size}",
        )
    if world.local_size > 1:
        raise HardwareError(
            f"on {target.name} one process drives all devices of a host",
            got=f"{world.local_size} processes on this host, started by {world.engine}",
            allowed="one process per host",
            fix="torchrun --nproc-per-node=1, or srun --ntasks-per-node=1",
        )
    return world.size * device_count(config, target, target.probe())


def check_started(config: HardwareConfig, target: Target, world: World) -> None:
    """Check that an engine has started as many processes on this host as `hardware.devices` asks for.

    Args:
        config: the `hardware` group of a run.
        target: the hardware.
        world: this process among the job's.

    Raises:
        HardwareError: it has not.
    """
    per_device = target.strategy != "xla" and config.simulate is None
    if per_device and config.devices not in ("auto", world.local_size):
        raise HardwareError(
            f"on {target.name} each process drives one device, and another number of processes was started",
            got=f"hardware.devices={config.devices}; processes on this host: {world.local_size}, by {world.engine}",
            allowed=f"hardware.devices=auto or {world.local_size}",
            fix=f"leave hardware.devices out, or have {world.engine} start {config.devices} on each host",
        )


def find_world(config: HardwareConfig, environ: Mapping[str, str]) -> World | None:
    """Find this process among the job's: as its launcher says, else as the machine does; None for a single host.

    Args:
        config: the `hardware` group of a run.
        environ: environment variables of this process.

    Raises:
        HardwareError: what they say is incomplete or contradicts itself.
    """
    world = detect(environ)
    if world is not None:
        return world
    for name in TARGETS if config.target == "auto" else (config.target,):
        target = target_of(replace(config, target=cast(Any, name)))
        world = target.world()
        # `auto` passes over devices that are here and cannot be used.
        if world is not None and (config.target != "auto" or target.probe().available):
            return world
    return None


def _cpu_processes(wanted: int, key: str = "hardware.devices") -> int:
    cores = host.logical_cores()
    limit = min(MAX_CPU_PROCESSES, MAX_CPU_PROCESSES_PER_CORE * cores)
    if wanted > limit:
        raise HardwareError(
            f"{key} asks for more CPU processes than this host can carry",
            got=wanted,
            allowed=f"1 to {limit}: at most {MAX_CPU_PROCESSES_PER_CORE} per core × {cores} cores = "
            f"{MAX_CPU_PROCESSES_PER_CORE * cores}, and at most {MAX_CPU_PROCESSES}",
            fix=f"set {key} to {limit} or less; {cores} keeps one process per core",
        )
    return wanted


def _first_usable() -> Target:
    for name in TARGETS:
        target = get_target(name)
        probe = target.probe()
        if probe.available:
            return target
        if probe.devices:
            what = "; ".join(problem.what for problem in probe.problems)
            _log.warning(
                "%d %s device(s) found but not usable: %s (see: orchestrator doctor)", probe.devices, name, what
            )
    raise _unusable(get_target("cpu"))


def _label(target: Target) -> str:
    several = any(name == target.name for name, _ in RUNTIMES)
    return target.name + (f" and hardware.runtime={target.runtime}" if several else "")


def _unusable(target: Target) -> HardwareError:
    problems = target.probe().problems
    usable = [name for name in TARGETS if name != target.name and get_target(name).probe().available]
    numbered = len(problems) > 1

    def lines(texts: list[str]) -> str:
        marked = [f"({index}) {text}" if numbered else text for index, text in enumerate(texts, 1)]
        return "\n           ".join(marked)

    return HardwareError(
        f"hardware.target={_label(target)} cannot be used on this machine",
        got=lines([problem.what for problem in problems]),
        allowed=f"usable here: {', '.join(usable) or 'nothing'}",
        fix=lines([problem.fix for problem in problems]),
    )
