"""SkyPilot: a managed job over the accelerators of several vendors. Driven by its client, sky."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import jsonschema_rs
import yaml

from orchestrator.config.launch_schema import SkypilotLaunch
from orchestrator.engines.client import call_client, client_lines
from orchestrator.engines.engine import Engine, EngineStatus, Rendered, State
from orchestrator.engines.engine_job import EngineJob
from orchestrator.engines.shell_text import bad_variables
from orchestrator.engines.skypilot_candidates import SkyCandidate, parse_candidate
from orchestrator.engines.skypilot_task import task
from orchestrator.engines.submission import Submission
from orchestrator.engines.yaml_text import dump_yaml
from orchestrator.errors import ConfigError, ConfigErrors, LaunchError, UserError, shown

TASK = "task.yaml"
_INSTALL = "install skypilot[aws,gcp]==0.14.1 in an environment of its own, put its sky on the PATH, and: sky check"
_AXES = ("replicate", "pipeline", "fsdp", "expert", "context", "tensor")
_STATES: Mapping[str, State] = {
    **dict.fromkeys(("PENDING", "SUBMITTED", "STARTING", "RECOVERING"), "waiting"),
    **dict.fromkeys(("RUNNING", "WINDING_DOWN", "CANCELLING"), "running"),
    "SUCCEEDED": "finished",
    "CANCELLED": "cancelled",
}
# SkyPilot's own loader takes any key of job_recovery, any strategy and any accelerator.
_RECOVERY = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "strategy": {"enum": ["EAGER_NEXT_REGION", "FAILOVER"]},
        "max_restarts_on_errors": {"type": "integer", "minimum": 0},
        "recover_on_exit_codes": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 255}},
    },
}
_ENTRY = {
    "type": "object",
    "additionalProperties": False,
    "required": ["accelerators", "use_spot", "job_recovery"],
    "properties": {
        "infra": {"type": "string"},
        "accelerators": {"type": "string"},
        "accelerator_args": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"runtime_version": {"type": "string"}, "tpu_vm": {"type": "boolean"}},
        },
        "use_spot": {"type": "boolean"},
        "image_id": {"type": "string", "pattern": "^docker:"},
        "disk_size": {"type": "integer", "minimum": 1},
        "job_recovery": _RECOVERY,
    },
}
_ENTRIES = {"type": "array", "minItems": 1, "items": _ENTRY}
_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "num_nodes", "resources", "run"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]([a-z0-9-]*[a-z0-9])?$"},
        "workdir": {"type": "string"},
        "num_nodes": {"type": "integer", "minimum": 1},
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"ordered": _ENTRIES, "any_of": _ENTRIES},
            "minProperties": 1,
            "maxProperties": 1,
        },
        "envs": {"type": "object", "additionalProperties": {"type": ["string", "null"]}},
        "secrets": {"type": "object", "additionalProperties": {"type": "null"}},
        "setup": {"type": "string"},
        "run": {"type": "string"},
    },
}


class SkypilotEngine(Engine):
    """Managed jobs of SkyPilot."""

    name = "skypilot"
    state = "tasks load in SkyPilot 0.14.1; the move to another vendor was rehearsed; never ran on a cloud"
    clients: ClassVar[tuple[str, ...]] = ("sky",)

    def render(self, job: EngineJob) -> Rendered:
        """See `Engine`."""
        launch = cast(SkypilotLaunch, job.config.launch)
        candidates, problems = _candidates(launch.candidates, launch.runtime_version)
        problems += _problems(job, launch, candidates)
        if problems:
            raise ConfigErrors(problems)
        head = (f"The run {job.run_id}: python -m orchestrator launch engine=skypilot made this.",)
        words = ["sky", "jobs", "launch", "--yes", "--detach-run", "--name", job.name]
        words += [word for name in launch.secrets for word in ("--secret", name)]
        text = dump_yaml(task(job, launch, candidates), head=head)
        return Rendered({TASK: text}, (*words, str(job.folder / TASK)))

    def problems(self, job: EngineJob, rendered: Rendered) -> Sequence[UserError]:
        """See `Engine`."""
        try:
            found = yaml.safe_load(rendered.files[TASK])
        except yaml.YAMLError as error:
            return [LaunchError("the task is no YAML", got=shown(error))]
        validator = jsonschema_rs.validator_for(_SCHEMA)
        if wrong := list(validator.iter_errors(found)):
            return [
                LaunchError(f"task: {'.'.join(map(str, one.instance_path)) or 'the file'}: {shown(one.message, 300)}")
                for one in wrong
            ]
        (entries,) = found["resources"].values()
        texts = [_text(entry) for entry in entries]
        versions = {entry.get("accelerator_args", {}).get("runtime_version") for entry in entries} - {None}
        candidates, problems = _candidates(texts, next(iter(versions), None))
        return [*problems, *_several_hosts(candidates, found["num_nodes"])]

    def submit(self, job: EngineJob, rendered: Rendered) -> str:
        """See `Engine`."""
        call_client(rendered.submit, _INSTALL, seconds=900.0)  # the first job starts the controller's machine
        return job.name

    def status(self, submitted: Submission) -> EngineStatus:
        """See `Engine`."""
        said = call_client(["sky", "jobs", "queue", "--all", "--output", "json"], _INSTALL)
        try:
            records = json.loads(said[said.index("[") :])
            mine = [one for one in records if one["job_name"] == submitted.id]
        except (ValueError, TypeError, KeyError):
            raise LaunchError("sky has answered with no list of jobs", got=shown(said)) from None
        if not mine:
            return EngineStatus("unknown", "SkyPilot has no such job; run.json of the run has its status")
        newest: Mapping[str, Any] = max(mine, key=lambda one: one.get("job_id") or 0)
        word = str(newest.get("status", ""))
        state = _STATES.get(word, "failed" if word.startswith("FAILED") else "unknown")
        count = newest.get("recovery_count") or 0
        place = newest.get("infra") or newest.get("region")
        parts = [word, *([f"on {place}"] if place else []), *([f"recovered {count} times"] if count else [])]
        return EngineStatus(state, ", ".join(parts))

    def lines(self, submitted: Submission, follow: bool) -> Iterator[str]:
        """See `Engine`."""
        end = "--follow" if follow else "--no-follow"
        yield from client_lines(["sky", "jobs", "logs", "--name", submitted.id, end], _INSTALL)

    def cancel(self, submitted: Submission) -> None:
        """See `Engine`."""
        call_client(["sky", "jobs", "cancel", "--yes", "--name", submitted.id], _INSTALL)


def _candidates(texts: Sequence[str], runtime_version: str | None) -> tuple[list[SkyCandidate], list[UserError]]:
    found, problems = [], list[UserError]()
    for text in texts:
        try:
            found.append(parse_candidate(text, runtime_version))
        except ConfigError as error:
            problems.append(error)
    return found, problems


def _text(entry: Mapping[str, Any]) -> str:
    infra = f"{entry['infra']}/" if "infra" in entry else ""
    return f"{infra}{entry['accelerators']}{':spot' if entry['use_spot'] else ''}"


def _several_hosts(candidates: Sequence[SkyCandidate], nodes: int) -> Iterator[ConfigError]:
    slices = [candidate.text for candidate in candidates if candidate.is_tpu]
    if nodes > 1 and slices:
        yield ConfigError(
            "SkyPilot starts one slice of TPUs for a job, with all its hosts",
            got=f"launch.nodes={nodes} with {', '.join(slices)}",
            fix="launch.nodes=1 and a larger slice; several slices: engine=kubernetes",
        )


def _problems(job: EngineJob, launch: SkypilotLaunch, candidates: Sequence[SkyCandidate]) -> Iterator[UserError]:
    config = job.config
    if not launch.candidates:
        fix = "launch.candidates=[gcp/tpu-v6e-8:spot, H100:8:spot, Trainium2:16]"
        yield ConfigError("say on which accelerators the job may run", got="launch.candidates=[]", fix=fix)
    yield from _several_hosts(candidates, job.nodes)
    if "://" not in config.checkpoint.dir:
        yield ConfigError(
            "a job that moves between machines takes only what is in an object store along",
            got=f"checkpoint.dir={config.checkpoint.dir}",
            allowed="s3://BUCKET/..., gs://BUCKET/...",
            fix="checkpoint.dir=s3://BUCKET/runs",
        )
    hardware, targets = config.hardware, sorted({candidate.target for candidate in candidates})
    if hardware.target != "auto" and set(targets) - {hardware.target}:
        got = f"hardware={hardware.target} with candidates for {', '.join(targets)}"
        fix = "hardware=auto takes what is found on arrival"
        yield ConfigError("not every candidate is hardware that the command asks for", got=got, fix=fix)
    fixed = {axis: getattr(config.layout, axis) for axis in _AXES}
    if len(candidates) > 1 and "auto" not in fixed.values():
        got = " ".join(f"layout.{axis}={degree}" for axis, degree in fixed.items() if degree != 1) or "no axis is auto"
        fix = "layout=auto plans it on arrival"
        what = "a layout without auto fits one number of devices, and there are several candidates"
        yield ConfigError(what, got=got, fix=fix)
    if not launch.image and "trainium" in targets and not launch.neuron_index:
        what = "torch-neuronx is on AWS's package index only"
        got = "a Trainium candidate with launch.image=null launch.neuron_index=null"
        yield ConfigError(what, got=got, fix="launch.neuron_index=URL, as AWS's setup page has it, or launch.image=...")
    if not launch.image and "rocm" in targets:
        what = "setup installs no torch for AMD GPUs"
        yield ConfigError(
            what, got="an AMD candidate with launch.image=null", fix="launch.image=..., with torch for ROCm"
        )
    yield from bad_variables("launch.secrets", dict.fromkeys(launch.secrets, ""))
    if not re.fullmatch(r"[A-Za-z0-9./_~@:+=<>!,-]+", launch.package):
        yield ConfigError(
            "launch.package is no requirement of pip", got=shown(launch.package), allowed="lm-orchestrator, ."
        )
