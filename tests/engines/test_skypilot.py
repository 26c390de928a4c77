"""Tasks of SkyPilot: over several vendors, quoted, and looked at where SkyPilot's own loader looks away."""

from __future__ import annotations

import json
import subprocess
import textwrap
from typing import Any

import pytest
import yaml

from orchestrator.distributed.job_host import job_host
from orchestrator.engines.engine_table import engine_of
from orchestrator.engines.skypilot_engine import TASK, SkypilotEngine
from orchestrator.engines.yaml_text import dump_yaml
from orchestrator.errors import ConfigErrors, LaunchError
from tests.lab.engine_jobs import ENGINES_INSTALLED, ENGINES_PYTHON, FakeClient, changed, job_of, submission

VENDORS = ("gcp/tpu-v6e-8:spot", "H100:8:spot", "aws/us-east-1/Trainium2:16")
WORDS = (
    *("launch=skypilot", "layout=auto", "checkpoint.dir=s3://bucket/runs", "launch.neuron_index=https://index.example"),
    f"launch.candidates=[{','.join(VENDORS)}]",
)


def _task(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(SkypilotEngine().render(job_of(*WORDS, *words)).files[TASK])
    return found


def test_the_candidates_are_tried_in_their_order_each_with_its_own_terms():
    entries = _task()["resources"]["ordered"]
    assert [(one.get("infra"), one["accelerators"], one["use_spot"]) for one in entries] == [
        ("gcp", "tpu-v6e-8", True),
        (None, "H100:8", True),
        ("aws/us-east-1", "Trainium2:16", False),
    ]
    assert entries[0]["accelerator_args"] == {"runtime_version": "v2-alpha-tpuv6e"}
    assert {json.dumps(one["job_recovery"]) for one in entries} == {
        '{"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": 3, "recover_on_exit_codes": [130, 143]}'
    }
    assert list(_task("launch.choose=cheapest")["resources"]) == ["any_of"]


def test_the_run_block_says_which_host_it_is_and_takes_the_words_as_they_are(tmp_path):
    """The block is run by a shell with a stand-in for Python that prints what reached it."""
    word = 'train.sample.prompt="it\'s $HOME `id` $(id) \\\\ ; exit 7"'
    run = _task(word, "launch.image=reg/lm:1")["run"]
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nenv -0; printf "%s\\0" "$@"\n')
    python.chmod(0o755)
    sky = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.7"}
    done = subprocess.run(
        ["bash", "-c", run], env={**sky, "PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split("\0")
    assert word in printed
    host = job_host(dict(entry.split("=", 1) for entry in printed if "=" in entry))
    assert (host.number, host.count, host.store) == (1, 2, "tcp:10.0.0.4:29500")


def test_setup_is_a_script_that_a_shell_can_read(tmp_path):
    """Only for its syntax: what it installs is on machines of the vendors."""
    setup = _task("launch.package=./lm")["setup"]
    assert "package=./lm neuron_index=https://index.example" in setup
    assert subprocess.run(["bash", "-n", "-c", setup], capture_output=True).returncode == 0
    assert "setup" not in _task("launch.image=reg/lm:1")


def test_secrets_are_named_and_not_told(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
    rendered = SkypilotEngine().render(job_of(*WORDS, "launch.secrets=[AWS_SECRET_ACCESS_KEY]"))
    assert "the-secret" not in rendered.files[TASK]
    assert yaml.safe_load(rendered.files[TASK])["secrets"] == {"AWS_SECRET_ACCESS_KEY": None}
    assert rendered.submit[-3:-1] == ("--secret", "AWS_SECRET_ACCESS_KEY")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no candidates": ({"launch.candidates": ()}, "on which accelerators"),
    "an unknown one": ({"launch.candidates": ("H1000:8",)}, "no such accelerator"),
    "another spelling": ({"launch.candidates": ("h100:8",)}, "no such accelerator"),
    "an unknown TPU": ({"launch.candidates": ("tpu-v9-8",)}, "no such TPU"),
    "a TPU of no size": ({"launch.candidates": ("tpu-v6e-12",)}, "no such size"),
    "TPUs by number": ({"launch.candidates": ("tpu-v6e-8:2",)}, "one slice"),
    "a TPU of Amazon": ({"launch.candidates": ("aws/tpu-v6e-8",)}, "Google's"),
    "an unknown cloud": ({"launch.candidates": ("gpc/H100:8",)}, "no such cloud"),
    "half a GPU": ({"launch.candidates": ("H100:0.5",)}, "a candidate is"),
    "no software": ({"launch.candidates": ("tpu-v7x-8",)}, "is not known here"),
    "several slices": ({"launch.nodes": 2}, "one slice of TPUs"),
    "no object store": ({"checkpoint.dir": "auto"}, "only what is in an object store"),
    "other hardware": ({"hardware.target": "cuda"}, "not every candidate"),
    "a fixed layout": (
        {f"layout.{axis}": 1 for axis in ("replicate", "pipeline", "fsdp", "expert", "context", "tensor")},
        "a layout without auto",
    ),
    "no index": ({"launch.neuron_index": None}, "AWS's package index"),
    "AMD without an image": ({"launch.candidates": ("MI300X:8",)}, "no torch for AMD"),
    "a package that is a command": ({"launch.package": "x; rm -rf /"}, "no requirement of pip"),
    "a secret that is no name": ({"launch.secrets": ("A B",)}, "none of a variable"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_skypilot_would_take_and_not_run_is_refused(case):
    changes, said = WRONG[case]
    with pytest.raises(ConfigErrors) as error:
        SkypilotEngine().render(changed(job_of(*WORDS), changes))
    assert len(error.value.problems) == 1, error.value
    assert said in error.value.problems[0].what


EDITED: dict[str, tuple[Any, str]] = {
    "a typo of the recovery": (
        lambda one: one["job_recovery"].update(max_restart_on_errors=3),
        "max_restart_on_errors",
    ),
    "a strategy that is none": (lambda one: one["job_recovery"].update(strategy="EAGER"), "is not one of"),
    "a code that is none": (lambda one: one["job_recovery"].update(recover_on_exit_codes=[0]), "minimum of 1"),
    "an unknown key": (lambda one: one.update(accelerator="H100"), "accelerator"),
    "an unknown accelerator": (lambda one: one.update(accelerators="H1000:8", infra="gcp"), "no such accelerator"),
}


@pytest.mark.parametrize("case", EDITED)
def test_an_edited_task_is_looked_at_again(case):
    change, said = EDITED[case]
    job, edited = job_of(*WORDS), _task()
    rendered = SkypilotEngine().render(job)
    assert SkypilotEngine().problems(job, rendered) == []
    change(edited["resources"]["ordered"][0])
    problems = SkypilotEngine().problems(job, type(rendered)({TASK: dump_yaml(edited)}, ()))
    assert said in "\n".join(map(str, problems))


def test_hardware_of_another_machine_is_found_there():
    job = job_of(*WORDS)
    assert (job.config.hardware.target, job.devices_per_node, job.processes_per_node) == ("auto", None, 1)


def test_sky_submits_asks_and_cancels(tmp_path, monkeypatch):
    client = FakeClient("sky", tmp_path, monkeypatch)
    engine, job = engine_of("skypilot"), job_of(*WORDS)
    assert engine.submit(job, engine.render(job)) == "tiny-job"
    assert client.calls[-1].startswith("jobs launch --yes --detach-run --name tiny-job /")
    found = submission("skypilot", "tiny-job", tmp_path)
    record = {"job_name": "tiny-job", "job_id": 7, "status": "RUNNING", "recovery_count": 1, "infra": "gcp/us-east5"}
    client.answer(
        [{**record, "job_id": 3, "status": "SUCCEEDED"}, record, {**record, "job_name": "other", "job_id": 9}]
    )
    status = engine.status(found)
    assert (status.state, status.said) == ("running", "RUNNING, on gcp/us-east5, recovered 1 times")
    assert client.calls[-1] == "jobs queue --all --output json"
    for word, state in (("SUCCEEDED", "finished"), ("FAILED_NO_RESOURCE", "failed"), ("RECOVERING", "waiting")):
        client.answer([{**record, "status": word}])
        assert engine.status(found).state == state
    client.answer([])
    assert engine.status(found).state == "unknown"
    client.answer("no list")
    with pytest.raises(LaunchError, match="no list of jobs"):
        engine.status(found)
    client.answer("a line\nanother\n")
    assert list(engine.lines(found, follow=True)) == ["a line", "another"]
    engine.cancel(found)
    assert client.calls[-2:] == ["jobs logs --name tiny-job --follow", "jobs cancel --yes --name tiny-job"]


@pytest.mark.skipif(not ENGINES_INSTALLED, reason="scripts/setup engines makes the environment with SkyPilot")
def test_skypilots_own_library_loads_the_tasks(tmp_path):
    """Offline: what its loader checks, and the status and strategies that it knows."""
    cases = [(), ("launch.choose=cheapest", "launch.secrets=[TOKEN]"), ("launch.image=reg/lm:1", "launch.disk_gb=512")]
    for number, words in enumerate(cases):
        (tmp_path / f"{number}.yaml").write_text(SkypilotEngine().render(job_of(*WORDS, *words)).files[TASK])
    script = textwrap.dedent("""
        import json, pathlib, sys
        import sky
        from sky.jobs import recovery_strategy
        from sky.jobs.state import ManagedJobStatus
        from sky.utils import registry
        found = []
        for path in sorted(pathlib.Path(sys.argv[1]).glob("*.yaml")):
            task = sky.Task.from_yaml(str(path))
            found.append([[dict(one.accelerators), one.use_spot] for one in task.resources])
        strategies = sorted(registry.JOBS_RECOVERY_STRATEGY_REGISTRY)
        print("FOUND" + json.dumps([found, strategies, [one.value for one in ManagedJobStatus]]))
    """)
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    command = [ENGINES_PYTHON, "-c", script, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert "FOUND" in done.stdout, done.stderr[-2000:]
    tasks, strategies, states = json.loads(done.stdout.partition("FOUND")[2])
    wanted = [[{"tpu-v6e-8": 1}, True], [{"H100": 8}, True], [{"Trainium2": 16}, False]]
    assert all(sorted(found, key=str) == sorted(wanted, key=str) for found in tasks)
    assert [name.upper() for name in strategies] == ["EAGER_NEXT_REGION", "FAILOVER"]
    from orchestrator.engines import skypilot_engine

    unknown = [state for state in states if state not in skypilot_engine._STATES and not state.startswith("FAILED")]
    assert unknown == []
