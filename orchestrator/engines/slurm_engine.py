"""Slurm: a batch script with `srun`, that starts itself again. Driven by sbatch, squeue, scontrol and scancel."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from orchestrator.config.launch_schema import SlurmLaunch
from orchestrator.engines.client import call_client
from orchestrator.engines.engine import Engine, EngineStatus, Rendered, State
from orchestrator.engines.engine_job import EngineJob
from orchestrator.engines.slurm_rules import slurm_problems
from orchestrator.engines.slurm_script import CANCELLED, LINES, SCRIPT, slurm_script
from orchestrator.engines.submission import Submission
from orchestrator.errors import LaunchError, UserError, shown

_INSTALL = "log in to a node of the cluster that has Slurm's commands"
_STATES: Mapping[str, State] = {
    **dict.fromkeys(("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING"), "waiting"),
    **dict.fromkeys(("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"), "running"),
    "COMPLETED": "finished",
    **dict.fromkeys(
        ("FAILED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED"), "failed"
    ),
    **dict.fromkeys(("CANCELLED", "REVOKED"), "cancelled"),
}
# The state of a job of several is the first of these that one of its tasks has.
_FIRST: tuple[State, ...] = ("running", "waiting", "failed", "cancelled", "unknown", "finished")
_POLL_SECONDS = 1.0
_ENDED: tuple[State, ...] = ("finished", "failed", "cancelled", "unknown")


class SlurmEngine(Engine):
    """Jobs of Slurm, on GPU, Trainium and CPU nodes."""

    name = "slurm"
    state = "ran on a Slurm 22.05 cluster of two CPU nodes: lost node, time limit, requeue, arrays; never on GPU nodes"
    clients: ClassVar[tuple[str, ...]] = ("sbatch", "squeue", "scontrol", "scancel")
    takes_sweeps = True

    def render(self, job: EngineJob) -> Rendered:
        """See `Engine`."""
        return Rendered({SCRIPT: slurm_script(job)}, ("sbatch", "--parsable", str(job.folder / SCRIPT)))

    def problems(self, job: EngineJob, rendered: Rendered) -> Sequence[UserError]:
        """See `Engine`."""
        return slurm_problems(job, rendered)

    def submit(self, job: EngineJob, rendered: Rendered) -> str:
        """See `Engine`."""
        said = call_client(rendered.submit, _INSTALL).strip()
        match = re.fullmatch(r"(\d+)(?:;\S+)?", said.splitlines()[-1] if said else "")
        if match is None:
            raise LaunchError("sbatch has answered with no number of a job", got=shown(said))
        return match[1]

    def status(self, submitted: Submission) -> EngineStatus:
        """See `Engine`."""
        rows = _tasks(submitted.id)
        if not rows:
            return EngineStatus("unknown", "Slurm keeps no record of it any more; run.json of the run has its status")
        states = [_STATES.get(row["JobState"].split(",")[0], "unknown") for row in rows]
        state = next(one for one in _FIRST if one in states)
        if state == "failed" and (submitted.folder / CANCELLED).exists():
            state = "cancelled"  # a run that has saved on request ends with 143
        said = [row["JobState"] + _why(row) for row in rows]
        hosts = [row["NodeList"] for row in rows if row.get("NodeList", "(null)") not in ("(null)", "")]
        return EngineStatus(state, ", ".join(dict.fromkeys(said)), tuple(dict.fromkeys(hosts)))

    def lines(self, submitted: Submission, follow: bool) -> Iterator[str]:
        """See `Engine`."""
        read: dict[str, int] = {}
        while True:
            state = self.status(submitted).state if follow else "finished"
            for path in sorted(submitted.folder.glob(LINES)):
                with path.open("rb") as file:
                    file.seek(read.get(path.name, 0))
                    content = file.read()
                whole = content if state in _ENDED else content[: content.rfind(b"\n") + 1]
                read[path.name] = read.get(path.name, 0) + len(whole)
                yield from whole.decode(errors="replace").splitlines()
            if state in _ENDED:
                return
            time.sleep(_POLL_SECONDS)

    def cancel(self, submitted: Submission) -> None:
        """See `Engine`."""
        options = SlurmLaunch(signal_seconds=int(submitted.options.get("signal_seconds", 120)))
        # The batch script looks for it, and does not start again.
        (submitted.folder / CANCELLED).touch()
        grace = max(options.signal_seconds, 1)
        call_client(["scancel", "--state=PENDING", submitted.id], _INSTALL)
        call_client(["scancel", "--signal=TERM", submitted.id], _INSTALL)
        deadline = time.monotonic() + grace
        while self.status(submitted).state not in _ENDED:
            if time.monotonic() > deadline:
                call_client(["scancel", submitted.id], _INSTALL)
                return
            time.sleep(_POLL_SECONDS)


def _why(row: Mapping[str, str]) -> str:
    reason = row.get("Reason", "None")
    return f": {reason}" if reason not in ("None", "(null)", "") else ""


def _tasks(job_id: str) -> list[dict[str, str]]:
    """Return what Slurm knows of a job, or of each task of an array: by scontrol, later by sacct where that is."""
    try:
        said = call_client(["scontrol", "show", "job", "--oneliner", job_id], _INSTALL)
    except LaunchError as error:
        if "Invalid job id" not in error.what:
            raise
        return _accounted(job_id)
    return [dict(re.findall(r"(\w+)=(\S+)", line)) for line in said.splitlines() if "JobState=" in line]


def _accounted(job_id: str) -> list[dict[str, str]]:
    if shutil.which("sacct") is None:
        return []
    try:
        words = ["sacct", "--allocations", "--noheader", "--parsable2", "--format=State,NodeList", "--jobs", job_id]
        said = call_client(words, _INSTALL)
    except LaunchError:
        return []  # accounting is off
    rows = [line.partition("|") for line in said.splitlines() if line]
    return [{"JobState": state.split(" ")[0], "NodeList": nodes} for state, _, nodes in rows]
