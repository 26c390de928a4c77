"""What a cluster refuses, or takes and does not run, and no schema says: names, and numbers that must fit each other.

The rules are those of the API server, of JobSet's webhook (pkg/webhooks/jobset_webhook.go), and of GKE for TPUs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from orchestrator.engines.kubernetes_pods import TPU_ACCELERATOR, TPU_KINDS, TPU_RESOURCE, TPU_TOPOLOGY
from orchestrator.errors import LaunchError, UserError, shown

_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")  # RFC 1035: the name of a service begins with a letter
_DNS = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_KEY = re.compile(r"((?=.{1,253}/)[a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
_VARIABLE = re.compile(r"[A-Za-z_.-][A-Za-z0-9_.-]*")
_RULE = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]{0,126}[A-Za-z0-9_])?")
_IMAGE = re.compile(r"[a-z0-9]([A-Za-z0-9._:/-]*[A-Za-z0-9])?(@sha256:[0-9a-f]{64})?")
_REASONS = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"}
_MAX_NAME, _MAX_INT32, _SUFFIX = 63, (1 << 31) - 1, "-abcde"
_Found = Iterator[tuple[str, object]]  # what is wrong, and what was got


def manifest_problems(documents: Iterable[Mapping[str, Any]]) -> list[UserError]:
    """List what is wrong in documents that their schemas find right.

    Args:
        documents: parsed; those of a job belong together.
    """
    objects = list(documents)
    found: list[tuple[str, object]] = list(_objects(objects))
    claims = {_get(one, "spec", "channel", "resourceClaimTemplate", "name") for one in objects}
    for one in objects:
        if one["kind"] == "JobSet":
            found += _jobset(one, claims)
    return [LaunchError(what, got=shown(got) if got is not None else None) for what, got in found]


def _get(node: Any, *keys: str) -> Any:
    for key in keys:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _twice(what: str, names: Iterable[str]) -> _Found:
    for name, times in Counter(names).items():
        if times > 1:
            yield f"{what} is named {times} times", name


def _objects(objects: list[Mapping[str, Any]]) -> _Found:
    yield from _twice("an object", [f"{one['kind']}/{one['metadata'].get('name')}" for one in objects])
    for one in objects:
        metadata = one["metadata"]
        if not _LABEL.fullmatch(metadata.get("name") or ""):
            yield (
                f"the name of a {one['kind']} is no DNS label (a-z, 0-9, -, at most 63, a letter first)",
                metadata.get("name"),
            )
        if not _LABEL.fullmatch(metadata.get("namespace", "default")):
            yield "the namespace is no DNS label", metadata["namespace"]
        yield from _labels(one["kind"], metadata)


def _labels(where: str, metadata: Mapping[str, Any]) -> _Found:
    for key in (*metadata.get("labels", {}), *metadata.get("annotations", {})):
        if not _KEY.fullmatch(key):
            yield f"a label or annotation of the {where} has a name that Kubernetes refuses", key
    for key, value in metadata.get("labels", {}).items():
        if not _VALUE.fullmatch(value):
            yield (
                f"the label '{key}' of the {where} is no value of a label (at most 63 of A-Za-z0-9._-)",
                value,
            )


def _jobset(one: Mapping[str, Any], claims: set[Any]) -> _Found:
    spec, name = one["spec"], one["metadata"].get("name") or ""
    jobs = spec.get("replicatedJobs", [])
    if not jobs:
        yield "a JobSet without replicatedJobs runs nothing", None
    yield from _twice("a replicatedJob", [job["name"] for job in jobs])
    for number, job in enumerate(jobs):
        if number == 0 and job.get("dependsOn"):
            yield "the first replicatedJob can depend on none", job["dependsOn"][0]["name"]
        if job.get("dependsOn") and _get(spec, "startupPolicy", "startupPolicyOrder") == "InOrder":
            yield "startupPolicy InOrder and dependsOn exclude each other", job["name"]
        yield from _replicated_job(name, job, claims)
    known = {job["name"] for job in jobs}
    targets = [_get(spec, "successPolicy", "targetReplicatedJobs") or []]
    targets += [rule.get("targetReplicatedJobs") or [] for rule in _get(spec, "failurePolicy", "rules") or []]
    for target in {name for names in targets for name in names} - known:
        yield "a policy names a replicatedJob that is not there", target
    yield from _failure_policy(spec.get("failurePolicy") or {}, jobs)
    if spec.get("coordinator"):
        yield from _coordinator(name, spec, jobs)


def _failure_policy(policy: Mapping[str, Any], jobs: list[Mapping[str, Any]]) -> _Found:
    rules = policy.get("rules") or []
    if policy.get("maxRestarts", 0) < 0:
        yield "failurePolicy.maxRestarts is below 0", policy["maxRestarts"]
    yield from _twice("a rule of the failurePolicy", [rule["name"] for rule in rules])
    for rule in rules:
        if not _RULE.fullmatch(rule["name"]):
            yield "the name of a rule of the failurePolicy is refused (letters, digits, '_', ',', ':')", rule["name"]
        for reason in set(rule.get("onJobFailureReasons") or []) - _REASONS:
            yield f"a rule of the failurePolicy names no reason of a Job ({', '.join(sorted(_REASONS))})", reason
        for pattern in rule.get("onJobFailureMessagePatterns") or []:
            try:
                re.compile(pattern)
            except re.error:
                yield "a pattern of the failurePolicy is no regular expression", pattern
    if policy.get("restartStrategy") == "InPlaceRestart":
        for job in jobs:
            inner = job["template"]["spec"]
            if inner.get("backoffLimit") != _MAX_INT32 or inner.get("podReplacementPolicy") != "Failed":
                yield f"InPlaceRestart wants backoffLimit: {_MAX_INT32} and podReplacementPolicy: Failed", job["name"]


def _coordinator(name: str, spec: Mapping[str, Any], jobs: list[Mapping[str, Any]]) -> _Found:
    chosen = spec["coordinator"]
    target = next((job for job in jobs if job["name"] == chosen["replicatedJob"]), None)
    if target is None:
        yield "the coordinator is in a replicatedJob that is not there", chosen["replicatedJob"]
        return
    index, pod = chosen.get("jobIndex", 0), chosen.get("podIndex", 0)
    if not 0 <= index < target.get("replicas", 1):
        yield f"the coordinator's jobIndex is none of {target.get('replicas', 1)} replicas", index
    if not 0 <= pod < target["template"]["spec"].get("completions", 1):
        yield f"the coordinator's podIndex is none of {target['template']['spec'].get('completions', 1)} pods", pod
    subdomain = _get(spec, "network", "subdomain") or name
    if len(label := f"{name}-{chosen['replicatedJob']}-{index}-{pod}.{subdomain}") > _MAX_NAME:
        yield f"the coordinator's address is a label's value, which has {_MAX_NAME} characters at most", label


def _replicated_job(jobset: str, job: Mapping[str, Any], claims: set[Any]) -> _Found:
    inner, replicas = job["template"].get("spec", {}), job.get("replicas", 1)
    parallelism, completions = inner.get("parallelism", 1), inner.get("completions")
    if replicas < 1 or parallelism < 1:
        yield f"the replicatedJob '{job['name']}' has no pods", f"replicas: {replicas}, parallelism: {parallelism}"
    if replicas * parallelism > _MAX_INT32:
        yield f"replicas × parallelism is more than {_MAX_INT32}", replicas * parallelism
    if inner.get("completionMode", "Indexed") != "Indexed":
        yield "completionMode must be Indexed: a pod finds its place by its index", inner["completionMode"]
    if completions != parallelism:
        yield "all pods of a Job run at the same time: completions must be parallelism", f"{completions}, {parallelism}"
    longest = f"{jobset}-{job['name']}-{max(0, replicas - 1)}-{max(0, parallelism - 1)}{_SUFFIX}"
    if len(longest) > _MAX_NAME:
        yield f"the names of the pods are too long: {len(longest)} characters of at most {_MAX_NAME}", longest
    elif not _LABEL.fullmatch(longest):
        yield "the names of the pods are no DNS labels", longest
    pod = inner.get("template", {})
    yield from _labels("pod", pod.get("metadata", {}))
    yield from _pod(pod.get("spec", {}), inner, claims)
    yield from _tpu(pod.get("spec", {}), parallelism)


def _pod(spec: Mapping[str, Any], inner: Mapping[str, Any], claims: set[Any]) -> _Found:
    restart = spec.get("restartPolicy")
    if restart not in ("Never", "OnFailure"):
        yield "the restartPolicy of a Job's pods is Never or OnFailure", restart
    elif inner.get("podFailurePolicy") and restart != "Never":
        yield "with a podFailurePolicy the restartPolicy must be Never", restart
    containers = [*spec.get("containers", []), *spec.get("initContainers", [])]
    names = [one["name"] for one in containers]
    yield from _twice("a container", names)
    yield from _pod_failure_policy(_get(inner, "podFailurePolicy", "rules") or [], set(names))
    volumes = [one["name"] for one in spec.get("volumes", [])]
    yield from _twice("a volume", volumes)
    for key, value in spec.get("nodeSelector", {}).items():
        if not _KEY.fullmatch(key) or not _VALUE.fullmatch(value):
            yield "the nodeSelector has a label that no node can have", f"{key}: {value}"
    claimed = {one["name"]: one.get("resourceClaimTemplateName") for one in spec.get("resourceClaims", [])}
    for template in set(claimed.values()) - claims - {None}:
        yield "a resourceClaim names a template that no ComputeDomain of this manifest makes", template
    if spec.get("terminationGracePeriodSeconds", 30) < 1:
        yield "terminationGracePeriodSeconds leaves no time to save", spec["terminationGracePeriodSeconds"]
    for name in (*volumes, *claimed, *names):
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name):
            yield "the name of a container, volume or claim is no DNS label", name
    for one in containers:
        yield from _container(one, set(volumes), set(claimed))


def _pod_failure_policy(rules: list[Mapping[str, Any]], containers: set[str]) -> _Found:
    if len(rules) > 20:
        yield "a podFailurePolicy has 20 rules at most", len(rules)
    for rule in rules:
        if rule["action"] not in ("FailJob", "FailIndex", "Ignore", "Count"):
            yield "a podFailurePolicy knows FailJob, FailIndex, Ignore and Count", rule["action"]
        if ("onExitCodes" in rule) == ("onPodConditions" in rule):
            yield "a rule of the podFailurePolicy has either onExitCodes or onPodConditions", rule["action"]
        codes = rule.get("onExitCodes", {})
        if codes.get("operator", "In") not in ("In", "NotIn"):
            yield "the operator of onExitCodes is In or NotIn", codes["operator"]
        values = codes.get("values", [1])
        if values != sorted(set(values)) or not values or (0 in values and codes.get("operator") == "In"):
            yield "exit codes are in ascending order, each once, and 0 is no failure", values
        if codes.get("containerName", next(iter(containers), None)) not in containers:
            yield "onExitCodes names a container that is not there", codes["containerName"]


def _container(one: Mapping[str, Any], volumes: set[str], claims: set[str]) -> _Found:
    if not _IMAGE.fullmatch(one.get("image") or ""):
        yield f"the image of the container '{one['name']}' is no reference", one.get("image")
    variables = [entry["name"] for entry in one.get("env", [])]
    yield from _twice("a variable", variables)
    for entry in one.get("env", []):
        if not _VARIABLE.fullmatch(entry["name"]) or set(entry["name"]) <= {"."}:
            yield "a variable has a name that Kubernetes refuses", entry["name"]
        if entry.get("value") and "valueFrom" in entry:
            yield "a variable has either a value or a source", entry["name"]
    mounts = one.get("volumeMounts", [])
    yield from _twice("a place of the container's files", [mount["mountPath"] for mount in mounts])
    for mount in mounts:
        if mount["name"] not in volumes:
            yield "a volume is mounted that the pod does not have", mount["name"]
        if not mount["mountPath"].startswith("/") or ":" in mount["mountPath"]:
            yield "a volume is mounted at no absolute path", mount["mountPath"]
    for source in one.get("envFrom", []):
        if not _DNS.fullmatch(_get(source, "secretRef", "name") or _get(source, "configMapRef", "name") or ""):
            yield "variables come from a Secret or ConfigMap whose name none can have", source
    yield from _resources(one.get("resources", {}), claims)


def _resources(resources: Mapping[str, Any], claims: set[str]) -> _Found:
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    for name in {*limits, *requests}:
        extended = "/" in name and not name.startswith("kubernetes.io/")
        if extended and name not in limits:
            yield f"'{name}' is requested without a limit", requests[name]
        elif extended and str(requests.get(name, limits[name])) != str(limits[name]):
            yield f"requests and limits of '{name}' must be equal", f"{requests[name]}, {limits[name]}"
        elif extended and not re.fullmatch(r"[1-9][0-9]*", str(limits[name])):
            yield f"'{name}' comes in whole numbers", limits[name]
        elif not extended and not re.fullmatch(r"cpu|memory|ephemeral-storage|hugepages-[0-9]+[KMG]i", name):
            yield "there is no such resource", name
    for claim in resources.get("claims", []):
        if claim["name"] not in claims:
            yield "a container claims what the pod does not", claim["name"]


def _tpu(spec: Mapping[str, Any], parallelism: int) -> _Found:
    selector = spec.get("nodeSelector", {})
    accelerator, topology = selector.get(TPU_ACCELERATOR), selector.get(TPU_TOPOLOGY)
    limits = [_get(one, "resources", "limits", TPU_RESOURCE) for one in spec.get("containers", [])]
    chips = sum(int(count) for count in limits if count is not None and str(count).isdigit())
    if accelerator is None and topology is None and not chips:
        return
    if accelerator not in TPU_KINDS:
        yield f"'{TPU_ACCELERATOR}' is no TPU of GKE ({', '.join(TPU_KINDS)})", accelerator
        return
    by_hosts = TPU_KINDS[accelerator].hosts(topology or "")
    if not by_hosts:
        yield f"'{TPU_TOPOLOGY}' is no topology of {accelerator}", topology
    elif by_hosts.get(parallelism) != chips:
        allowed = " or ".join(f"{hosts} × {count}" for hosts, count in by_hosts.items())
        yield f"pods × {TPU_RESOURCE} of a pod is not the topology {topology} ({allowed})", f"{parallelism} x {chips}"
