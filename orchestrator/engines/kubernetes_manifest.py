"""The manifest of a job: a JobSet, and for racks of NVLink their ComputeDomain."""

from __future__ import annotations

import math
from typing import Any

from orchestrator.config.launch_schema import KubernetesLaunch
from orchestrator.distributed.job_host import ATTEMPT, HOST, HOSTS, SLICE, SLICE_HOSTS, STORE
from orchestrator.distributed.world import DEFAULT_PORT
from orchestrator.engines.engine_job import EngineJob
from orchestrator.engines.kubernetes_pods import NODE_POOL, TPU_RESOURCE, PodNeeds, pod_needs
from orchestrator.errors import DIVERGED, INTERRUPTED, MISTAKE, TERMINATED

CONTAINER = "train"
_SHM, _WORK, _DOMAIN = "shm", "work", "compute-domain"
_EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"
_GRACE_SECONDS = 30  # of Kubernetes, where nothing is said
_USER = 1000  # of the image: Containerfile
# What the Job controller says when a rule of the podFailurePolicy has matched: "Container train for pod ns/name failed
# with exit code 2 matching FailJob rule at index 0".
_MISTAKES = f"failed with exit code ({MISTAKE}|{DIVERGED}) matching"


def documents(job: EngineJob, launch: KubernetesLaunch) -> list[dict[str, Any]]:
    """Return the objects of a job, in the order in which they are created.

    Args:
        job: what is to run.
        launch: its `launch` group.

    Raises:
        ConfigErrors: what cannot be asked for.
    """
    needs = pod_needs(job, launch)
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(job, launch, needs),
        "spec": {
            **({"suspend": True} if launch.queue else {}),  # Kueue admits it
            **({} if launch.keep_seconds is None else {"ttlSecondsAfterFinished": launch.keep_seconds}),
            "failurePolicy": _failure_policy(launch.max_restarts),
            "coordinator": {"replicatedJob": _group(needs), "jobIndex": 0, "podIndex": 0},
            "replicatedJobs": [
                {"name": _group(needs), "replicas": needs.slices, "template": {"spec": _job_spec(job, launch, needs)}}
            ],
        },
    }
    domain = [_compute_domain(job, launch)] if launch.compute_domain else []
    return [*domain, jobset]


def _group(needs: PodNeeds) -> str:
    return "slice" if TPU_RESOURCE in needs.resources else "hosts"


def _metadata(job: EngineJob, launch: KubernetesLaunch, needs: PodNeeds) -> dict[str, Any]:
    labels = dict(launch.labels)
    if launch.queue:
        labels["kueue.x-k8s.io/queue-name"] = launch.queue
    if launch.queue_priority:
        labels["kueue.x-k8s.io/priority-class"] = launch.queue_priority
    exclusive = launch.exclusive
    if exclusive == "auto":
        # One slice per node pool: the hosts of a pool are the hosts of a slice.
        exclusive = NODE_POOL if TPU_RESOURCE in needs.resources and needs.slices * needs.hosts > 1 else None
    return {
        "name": job.name,
        "namespace": launch.namespace,
        **({"labels": labels} if labels else {}),
        **({"annotations": {_EXCLUSIVE: exclusive}} if exclusive else {}),
    }


def _failure_policy(max_restarts: int) -> dict[str, Any]:
    """End the job for what would fail again; start what was stopped again without counting; count all else."""
    by_policy = {"onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "maxRestarts": max_restarts,
        "rules": [
            {"name": "mistake", "action": "FailJobSet", **by_policy, "onJobFailureMessagePatterns": [_MISTAKES]},
            {"name": "stopped", "action": "RestartJobSetAndIgnoreMaxRestarts", **by_policy},
        ],
    }


def _job_spec(job: EngineJob, launch: KubernetesLaunch, needs: PodNeeds) -> dict[str, Any]:
    def on_codes(*codes: int) -> dict[str, Any]:
        exits = {"containerName": CONTAINER, "operator": "In", "values": list(codes)}
        return {"action": "FailJob", "onExitCodes": exits}

    disrupted = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    annotations = {**needs.annotations, **launch.annotations}
    if launch.required_topology:
        annotations["kueue.x-k8s.io/podset-required-topology"] = launch.required_topology
    metadata = {
        **({"labels": dict(launch.labels)} if launch.labels else {}),
        **({"annotations": annotations} if annotations else {}),
    }
    return {
        "completionMode": "Indexed",
        "parallelism": needs.hosts,
        "completions": needs.hosts,
        "backoffLimit": 0,  # a host alone cannot go on: the JobSet starts all of them again
        "podFailurePolicy": {"rules": [on_codes(MISTAKE, DIVERGED), on_codes(INTERRUPTED, TERMINATED), disrupted]},
        "template": {**({"metadata": metadata} if metadata else {}), "spec": _pod_spec(job, launch, needs)},
    }


def _pod_spec(job: EngineJob, launch: KubernetesLaunch, needs: PodNeeds) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = []
    if launch.shm is not None:
        volumes.append({"name": _SHM, "emptyDir": {"medium": "Memory", "sizeLimit": launch.shm}})
    if launch.claim is not None:
        volumes.append({"name": _WORK, "persistentVolumeClaim": {"claimName": launch.claim}})
    volumes += [{"name": name, "hostPath": {"path": path}} for name, (path, _) in needs.host_paths.items()]
    # Nodes with accelerators are commonly tainted with the name of the resource.
    tolerations: list[dict[str, str]] = [
        {"key": name, "operator": "Exists", "effect": "NoSchedule"} for name in needs.resources
    ]
    tolerations += [dict(entry) for entry in launch.tolerations]
    optional: dict[str, Any] = {
        "serviceAccountName": launch.service_account,
        "priorityClassName": launch.priority_class,
        "nodeSelector": dict(needs.selector) or None,
        "tolerations": tolerations or None,
        "volumes": volumes or None,
    }
    if launch.compute_domain:
        optional["resourceClaims"] = [{"name": _DOMAIN, "resourceClaimTemplateName": _claim(job)}]
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(launch.grace_seconds or _GRACE_SECONDS),
        **({} if launch.privileged else {"securityContext": {"fsGroup": _USER}}),
        **{key: value for key, value in optional.items() if value is not None},
        "containers": [_container(job, launch, needs)],
    }


def _container(job: EngineJob, launch: KubernetesLaunch, needs: PodNeeds) -> dict[str, Any]:
    command = [launch.python, *job.command]
    if needs.script:
        command = ["bash", "-c", f'source {needs.script} && exec "$@"', "bash", *command]
    resources: dict[str, Any] = {name: str(count) for name, count in needs.resources.items()}
    resources |= {name: value for name, value in (("cpu", launch.cpu), ("memory", launch.memory)) if value is not None}
    claims = {"claims": [{"name": _DOMAIN}]} if launch.compute_domain else {}
    limits = {"limits": resources, "requests": dict(resources)} if resources else {}
    mounts = [{"name": _SHM, "mountPath": "/dev/shm"}] if launch.shm is not None else []
    mounts += [{"name": _WORK, "mountPath": launch.work_dir}] if launch.claim is not None else []
    mounts += [{"name": name, "mountPath": place} for name, (_, place) in needs.host_paths.items()]
    security: dict[str, Any] = {"privileged": True} if launch.privileged else {"allowPrivilegeEscalation": False}
    if launch.privileged or needs.capabilities or TPU_RESOURCE in needs.resources:
        # For another user Kubernetes leaves capabilities without effect, and a TPU's /dev/vfio belongs to root.
        security["runAsUser"] = 0
    if needs.capabilities and not launch.privileged:
        security["capabilities"] = {"add": list(needs.capabilities)}
    return {
        "name": CONTAINER,
        "image": launch.image or "",
        "imagePullPolicy": launch.image_pull_policy,
        "command": [_literal(word) for word in command],
        "workingDir": launch.work_dir,
        "env": _variables(job, needs),
        **({"envFrom": [{"secretRef": {"name": name}} for name in launch.secrets]} if launch.secrets else {}),
        **({"resources": {**limits, **claims}} if limits or claims else {}),
        "securityContext": security,
        **({"volumeMounts": mounts} if mounts else {}),
    }


def _variables(job: EngineJob, needs: PodNeeds) -> list[dict[str, Any]]:
    found = [{"name": name, "value": _literal(value)} for name, value in {**needs.variables, **job.environment}.items()]
    hosts = needs.slices * needs.hosts
    if hosts == 1:
        return found

    def of_pod(name: str, path: str) -> dict[str, Any]:
        return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}

    # The pods of a JobSet have names in the DNS of its headless service, which is called as the JobSet.
    store = f"tcp:{job.name}-{_group(needs)}-0-0.{job.name}:{DEFAULT_PORT}"
    found += [{"name": HOSTS, "value": str(hosts)}, {"name": STORE, "value": store}]
    found.append(of_pod(HOST, "metadata.annotations['batch.kubernetes.io/job-completion-index']"))
    found.append(of_pod(ATTEMPT, "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"))
    if needs.slices > 1:
        found.append({"name": SLICE_HOSTS, "value": str(needs.hosts)})
        found.append(of_pod(SLICE, "metadata.labels['jobset.sigs.k8s.io/job-index']"))
    return found


def _literal(text: str) -> str:
    """Kubernetes replaces $(NAME) in commands and variables, and $$ is a $."""
    return text.replace("$", "$$")


def _claim(job: EngineJob) -> str:
    return f"{job.name}-imex"


def _compute_domain(job: EngineJob, launch: KubernetesLaunch) -> dict[str, Any]:
    # numNodes: 0 leaves the members to the pods that come, as the driver recommends.
    return {
        "apiVersion": "resource.nvidia.com/v1beta1",
        "kind": "ComputeDomain",
        "metadata": {"name": job.name, "namespace": launch.namespace},
        "spec": {"numNodes": 0, "channel": {"resourceClaimTemplate": {"name": _claim(job)}}},
    }
