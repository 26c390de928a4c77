"""Certify devices: start the processes of one job, which go through all cases, and keep what they find."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import stopping
from orchestrator.certify.certificate import PASSED, Case, Certificate, timed, write
from orchestrator.certify.fixture import Choice, choose_layouts, with_layout
from orchestrator.certify.kinds import KINDS
from orchestrator.certify.recorded import recorded
from orchestrator.checkpoint.signing import signer
from orchestrator.config.compose import Composed
from orchestrator.distributed.local_processes import run_local
from orchestrator.distributed.world import World, detect
from orchestrator.errors import MISTAKE, ConfigError, RunFailedError, UserError, error_from_dict, error_to_dict
from orchestrator.hardware.target import Target
from orchestrator.hardware.target_table import device_count, find_world, job_devices, resolve
from orchestrator.output import tell
from orchestrator.report.certificate_page import write_certificate_page
from orchestrator.runs.provenance import software
from orchestrator.sharding.layout import Layout, resolve_layout
from orchestrator.training.check import check_run
from orchestrator.training.layout_choice import precision_of
from orchestrator.training.resolved import Resolved, read_resolved, resolve_run, write_resolved

if TYPE_CHECKING:
    from orchestrator.certify.suite import Findings

CPU_PROCESSES = 4  # of a CPU, where nobody says how many: as many as most layouts need
_WORK, _RESULT, _ERROR = ".work", "result.json", "error.json"


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
        count = len(plan.choice.layouts)
        tell(
            f"certify    {plan.target.name}: {plan.resolved.devices} devices, {count} layout{'s' if count > 1 else ''}"
        )
    try:
        if world is None:
            result = _in_processes(plan)
        else:
            for key, value in plan.target.environment(config.hardware, world.local_rank, world.local_size).items():
                os.environ.setdefault(key, value)
            found = work(plan.resolved, world, plan.target, plan.choice.layouts, plan.output / _WORK, plan.bf16)
            if found is None:
                return None
            result = found
    finally:
        if world is None or world.rank == 0:
            shutil.rmtree(plan.output / _WORK, ignore_errors=True)
    certificate = timed(_certificate(plan, result), started)
    file, page = write(plan.output, certificate, sign), plan.output / "certificate.html"
    write_certificate_page(page, certificate.to_dict(), {name: asdict(kind) for name, kind in KINDS.items()})
    return Certified(certificate, file, page)


def _plan(composed: Composed, world: World | None, output: Path | None) -> _Plan:
    config, given = composed.config, any(key.partition(".")[0] == "layout" for key in composed.overrides)
    if config.hardware.target in ("auto", "cpu") and config.hardware.devices == "auto":
        # Decided before the target is asked: it has one device, and may have as many processes as one likes.
        target = resolve(config.hardware)
        if target.name == "cpu" and world is None:
            config = replace(config, hardware=replace(config.hardware, target="cpu", devices=CPU_PROCESSES))
    target, hardware = resolve(config.hardware), config.hardware
    bf16 = precision_of(config, target) == "bf16"
    config = replace(config, hardware=replace(hardware, precision="fp32"))
    slices, here = target.slices(), device_count(hardware, target, target.probe())
    devices = here if world is None else job_devices(hardware, target, world)
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
    resolved = resolve_run(config, target, devices, vocabulary, here=here)
    return _Plan(resolved, target, choice, bf16, output or _new_folder(target.name))


def _new_folder(name: str) -> Path:
    return Path("certificates") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _open(folder: Path) -> None:
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError("there is something in the folder of the certificate", got=folder, fix="name another one")
        (folder / _WORK).mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"the folder cannot be made: {error.strerror}", got=folder, fix="set output=DIR") from None


def _in_processes(plan: _Plan) -> dict[str, Any]:
    """Run the cases in processes of this machine."""
    work_folder, processes = plan.output / _WORK, plan.target.processes(plan.resolved.devices)
    write_resolved(work_folder, plan.resolved)
    layouts = json.dumps([layout.as_dict() for layout in plan.choice.layouts])
    command = [sys.executable, "-m", "orchestrator.launch.worker", "certify", str(work_folder), layouts]
    hardware = plan.resolved.config.hardware
    environments = [plan.target.environment(hardware, rank, processes) for rank in range(processes)]
    ended = run_local([*command, "bf16" if plan.bf16 else "fp32"], environments)
    stopping.check()
    if ended.code == MISTAKE and (work_folder / _ERROR).exists():
        raise error_from_dict(json.loads((work_folder / _ERROR).read_text()))
    if ended.code:
        got = "; ".join(ended.problems) or f"exit code {ended.code}"
        raise RunFailedError("the certification was ended before it had a result", got=got, fix="see above")
    result: dict[str, Any] = json.loads((work_folder / _RESULT).read_text())
    return result


def work(
    resolved: Resolved,
    world: World,
    target: Target,
    layouts: Sequence[Layout],
    folder: Path,
    bf16: bool = False,
    wanted: frozenset[str] | None = None,
) -> dict[str, Any] | None:
    """Go through the cases as one process of the job.

    Args:
        resolved: the training, on the first layout.
        world: this process among the job's.
        target: whose devices they are.
        layouts: that are tried.
        folder: that all processes see.
        bf16: try matrix products in bf16, too.
        wanted: names of cases; None: all.

    Returns:
        What was found, as JSON has it; None in all processes but the first.

    Raises:
        UserError: the processes do not meet, or one of them is lost.
    """
    from orchestrator.certify.host_side import work_after, work_before
    from orchestrator.certify.suite import run_suite
    from orchestrator.launch.run import joined, quiet
    from orchestrator.runs.shared_folder import check_shared

    quiet(world.rank)
    cases: list[Case] = []

    def note(case: Case) -> None:
        cases.append(case)
        if world.rank == 0:
            tell(line_of(case))

    everything = wanted is None
    if world.rank == 0:
        case = work_before(resolved, folder, [layout.data_parallel for layout in layouts])
        if everything:
            note(case)
    with joined(resolved, world, target) as (parallel, _):
        check_shared(folder, parallel)
        findings = run_suite(resolved, parallel, layouts, folder, note, bf16=bf16, wanted=wanted)
    if world.rank:
        return None
    if wanted is None or "handover_out" in wanted:
        for case in work_after(resolved, findings.saved):
            note(case)
    return _result(cases, findings)


def line_of(case: Case) -> str:
    """Return a case as one line of a terminal.

    Args:
        case: that is done.
    """
    measured = "" if case.measured is None else f"{case.measured:.1e} of {case.tolerance:.1e}"
    note = f"  {case.note}" if case.note and (case.status != PASSED or case.name == "matrix_products") else ""
    return f"{case.status:<8} {KINDS[case.name].title:<24} {case.layout:<36} {measured}{note}".rstrip()


def _result(cases: Sequence[Case], findings: Findings) -> dict[str, Any]:
    def finite(series: dict[str, list[float]]) -> dict[str, list[float | None]]:
        return {name: [value if abs(value) < float("inf") else None for value in each] for name, each in series.items()}

    return {
        "cases": [asdict(case) for case in cases],
        "losses": finite(findings.losses),
        "norms": finite(findings.norms),
    }


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


def certify_worker(argv: list[str]) -> int:
    """Be one process of those that `certify` started: `FOLDER LAYOUTS PRECISION`.

    Args:
        argv: the folder of the record, the layouts as JSON, and the precision that is tried beside fp32.
    """
    folder, world = Path(argv[0]), detect(os.environ) or World()
    try:
        resolved = read_resolved(folder)
        layouts = [Layout(**degrees) for degrees in json.loads(argv[1])]
        result = work(resolved, world, resolved.target(), layouts, folder, argv[2] == "bf16")
    except UserError as error:
        # All ranks meet the same problem; one says so.
        if world.rank == 0:
            (folder / _ERROR).write_text(json.dumps(error_to_dict(error)))
        return error.exit_code
    if result is not None:
        (folder / _RESULT).write_text(json.dumps(result))
    return 0
