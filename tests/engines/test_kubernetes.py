"""Manifests for every kind of fleet: right ones pass all that can be checked offline, wrong ones are refused."""

from __future__ import annotations

import copy
import subprocess
from typing import Any

import pytest
import yaml

from orchestrator.engines.engine_table import engine_of
from orchestrator.engines.kubernetes_engine import MANIFEST, KubernetesEngine
from orchestrator.engines.kubernetes_pods import TPU_KINDS
from orchestrator.engines.kubernetes_schemas import known_kinds, schema_problems
from orchestrator.engines.yaml_text import dump_yaml
from orchestrator.errors import ConfigErrors, LaunchError
from tests.lab.engine_jobs import ENGINES_INSTALLED, ENGINES_PYTHON, FakeClient, changed, job_of, submission

BASE = ("launch=kubernetes", "launch.image=registry.example/lm:1", "checkpoint.dir=gs://bucket/run")
FLEETS = {
    "v5e": ("hardware=tpu", "hardware.chip=tpu-v5e", "launch.topology=4x8", "launch.nodes=8", "layout.fsdp=32"),
    "v5e, one host": ("hardware=tpu", "hardware.chip=tpu-v5e", "launch.topology=2x4", "layout.fsdp=8"),
    "v5p": ("hardware=tpu", "hardware.chip=tpu-v5p", "launch.topology=2x2x4", "launch.nodes=4", "layout.fsdp=16"),
    "v6e, two slices": (
        *("hardware=tpu", "hardware.chip=tpu-v6e", "launch.topology=4x4", "launch.slices=2", "launch.nodes=8"),
        *("layout.replicate=2", "layout.fsdp=16", "launch.queue=team", "launch.queue_priority=high"),
    ),
    "7x": (
        *("hardware=tpu", "hardware.chip=tpu-v7x", "launch.topology=2x2x2", "launch.nodes=2", "layout.fsdp=16"),
        "launch.node_selector={cloud.google.com/placement-policy-name: rack}",
    ),
    "EFA": (
        *("hardware=cuda", "hardware.devices=8", "launch.nodes=2", "layout.fsdp=16", "launch.network=efa"),
        *("launch.network_devices=32", "launch.instance_type=p5.48xlarge", "launch.claim=runs"),
        *("launch.secrets=[store]", "launch.service_account=trainer", "launch.keep_seconds=3600"),
    ),
    "InfiniBand": (
        *("hardware=cuda", "hardware.devices=8", "hardware.chip=h100-sxm", "launch.nodes=2", "layout.fsdp=16"),
        *("launch.network=infiniband", "launch.network_devices=1", "launch.priority_class=high"),
        "launch.tolerations=[{key: dedicated, operator: Equal, value: training, effect: NoSchedule}]",
    ),
    "GKE with RDMA": (
        *("hardware=cuda", "hardware.devices=8", "launch.nodes=2", "layout.fsdp=16", "launch.network=gke-rdma"),
        *("launch.network_devices=8", "launch.required_topology=cloud.google.com/gce-topology-block"),
    ),
    "GB200 rack": (
        *("hardware=cuda", "hardware.devices=4", "hardware.chip=gb200", "launch.nodes=18", "layout.fsdp=72"),
        "launch.compute_domain=true",
    ),
    "AMD": ("hardware=rocm", "hardware.devices=8", "hardware.chip=mi300x", "launch.nodes=2", "layout.fsdp=16"),
    "Trainium": (
        *("hardware=trainium", "hardware.devices=64", "launch.nodes=2", "layout.fsdp=128"),
        *("launch.network=efa", "launch.network_devices=16", "launch.instance_type=trn2.48xlarge"),
    ),
    "CPU": (
        "hardware=cpu",
        "hardware.devices=4",
        "layout.fsdp=8",
        "launch.nodes=2",
        'launch.cpu="4"',
        "launch.memory=8Gi",
    ),
}


def _render(*words: str):
    job = job_of(*BASE, *words)
    return job, KubernetesEngine().render(job)


def _objects(*words: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(_render(*words)[1].files[MANIFEST]))


def _inner(jobset: dict[str, Any]) -> dict[str, Any]:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


@pytest.mark.parametrize("fleet", FLEETS)
def test_the_manifest_of_every_fleet_is_right(fleet):
    job, rendered = _render(*FLEETS[fleet])
    assert KubernetesEngine().problems(job, rendered) == []
    jobset = list(yaml.safe_load_all(rendered.files[MANIFEST]))[-1]
    (group,) = jobset["spec"]["replicatedJobs"]
    assert group["replicas"] * group["template"]["spec"]["completions"] == job.nodes


def test_what_a_pod_asks_for_is_what_the_fleet_has():
    asked = {}
    for fleet in FLEETS:
        pod = _inner(_objects(*FLEETS[fleet])[-1])["template"]["spec"]
        resources = pod["containers"][0]["resources"]
        assert resources["limits"] == resources["requests"]
        asked[fleet] = {name: value for name, value in resources["limits"].items() if "/" in name}
    assert asked == {
        "v5e": {"google.com/tpu": "4"},
        "v5e, one host": {"google.com/tpu": "8"},
        "v5p": {"google.com/tpu": "4"},
        "v6e, two slices": {"google.com/tpu": "4"},
        "7x": {"google.com/tpu": "4"},
        "EFA": {"nvidia.com/gpu": "8", "vpc.amazonaws.com/efa": "32"},
        "InfiniBand": {"nvidia.com/gpu": "8", "rdma/ib": "1"},
        "GKE with RDMA": {"nvidia.com/gpu": "8"},
        "GB200 rack": {"nvidia.com/gpu": "4"},
        "AMD": {"amd.com/gpu": "8"},
        "Trainium": {"aws.amazon.com/neuron": "16", "vpc.amazonaws.com/efa": "16"},
        "CPU": {},
    }


def test_a_container_is_root_where_its_devices_or_capabilities_need_it():
    def user(*words: str) -> int | None:
        container = _inner(_objects(*words)[-1])["template"]["spec"]["containers"][0]
        found: int | None = container["securityContext"].get("runAsUser")
        return found

    tpus = {"v5e", "v5e, one host", "v5p", "v6e, two slices", "7x"}
    assert {name for name, words in FLEETS.items() if user(*words) == 0} == tpus | {"InfiniBand", "GKE with RDMA"}
    assert user(*FLEETS["CPU"], "launch.privileged=true") == 0


def test_words_reach_the_container_as_they_are():
    """Kubernetes replaces $(NAME); YAML reads 1e3, on and 0777 as it likes."""
    word = 'train.sample.prompt="a $(HOSTNAME) $$ \\"q\\" \'x\'; rm -rf / #"'
    (jobset,) = _objects(*FLEETS["CPU"], word)
    container = _inner(jobset)["template"]["spec"]["containers"][0]
    assert container["command"][0] == "python"
    assert word.replace("$", "$$") in container["command"]
    values = [
        "1e3",
        "on",
        "No",
        "0777",
        "~",
        "",
        "1_000",
        ".inf",
        "0x1F",
        "12:30:45",
        " x",
        "a: b",
        "- a",
        "é\n",
        "=",
        "<<",
    ]
    text = dump_yaml({"values": values})
    assert yaml.safe_load(text) == {"values": values}
    assert all(line.startswith('- "') for line in text.splitlines()[1:] if line != "- |-"), text


def test_the_queue_holds_the_job_and_no_secret_is_in_the_file(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
    (jobset,) = _objects(*FLEETS["v6e, two slices"])
    assert jobset["spec"]["suspend"] is True
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    _, rendered = _render(*FLEETS["EFA"])
    assert "the-secret" not in rendered.files[MANIFEST]
    assert "secretRef:" in rendered.files[MANIFEST]


WRONG = {  # values of the configuration -> what is said
    "no image": ({"launch.image": None}, "a pod needs an image"),
    "hardware left open": ({"hardware.devices": "auto", "launch.nodes": 1}, "how many devices of a host a pod gets"),
    "unknown chip": ({"hardware.chip": "h1000"}, "no such chip in the catalogue"),
    "another vendor's chip": ({"hardware.chip": "mi300x"}, "none of hardware.target's"),
    "more than a host has": ({"hardware.chip": "gb200"}, "not so many devices of gb200"),
    "nothing stays": ({"checkpoint.dir": "auto"}, "gone with it"),
    "runs beside the claim": ({"launch.claim": "runs", "runs_dir": "/home/me"}, "runs_dir is not on the claim"),
    "slices of GPUs": ({"launch.topology": "4x4"}, "only TPUs come in slices"),
    "a network without devices": ({"launch.network": "efa"}, "how many network devices"),
    "devices without a network": ({"launch.network_devices": 8}, "which network the devices are of"),
    "a rack of single hosts": ({"launch.compute_domain": True}, "share memory over NVLink"),
    "no folder": ({"launch.work_dir": "work"}, "no folder of a container"),
}
WRONG_TPU = {
    "no TPU of that kind": ({"hardware.chip": "auto"}, "say which TPU"),
    "no such topology": ({"launch.topology": "3x5"}, "no such topology"),
    "a topology of another kind": ({"launch.topology": "2x2x2"}, "no such topology"),
    "too few hosts": ({"launch.nodes": 1}, "16 chips a slice are not hosts × chips of a host"),
    "hosts of no whole slices": ({"launch.slices": 3}, "are not hosts × chips"),
    "a part of a host": ({"hardware.devices": 2}, "all devices of a TPU host"),
    "EFA": ({"launch.network": "efa", "launch.network_devices": 4}, "no such network"),
}
WRONG_TRAINIUM = {"a part of a chip": ({"hardware.devices": 30}, "not whole chips")}
_BY_FLEET = {"EFA": WRONG, "v6e, two slices": WRONG_TPU, "Trainium": WRONG_TRAINIUM}
_PLAIN = {  # of the fleets, so that nothing else is wrong
    "EFA": {"launch.network": "none", "launch.network_devices": None, "launch.claim": None},
    "v6e, two slices": {"launch.slices": 1, "launch.nodes": 4},
}


@pytest.mark.parametrize(("fleet", "case"), [(fleet, case) for fleet, cases in _BY_FLEET.items() for case in cases])
def test_what_cannot_be_asked_for_is_refused_in_a_sentence(fleet, case):
    changes, said = _BY_FLEET[fleet][case]
    job = changed(job_of(*BASE, *FLEETS[fleet]), {**_PLAIN.get(fleet, {}), **changes})
    with pytest.raises(ConfigErrors) as error:
        KubernetesEngine().render(job)
    assert len(error.value.problems) == 1, error.value
    assert said in error.value.problems[0].what


def _set(path: str, value: Any):
    def change(jobset: dict[str, Any]) -> None:
        *parents, last = (part.replace("~", "/") for part in path.split("/"))
        node: Any = jobset
        for key in parents:
            node = node[int(key) if isinstance(node, list) else key]
        if value is ...:
            del node[last]
        else:
            node[int(last) if isinstance(node, list) else last] = value

    return change


_GROUP = "spec/replicatedJobs/0"
_JOB = f"{_GROUP}/template/spec"
_POD = f"{_JOB}/template/spec"
EDITED = {
    "a typo": (_set(f"{_POD}/nodeSelectors", {}), "nodeSelectors"),
    "a typo of the JobSet": (_set("spec/failurePolicies", {}), "failurePolicies"),
    "a wrong type": (_set(f"{_JOB}/parallelism", "four"), "parallelism"),
    "an action that is none": (_set("spec/failurePolicy/rules/0/action", "Fail"), "is not one of"),
    "a rule without a name": (_set("spec/failurePolicy/rules/0/name", ...), '"name" is a required property'),
    "another version": (_set("apiVersion", "jobset.x-k8s.io/v1"), "apiVersion"),
    "another kind": (_set("kind", "PyTorchJob"), "no schema here"),
    "a name in capitals": (_set("metadata/name", "Tiny"), "no DNS label"),
    "a name too long": (_set("metadata/name", "a" * 60), "too long"),
    "a label too long": (_set("metadata/labels", {"team": "x" * 64}), "no value of a label"),
    "a rule twice": (_set("spec/failurePolicy/rules/1/name", "mistake"), "named 2 times"),
    "a reason that is none": (_set("spec/failurePolicy/rules/1/onJobFailureReasons", ["OOM"]), "no reason of a Job"),
    "a coordinator beyond": (_set("spec/coordinator/podIndex", 9), "podIndex"),
    "a coordinator elsewhere": (_set("spec/coordinator/replicatedJob", "main"), "not there"),
    "not indexed": (_set(f"{_JOB}/completionMode", "Index"), "must be Indexed"),
    "fewer completions": (_set(f"{_JOB}/completions", 3), "completions must be parallelism"),
    "no pods": (_set(f"{_GROUP}/replicas", 0), "has no pods"),
    "too many pods": (_set(f"{_GROUP}/replicas", 2_000_000_000), "more than 2147483647"),
    "always restarted": (_set(f"{_POD}/restartPolicy", "Always"), "Never or OnFailure"),
    "restarted on failure": (_set(f"{_POD}/restartPolicy", "OnFailure"), "must be Never"),
    "codes in disorder": (_set(f"{_JOB}/podFailurePolicy/rules/0/onExitCodes/values", [3, 2]), "ascending"),
    "a policy's action": (_set(f"{_JOB}/podFailurePolicy/rules/0/action", "Fail"), "FailJob"),
    "requests below limits": (
        _set(f"{_POD}/containers/0/resources/requests", {"google.com/tpu": "2"}),
        "must be equal",
    ),
    "half a chip": (_set(f"{_POD}/containers/0/resources", {"limits": {"google.com/tpu": "0.5"}}), "whole numbers"),
    "a resource that is none": (_set(f"{_POD}/containers/0/resources", {"limits": {"tpu": "4"}}), "no such resource"),
    "fewer chips": (
        _set(f"{_POD}/containers/0/resources", {"limits": {"google.com/tpu": "2"}}),
        "is not the topology 4x4",
    ),
    "fewer hosts": (lambda one: [_set(f"{_JOB}/{key}", 2)(one) for key in ("parallelism", "completions")], "2 x 4"),
    "an unknown accelerator": (
        _set(f"{_POD}/nodeSelector/cloud.google.com~gke-tpu-accelerator", "tpu-v9"),
        "no TPU of GKE",
    ),
    "a volume that is not there": (_set(f"{_POD}/volumes", []), "does not have"),
    "a container twice": (lambda one: _twin(one), "a container is named 2 times"),
    "a variable twice": (_set(f"{_POD}/containers/0/env", [{"name": "A", "value": "1"}] * 2), "a variable is named"),
    "no image": (_set(f"{_POD}/containers/0/image", "My Image"), "no reference"),
    "no time to save": (_set(f"{_POD}/terminationGracePeriodSeconds", 0), "no time to save"),
    "a template that is not there": (
        _set(f"{_POD}/resourceClaims", [{"name": "a", "resourceClaimTemplateName": "b"}]),
        "no ComputeDomain",
    ),
}  # fmt: skip


def _twin(jobset: dict[str, Any]) -> None:
    containers = _inner(jobset)["template"]["spec"]["containers"]
    containers.append(copy.deepcopy(containers[0]))


@pytest.fixture(scope="module")
def right():
    job, rendered = _render(*FLEETS["v6e, two slices"])
    return job, rendered, yaml.safe_load(rendered.files[MANIFEST])


@pytest.mark.parametrize("case", EDITED)
def test_an_edited_manifest_is_looked_at_again(right, case):
    job, rendered, jobset = right
    change, said = EDITED[case]
    edited = copy.deepcopy(jobset)
    change(edited)
    problems = KubernetesEngine().problems(job, type(rendered)({MANIFEST: dump_yaml(edited)}, rendered.submit))
    assert problems, case
    assert said in "\n".join(map(str, problems)), problems


def test_what_is_no_manifest_is_said(right):
    job, rendered, _ = right
    for text, said in (
        ("a: [", "no YAML"),
        ("", "no objects"),
        ("- 1", "no objects"),
        ("!!python/object:x {}", "no YAML"),
    ):
        (problem,) = KubernetesEngine().problems(job, type(rendered)({MANIFEST: text}, ()))
        assert said in problem.what


def test_every_topology_of_gke_is_hosts_times_chips():
    for name, kind in TPU_KINDS.items():
        shapes = ["1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"]
        if kind.dims == 3:
            shapes = ["2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "8x8x8", "8x8x12"]
        for shape in shapes:
            sides = [int(side) for side in shape.split("x")]
            chips = 1
            for side in sides:
                chips *= side
            found = kind.hosts(shape)
            assert found, (name, shape)
            assert all(hosts * each == chips for hosts, each in found.items())
        for wrong in ("0x4", "4", "3x3", "4x4x6", "8x4x4", "4x4x4x4", "x", "99x99", "16x16x64", "04x4"):
            assert kind.hosts(wrong) == {}, (name, wrong)


def test_schemas_name_their_source():
    assert known_kinds() == ["ClusterQueue", "ComputeDomain", "JobSet", "LocalQueue", "ResourceFlavor", "Topology"]
    queue = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "LocalQueue", "metadata": {"name": "team"}}
    assert schema_problems({**queue, "spec": {"clusterQueue": "all"}}) == []
    assert schema_problems({**queue, "spec": {"clusterQueues": "all"}})
    assert schema_problems({**queue, "spec": {"clusterQueue": "All"}})


def _jobset_answer(*conditions: str, restarts: int = 0) -> dict[str, Any]:
    true = [{"type": name, "status": "True", "message": f"it is {name}"} for name in conditions]
    return {"metadata": {"name": "tiny-job"}, "status": {"conditions": true, "restarts": restarts}}


def _pods_answer(*phases: str) -> dict[str, Any]:
    return {
        "items": [
            {"spec": {"nodeName": f"node-{number}"}, "status": {"phase": phase}} for number, phase in enumerate(phases)
        ]
    }


def test_kubectl_submits_asks_and_deletes(tmp_path, monkeypatch):
    client = FakeClient("kubectl", tmp_path, monkeypatch)
    engine, job = engine_of("kubernetes"), job_of(*BASE, *FLEETS["CPU"], "launch.namespace=team")
    rendered = engine.render(job)
    client.answer("jobset.jobset.x-k8s.io/tiny-job\n")
    assert engine.submit(job, rendered) == "team/tiny-job"
    assert client.calls[-1].startswith("create --validate=strict --output=name --filename ")
    found = submission("kubernetes", "team/tiny-job", tmp_path, nodes=2)

    def state(*answers: Any) -> tuple[str, str, tuple[str, ...]]:
        client.answer(*answers)
        status = engine.status(found)
        return status.state, status.said, status.hosts

    assert state(_jobset_answer("Suspended")) == ("waiting", "suspended, in its queue", ())
    assert state(_jobset_answer(), {"items": []}) == ("waiting", "no pods yet", ())
    running = state(_jobset_answer(restarts=2), _pods_answer("Running", "Pending"))
    assert running == ("running", "1 pods Pending, 1 pods Running, started again 2 times", ("node-0", "node-1"))
    assert client.calls[-1] == (
        "--namespace team get pods --selector jobset.sigs.k8s.io/jobset-name=tiny-job --output=json"
    )
    assert state(_jobset_answer("Completed")) == ("finished", "it is Completed", ())
    assert state(_jobset_answer("Failed")) == ("failed", "it is Failed", ())
    assert state("")[0] == "unknown"
    engine.cancel(found)
    assert client.calls[-1] == "--namespace team delete jobset tiny-job --wait=false"
    client.answer("error: the server has asked for the client to provide credentials", code=1)
    with pytest.raises(LaunchError, match="credentials"):
        engine.status(found)
    client.answer("not JSON")
    with pytest.raises(LaunchError, match="no JSON"):
        engine.status(found)


def test_the_lines_of_every_attempt_are_shown_once(tmp_path, monkeypatch):
    client = FakeClient("kubectl", tmp_path, monkeypatch)
    found = submission("kubernetes", "team/tiny-job", tmp_path, nodes=2)
    client.answer(
        *(_jobset_answer(), _pods_answer("Running"), "[pod/a] step 1\n"),
        *(_jobset_answer(restarts=1), _pods_answer("Running"), "[pod/b] step 2\n"),
        *(_jobset_answer("Completed", restarts=1), _pods_answer("Succeeded")),
    )
    assert list(engine_of("kubernetes").lines(found, follow=True)) == ["[pod/a] step 1", "[pod/b] step 2"]
    logs = [call for call in client.calls if " logs " in call]
    assert [f"restart-attempt={number}" in call for number, call in enumerate(logs)] == [True, True]
    assert "--follow" in logs[0]


def test_without_kubectl_it_is_said_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="install kubectl"):
        engine_of("kubernetes").status(submission("kubernetes", "a/b", tmp_path))


@pytest.mark.skipif(not ENGINES_INSTALLED, reason="scripts/setup engines makes the environment with the schemas")
def test_the_job_within_passes_the_strict_schema_of_kubernetes(tmp_path):
    """That of the core kinds, as a project of others keeps it; here it is part of the JobSet's."""
    for number, fleet in enumerate(FLEETS):
        jobset = _objects(*FLEETS[fleet])[-1]
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": jobset["metadata"]["name"]}}
        (tmp_path / f"{number:02}.yaml").write_text(dump_yaml({**job, "spec": _inner(jobset)}))
    wrong = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, "spec": {"templates": {}}}
    (tmp_path / "wrong.yaml").write_text(dump_yaml(wrong))
    words = [ENGINES_PYTHON, "-m", "kubernetes_validate", "--strict", "--kubernetes-version", "1.37"]
    done = subprocess.run([*words, *sorted(tmp_path.glob("*.yaml"))], capture_output=True, text=True, timeout=120)
    assert (done.stdout + done.stderr).count(" passed for ") == len(FLEETS), done.stdout + done.stderr
    assert "ERROR" in done.stdout + done.stderr
