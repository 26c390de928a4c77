"""Ray: a job whose driver starts one worker per host. Driven by `ray job`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

from orchestrator.config.launch_schema import RayLaunch
from orchestrator.engines.client import call_client, client_lines
from orchestrator.engines.engine import Engine, EngineStatus, Rendered, State
from orchestrator.engines.engine_job import EngineJob
from orchestrator.engines.submission import Submission
from orchestrator.errors import ConfigError, ConfigErrors, LaunchError, UserError, shown

SPEC = "job.json"
_INSTALL = "install ray[default] of the cluster's version, put its ray on the PATH, and set launch.address"
_DRIVER = "orchestrator.engines.ray_driver"
_RESOURCES = {"cuda": "GPU", "rocm": "GPU", "trainium": "neuron_cores"}
_STATES: Mapping[str, State] = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "SUCCEEDED": "finished",
    "FAILED": "failed",
    "STOPPED": "cancelled",
}
_KEYS = {
    **dict.fromkeys(("name", "python", "storage"), str),
    **dict.fromkeys(("hosts", "max_restarts"), int),
    **dict.fromkeys(("resources", "environment"), dict),
    "command": list,
    "spread": bool,
}


class RayEngine(Engine):
    """Jobs on a Ray cluster."""

    name = "ray"
    state = "ran on a local Ray 2.60 of CPUs with two workers; never on a cluster"
    clients: ClassVar[tuple[str, ...]] = ("ray",)

    def render(self, job: EngineJob) -> Rendered:
        """See `Engine`."""
        launch = cast(RayLaunch, job.config.launch)
        resources, problems = _resources(job, launch)
        remote = "://" in job.config.checkpoint.dir
        if not remote and not os.path.isabs(job.config.runs_dir):
            problems.append(
                ConfigError(
                    "Ray runs a job in a folder of its own on every host, which goes with it",
                    got=f"runs_dir={job.config.runs_dir} with checkpoint.dir={job.config.checkpoint.dir}",
                    fix="runs_dir=/PLACE/THAT/ALL/HOSTS/SEE, or checkpoint.dir=s3://BUCKET/runs",
                )
            )
        if problems:
            raise ConfigErrors(problems)
        spec = {
            "name": job.name,
            "python": launch.python,
            "command": list(job.command),
            "folder": None,
            "hosts": job.nodes,
            "spread": job.nodes > 1,
            "resources": resources,
            "environment": dict(job.environment),
            "max_restarts": launch.max_restarts,
            "storage": f"/tmp/{job.name}",
        }
        address = ["--address", launch.address] if launch.address else []
        words = ["ray", "job", "submit", "--no-wait", *address, "--submission-id", job.name, "--"]
        text = json.dumps(spec, indent=1)
        return Rendered({SPEC: text + "\n"}, (*words, launch.python, "-m", _DRIVER, json.dumps(spec)))

    def problems(self, job: EngineJob, rendered: Rendered) -> Sequence[UserError]:
        """See `Engine`."""
        try:
            spec = json.loads(rendered.files[SPEC])
        except ValueError as error:
            return [LaunchError("the job is no JSON", got=shown(error))]
        if not isinstance(spec, dict) or any(not isinstance(spec.get(key), kind) for key, kind in _KEYS.items()):
            return [LaunchError("the job lacks keys, or they are of another kind", allowed=", ".join(_KEYS))]
        return []

    def submit(self, job: EngineJob, rendered: Rendered) -> str:
        """See `Engine`."""
        call_client(rendered.submit, _INSTALL)
        return job.name

    def status(self, submitted: Submission) -> EngineStatus:
        """See `Engine`."""
        said = call_client(["ray", "job", "status", *_address(submitted), submitted.id], _INSTALL)
        found = re.findall(rf"\b({'|'.join(_STATES)})\b", said) or re.findall(r"\b(succeeded|failed|stopped)\b", said)
        if not found:
            raise LaunchError("ray has answered with no state of the job", got=shown(said))
        word = found[-1].upper()
        return EngineStatus(_STATES[word], word)

    def lines(self, submitted: Submission, follow: bool) -> Iterator[str]:
        """See `Engine`."""
        end = ["--follow"] if follow else []
        yield from client_lines(["ray", "job", "logs", *_address(submitted), *end, submitted.id], _INSTALL)

    def cancel(self, submitted: Submission) -> None:
        """See `Engine`."""
        call_client(["ray", "job", "stop", "--no-wait", *_address(submitted), submitted.id], _INSTALL)


def _address(submitted: Submission) -> list[str]:
    address = submitted.options.get("address")
    return ["--address", address] if isinstance(address, str) else []


def _resources(job: EngineJob, launch: RayLaunch) -> tuple[dict[str, float], list[UserError]]:
    target, found = job.config.hardware.target, {"CPU": launch.cpus, **launch.resources}
    problems: list[UserError] = []
    if target == "auto":
        what, allowed = (
            "Ray places a worker by its resources: the hardware must be named",
            "cpu, cuda, rocm, tpu, trainium",
        )
        problems.append(ConfigError(what, got="hardware=auto", allowed=allowed, fix="hardware=cuda"))
    resource = _RESOURCES.get(target)
    if resource is not None and job.devices_per_node is None:
        what = f"say how many devices of a host a worker gets: Ray counts '{resource}'"
        problems.append(ConfigError(what, got="hardware.devices=auto", fix="hardware.devices=8"))
    elif resource is not None:
        found[resource] = float(cast(Any, job.devices_per_node))
    if target == "tpu" and "TPU" not in launch.resources:
        what, fix = "say how many chips of a host a worker gets", "launch.resources={TPU: 4}"
        problems.append(ConfigError(what, got="launch.resources without TPU", fix=fix))
    return found, problems
