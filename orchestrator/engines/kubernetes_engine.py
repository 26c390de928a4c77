"""Kubernetes: a JobSet, on the accelerators of any vendor. Driven by kubectl."""

from __future__ import annotations

import json
import posixpath
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import yaml

from orchestrator.config.launch_schema import KubernetesLaunch
from orchestrator.engines.client import call_client, client_lines
from orchestrator.engines.engine import Engine, EngineStatus, Rendered
from orchestrator.engines.engine_job import EngineJob
from orchestrator.engines.kubernetes_checks import manifest_problems
from orchestrator.engines.kubernetes_manifest import documents
from orchestrator.engines.kubernetes_schemas import schema_problems
from orchestrator.engines.submission import Submission
from orchestrator.engines.yaml_text import dump_yaml
from orchestrator.errors import ConfigError, ConfigErrors, LaunchError, UserError, shown

MANIFEST = "job.yaml"
_INSTALL = "install kubectl, and a configuration of the cluster (kubectl config current-context)"
_JOBSET_NAME, _ATTEMPT = "jobset.sigs.k8s.io/jobset-name", "jobset.sigs.k8s.io/restart-attempt"
_FIRST = "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
_FEW_HOSTS = 8  # whose lines are shown all; of more the first one's, which speaks for the job
_POLL_SECONDS = 2.0


class KubernetesEngine(Engine):
    """JobSets of Kubernetes, on TPU slices, NVIDIA and AMD GPUs, Trainium and CPUs."""

    name = "kubernetes"
    state = "manifests pass the schemas of JobSet and of Kubernetes and further rules; never ran on a cluster"
    clients: ClassVar[tuple[str, ...]] = ("kubectl",)

    def render(self, job: EngineJob) -> Rendered:
        """See `Engine`."""
        launch = cast(KubernetesLaunch, job.config.launch)
        found: list[UserError] = list(_problems(job, launch))
        objects: list[dict[str, Any]] = []
        try:
            objects = documents(job, launch)
        except ConfigErrors as errors:
            found += errors.problems
        if found:
            raise ConfigErrors(found)
        head = (f"The run {job.run_id}: python -m orchestrator launch engine=kubernetes made this.",)
        command = ("kubectl", "create", "--validate=strict", "--output=name", "--filename", str(job.folder / MANIFEST))
        return Rendered({MANIFEST: dump_yaml(*objects, head=head)}, command)

    def problems(self, job: EngineJob, rendered: Rendered) -> Sequence[UserError]:
        """See `Engine`."""
        try:
            objects = [one for one in yaml.safe_load_all(rendered.files[MANIFEST]) if one is not None]
        except yaml.YAMLError as error:
            return [LaunchError("the manifest is no YAML", got=shown(error))]
        if not objects or not all(isinstance(one, dict) for one in objects):
            return [LaunchError("the manifest holds no objects")]
        wrong = [problem for one in objects for problem in schema_problems(one)]
        # What has another shape cannot be looked into.
        return wrong or manifest_problems(objects)

    def submit(self, job: EngineJob, rendered: Rendered) -> str:
        """See `Engine`."""
        call_client(rendered.submit, _INSTALL)
        return f"{cast(KubernetesLaunch, job.config.launch).namespace}/{job.name}"

    def status(self, submitted: Submission) -> EngineStatus:
        """See `Engine`."""
        jobset = _get(submitted)
        if jobset is None:
            return EngineStatus("unknown", "the cluster has no such JobSet any more; see run.json of the run")
        said = _conditions(jobset)
        for condition, state in (("Completed", "finished"), ("Failed", "failed")):
            if condition in said:
                return EngineStatus(cast(Any, state), said[condition])
        if jobset.get("metadata", {}).get("deletionTimestamp"):
            return EngineStatus("cancelled", "being deleted")
        restarts = jobset.get("status", {}).get("restarts", 0)
        again = f", started again {restarts} times" if restarts else ""
        if "Suspended" in said:
            return EngineStatus("waiting", f"suspended, in its queue{again}")
        pods = _pods(submitted)
        hosts = sorted({pod["spec"]["nodeName"] for pod in pods if pod.get("spec", {}).get("nodeName")})
        phases = [pod.get("status", {}).get("phase", "Unknown") for pod in pods]
        counts = ", ".join(f"{phases.count(phase)} pods {phase}" for phase in sorted(set(phases)))
        return EngineStatus(
            "running" if "Running" in phases else "waiting", (counts or "no pods yet") + again, tuple(hosts)
        )

    def lines(self, submitted: Submission, follow: bool) -> Iterator[str]:
        """See `Engine`."""
        shown_attempt = -1
        while True:
            jobset = _get(submitted)
            ended = jobset is None or bool({"Completed", "Failed"} & set(_conditions(jobset)))
            attempt = 0 if jobset is None else int(jobset.get("status", {}).get("restarts", 0))
            ready = attempt > shown_attempt and any(_has_lines(pod) for pod in _pods(submitted))
            if ready:
                shown_attempt = attempt
                yield from client_lines(_logs(submitted, attempt, follow and not ended), _INSTALL)
            if ended or not follow:
                return
            if not ready:
                time.sleep(_POLL_SECONDS)

    def cancel(self, submitted: Submission) -> None:
        """See `Engine`."""
        namespace, name = _place(submitted)
        kinds = "jobset,computedomain" if submitted.options.get("compute_domain") else "jobset"
        # The pods get SIGTERM and their time to save.
        call_client(["kubectl", "--namespace", namespace, "delete", kinds, name, "--wait=false"], _INSTALL)


def _problems(job: EngineJob, launch: KubernetesLaunch) -> Iterator[ConfigError]:
    if not launch.image:
        fix = "launch.image=REGISTRY/NAME:TAG; Containerfile makes one"
        yield ConfigError("a pod needs an image with the product in it", got="launch.image=null", fix=fix)
    if not posixpath.isabs(launch.work_dir) or launch.work_dir == "/" or ".." in launch.work_dir.split("/"):
        yield ConfigError("launch.work_dir is no folder of a container", got=shown(launch.work_dir), allowed="/work")
    config = job.config
    remote = "://" in config.checkpoint.dir
    if launch.claim is None and not remote:
        yield ConfigError(
            "what a pod writes into itself is gone with it: runs and checkpoints need a place that stays",
            got=f"launch.claim=null with checkpoint.dir={config.checkpoint.dir}",
            allowed="a PersistentVolumeClaim that all pods may write, or an object store",
            fix="launch.claim=NAME, or checkpoint.dir=s3://BUCKET/... or gs://BUCKET/...",
        )
    places = {"runs_dir": config.runs_dir, **({} if remote else {"checkpoint.dir": config.checkpoint.dir})}
    for key, place in places.items():
        outside = posixpath.isabs(place) and posixpath.commonpath([place, launch.work_dir]) != launch.work_dir
        if launch.claim is not None and place != "auto" and outside:
            fix = f"a path without a leading /, which begins in launch.work_dir={launch.work_dir}"
            yield ConfigError(f"{key} is not on the claim", got=place, fix=fix)


def _place(submitted: Submission) -> tuple[str, str]:
    namespace, _, name = submitted.id.partition("/")
    if not name:
        raise LaunchError("the record of the job has no namespace and name", got=shown(submitted.id))
    return namespace, name


def _get(submitted: Submission) -> Mapping[str, Any] | None:
    namespace, name = _place(submitted)
    found = _ask(["kubectl", "--namespace", namespace, "get", "jobset", name, "--ignore-not-found", "--output=json"])
    return found if found else None


def _pods(submitted: Submission) -> list[Mapping[str, Any]]:
    namespace, name = _place(submitted)
    selector = f"{_JOBSET_NAME}={name}"
    found = _ask(["kubectl", "--namespace", namespace, "get", "pods", "--selector", selector, "--output=json"])
    return [pod for pod in found.get("items", []) if isinstance(pod, Mapping)]


def _ask(words: Sequence[str]) -> Mapping[str, Any]:
    said = call_client(words, _INSTALL)
    try:
        found = json.loads(said or "{}")
    except ValueError:
        found = None
    if not isinstance(found, Mapping):
        raise LaunchError("kubectl has answered with no JSON", got=shown(said))
    return found


def _conditions(jobset: Mapping[str, Any]) -> dict[str, str]:
    """Return the conditions that are true, with what is said to each."""
    found = jobset.get("status", {}).get("conditions", [])
    return {
        one.get("type", ""): one.get("message") or one.get("reason", "") for one in found if one.get("status") == "True"
    }


def _has_lines(pod: Mapping[str, Any]) -> bool:
    return pod.get("status", {}).get("phase") in ("Running", "Succeeded", "Failed")


def _logs(submitted: Submission, attempt: int, follow: bool) -> list[str]:
    namespace, name = _place(submitted)
    nodes = submitted.options.get("nodes")
    few = isinstance(nodes, int) and nodes <= _FEW_HOSTS
    selector = f"{_JOBSET_NAME}={name},{_ATTEMPT}={attempt}" + ("" if few else f",{_FIRST}")
    options = ["--tail=-1", "--prefix", f"--max-log-requests={_FEW_HOSTS}", *(["--follow"] if follow else [])]
    return ["kubectl", "--namespace", namespace, "logs", "--selector", selector, *options]
