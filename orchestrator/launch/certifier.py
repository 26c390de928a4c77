"""Certify devices, in the processes that do it: those of the job, and one for the host's CPU."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.certify.certificate import PASSED, Case
from orchestrator.certify.kinds import KINDS
from orchestrator.distributed.world import World, detect
from orchestrator.errors import UserError
from orchestrator.hardware.target import Target
from orchestrator.launch.worker_processes import leave_error
from orchestrator.output import tell
from orchestrator.sharding.layout import Layout
from orchestrator.training.resolved import Resolved, read_resolved

if TYPE_CHECKING:
    from orchestrator.certify.suite import Findings

DEVICES, HOST = "certify", "certify-host"
"""Kinds of processes, as `launch.worker` knows them."""
BEFORE, AFTER = "before", "after"
"""The parts of the host: what it leaves for the devices, and what it makes of theirs."""
RESULT = "result.json"


def work(
    resolved: Resolved,
    world: World,
    target: Target,
    layouts: Sequence[Layout],
    folder: Path,
    bf16: bool = False,
    wanted: frozenset[str] | None = None,
) -> None:
    """Go through the devices' cases as one process of the job. The first one writes what was found.

    Args:
        resolved: the training, on the first layout.
        world: this process among the job's.
        target: whose devices they are.
        layouts: that are tried.
        folder: that all processes see, with the host's results.
        bf16: try matrix products in bf16, too.
        wanted: names of cases; None: all.

    Raises:
        UserError: the processes do not meet, or one of them is lost.
    """
    from orchestrator.certify.suite import run_suite
    from orchestrator.launch.run import joined
    from orchestrator.runs.shared_folder import check_shared

    def note(case: Case) -> None:
        if world.rank == 0:
            tell(line_of(case))

    with joined(resolved, world, target) as (parallel, _):
        # Named after the time, it may have another name in a process that was started a second later.
        folder = Path(parallel.broadcast(str(folder.absolute())))
        check_shared(folder, parallel)
        findings = run_suite(resolved, parallel, layouts, folder, note, bf16=bf16, wanted=wanted)
    if world.rank == 0:
        _write(folder, findings)


def _write(folder: Path, findings: Findings) -> None:
    def finite(series: dict[str, list[float]]) -> dict[str, list[float | None]]:
        return {name: [value if abs(value) < float("inf") else None for value in each] for name, each in series.items()}

    result = {
        "cases": [asdict(case) for case in findings.cases],
        "losses": finite(findings.losses),
        "norms": finite(findings.norms),
        "saved": {layout: path and str(path.relative_to(folder)) for layout, path in findings.saved.items()},
    }
    (folder / RESULT).write_text(json.dumps(result))


def host_work(resolved: Resolved, part: str, layouts: Sequence[Layout], folder: Path) -> None:
    """Be the host's CPU: write the cases of a part.

    Args:
        resolved: the training.
        part: `BEFORE` or `AFTER` the devices' cases.
        layouts: that are tried.
        folder: that all processes see.
    """
    from orchestrator.certify.host_side import work_after, work_before
    from orchestrator.launch.run import quiet

    quiet(1)  # the devices' processes say what there is to say
    if part == BEFORE:
        cases = [work_before(resolved, folder, [layout.data_parallel for layout in layouts])]
    else:
        saved = json.loads((folder / RESULT).read_text())["saved"]
        cases = work_after(resolved, {layout: folder / path for layout, path in saved.items() if path})
    (folder / f"{part}.json").write_text(json.dumps([asdict(case) for case in cases]))


def line_of(case: Case) -> str:
    """Return a case as one line of a terminal.

    Args:
        case: that is done.
    """
    measured = "" if case.measured is None else f"{case.measured:.1e} of {case.tolerance:.1e}"
    note = f"  {case.note}" if case.note and (case.status != PASSED or case.name == "matrix_products") else ""
    return f"{case.status:<8} {KINDS[case.name].title:<24} {case.layout:<36} {measured}{note}".rstrip()


def certify_worker(kind: str, argv: list[str]) -> int:
    """Be one process of those that `certifying.certify` started.

    Args:
        kind: `DEVICES` or `HOST`.
        argv: of the devices: the folder of the record, the layouts as JSON, and the precision that is tried beside
            fp32; of the host: the folder, the part, and the layouts.

    Returns:
        The exit code.
    """
    folder, world = Path(argv[0]), detect(os.environ) or World()
    try:
        resolved = read_resolved(folder)
        layouts = [Layout(**degrees) for degrees in json.loads(argv[1 if kind == DEVICES else 2])]
        if kind == DEVICES:
            work(resolved, world, resolved.target(), layouts, folder, argv[2] == "bf16")
        else:
            host_work(resolved, argv[1], layouts, folder)
    except UserError as error:
        return leave_error(folder, world.rank, error)
    return 0
