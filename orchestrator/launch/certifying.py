"""Certify devices: start the processes of one job, which go through all cases, and keep what they find."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.certify.certificate import Case, Certificate, timed, write
from orchestrator.certify.fixture import Choice, choose_layouts, with_layout
from orchestrator.certify.kinds import KINDS
from orchestrator.certify.recorded import recorded
from orchestrator.checkpoint.signing import signer
from orchestrator.config.compose import Composed
from orchestrator.config.schema import HardwareConfig
from orchestrator.distributed.world import World
from orchestrator.errors import ConfigError
from orchestrator.hardware.target import Target
from orchestrator.hardware.target_table import device_count, find_world, get_target, job_devices, resolve
from orchestrator.launch.certifier import AFTER, BEFORE, DEVICES, HOST, RESULT, line_of, work
from orchestrator.launch.worker_processes import run_workers
from orchestrator.output import tell
from orchestrator.report.certificate_page import write_certificate_page
from orchestrator.runs.provenance import software
from orchestrator.sharding.layout import resolve_layout
from orchestrator.training.check import check_run
from orchestrator.training.layout_choice import precision_of
from orchestrator.training.resolved import Resolved, resolve_run, write_resolved

CPU_PROCESSES = 4  # of a CPU, where nobody says how many: as many as most layouts need
WORK = ".work"  # within the output folder, while it lasts
_WHAT = "the certification"


@dataclass(frozen=True)
class Certified:
    """What has become of a certification.

    Attributes:
        certificate: what was found.
        file: that it is kept in.
        page: the same for people.
    """

    certificate: Certificate
    file: Path
    page: Path


@dataclass(frozen=True)
class _Plan:
    resolved: Resolved
    target: Target
    choice: Choice
    bf16: bool
    output: Path

    @property
    def hardware(self) -> HardwareConfig:
        return self.resolved.config.hardware


def certify(composed: Composed, output: Path | None = None) -> Certified | None:
    """Run all cases on the devices of `composed`, and write the certificate.

    Args:
        composed: the small training (`certify.fixture.WORDS`) with the user's hardware and layout.
        output: a folder that is not there yet, or is empty; None: a new one below `certificates`.

    Returns:
        The certificate; None in a process of an engine that is not the first.

    Raises:
        UserError: the devices, the layout, the key or the folder cannot be used, or a process was lost.
    """
    started, config = time.time(), composed.config
    sign = signer(config.checkpoint.signing_key) if config.checkpoint.signing_key else None
    world = find_world(config.hardware, os.environ)
    plan = _plan(composed, world, output)
    if world is None or world.rank == 0:
        _open(plan.output)
        write_resolved(plan.output / WORK, plan.resolved)
        count = len(plan.choice.layouts)
        tell(
            f"certify    {plan.target.name}: {plan.resolved.devices} devices, {count} layout{'s' if count > 1 else ''}"
        )
    try:
        result = _through(plan, world)
    finally:
        if world is None or world.rank == 0:
            shutil.rmtree(plan.output / WORK, ignore_errors=True)
    if result is None:
        return None
    certificate = timed(_certificate(plan, result), started)
    file, page = write(plan.output, certificate, sign), plan.output / "certificate.html"
    write_certificate_page(page, certificate.to_dict(), {name: asdict(kind) for name, kind in KINDS.items()})
    return Certified(certificate, file, page)


def _plan(composed: Composed, world: World | None, output: Path | None) -> _Plan:
    config, given = composed.config, any(key.partition(".")[0] == "layout" for key in composed.overrides)
    target, hardware = resolve(config.hardware), config.hardware
    if target.name == "cpu" and hardware.devices == "auto" and world is None:
        # A CPU is one device to a run, and may be as many processes as one likes.
        hardware = replace(hardware, target="cpu", devices=CPU_PROCESSES)
    bf16 = precision_of(config, target) != "fp32"
    config = replace(config, hardware=replace(hardware, precision="fp32"))
    slices, devices = target.slices(), _devices(hardware, target, world)
    if given:
        check_run(config, devices, slices=slices)
        choice = Choice((resolve_layout(config.layout, devices),))
    else:
        choice = choose_layouts(config, devices, slices)
    if not choice.layouts:
        raise ConfigError(
            "no layout of the small model fits so many devices",
            got=f"{devices} devices: {'; '.join(choice.left_out)}"[:600],
            fix="set hardware.devices to fewer of them, such as those of one host",
        )
    config = with_layout(config, choice.layouts[0])
    vocabulary = config.model.vocab_size
    assert isinstance(vocabulary, int), "the small model has one"
    here = devices if world is None else max(1, devices // world.size) * world.local_size
    resolved = resolve_run(config, target, devices, vocabulary, here=here)
    return _Plan(resolved, target, choice, bf16, output or _new_folder(target.name))


def _devices(hardware: HardwareConfig, target: Target, world: World | None) -> int:
    return device_count(hardware, target, target.probe()) if world is None else job_devices(hardware, target, world)


def _new_folder(name: str) -> Path:
    return Path("certificates") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _open(folder: Path) -> None:
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError("there is something in the folder of the certificate", got=folder, fix="name another one")
        (folder / WORK).mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"the folder cannot be made: {error.strerror}", got=folder, fix="set output=DIR") from None


def _through(plan: _Plan, world: World | None) -> dict[str, Any] | None:
    """Run all cases. Returns what was found; None in a process of an engine that is not the first."""
    main, folder = world is None or world.rank == 0, plan.output / WORK
    cases = _on_host(plan, BEFORE) if main else []
    if world is None:
        _in_processes(plan)
    else:
        for key, value in plan.target.environment(plan.hardware, world.local_rank, world.local_size).items():
            os.environ.setdefault(key, value)
        work(plan.resolved, world, plan.target, plan.choice.layouts, folder, plan.bf16)
    if not main:
        return None
    found: dict[str, Any] = json.loads((folder / RESULT).read_text())
    return {**found, "cases": [*cases, *found["cases"], *_on_host(plan, AFTER)]}


def _on_host(plan: _Plan, part: str) -> list[dict[str, Any]]:
    """Run the host's part in a process of its own: torch's autograd, once used, takes no further kind of device."""
    folder = plan.output / WORK
    environment = get_target("cpu").environment(plan.hardware, 0, 1)
    run_workers([HOST, str(folder), part, _degrees(plan)], [environment], folder, _WHAT)
    found: list[dict[str, Any]] = json.loads((folder / f"{part}.json").read_text())
    for case in found:
        tell(line_of(Case(**case)))
    return found


def _in_processes(plan: _Plan) -> None:
    """Run the devices' part in processes of this machine."""
    folder, processes = plan.output / WORK, plan.target.processes(plan.resolved.devices)
    environments = [plan.target.environment(plan.hardware, rank, processes) for rank in range(processes)]
    precision = "bf16" if plan.bf16 else "fp32"
    run_workers([DEVICES, str(folder), _degrees(plan), precision], environments, folder, _WHAT)


def _degrees(plan: _Plan) -> str:
    return json.dumps([layout.as_dict() for layout in plan.choice.layouts])


def _certificate(plan: _Plan, result: dict[str, Any]) -> Certificate:
    device = plan.target.describe()
    runtime = device.pop("runtime")
    simulate = plan.resolved.config.hardware.simulate
    return Certificate(
        made_at=0.0,
        seconds=0.0,
        device={**device, "devices": plan.resolved.devices, "simulated": simulate is not None},
        runtime=runtime,
        software=software(),
        precision=plan.resolved.precision,
        reference=recorded().digest,
        layouts=tuple(map(str, plan.choice.layouts)),
        left_out=plan.choice.left_out,
        cases=tuple(Case(**case) for case in result["cases"]),
        losses=result["losses"],
        norms=result["norms"],
    )
