"""ssh and torchrun: with a stand-in for ssh that runs the host's shell here, and slowly with a real sshd."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.config.compose import compose
from orchestrator.engines.engine_job import engine_job
from orchestrator.engines.engine_table import engine_of
from orchestrator.engines.submission import find_submission
from tests.lab.run_server import ROOT
from tests.lab.runs import TINY, small_overrides
from tests.lab.slow import slow

# What ssh does with its last word, on the way that a real one takes: as text for the shell of the other side.
FAKE_SSH = """#!/bin/sh
for last; do :; done
exec sh -c "$last"
"""
FAKE_PYTHON = """#!/bin/sh
for word; do printf '%s\\n' "$word"; done >{folder}/words.$$
echo "NASTY=$NASTY"
trap 'echo asked to stop; exit 143' TERM
while [ ! -e {folder}/done ]; do sleep 0.05; done
"""
NASTY = 'a\'b "c" $(touch {0}/hacked) `touch {0}/hacked`; touch {0}/hacked'


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    """A folder with an `ssh` that stays here, and a Python that only waits."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("ssh", FAKE_SSH), ("python", FAKE_PYTHON.format(folder=tmp_path))):
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return [
        *("engine=ssh", "launch.hosts=[a,me@b]", "launch.nodes=2", "hardware=cpu", "layout.fsdp=2", "run_id=one"),
        f"launch.python={programs / 'python'}",
    ]


def wait_for(text: str) -> None:
    """Wait until the engine says so of the run."""
    engine, found = engine_of("ssh"), find_submission("one", "runs")
    deadline = time.monotonic() + 20
    while text not in (said := engine.status(found).said):
        assert time.monotonic() < deadline, said
        time.sleep(0.05)


def test_an_agent_on_each_host_that_is_followed_and_cancelled(hosts, tmp_path, capsys):
    nasty = NASTY.format(tmp_path)
    prompt = nasty.replace("'", "\\'")
    assert main(["launch", *hosts, f"train.sample.prompt='{prompt}'", f"launch.environment={{NASTY: '{prompt}'}}"]) == 0
    wait_for("a: running, me@b: running")
    deadline = time.monotonic() + 20
    while len(found := list(tmp_path.glob("words.*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    words = [path.read_text() for path in found]
    assert all(f"train.sample.prompt='{prompt}'\n" in text for text in words)
    assert all("--rdzv-endpoint=a:29500\n" in text and "--nnodes=2\n" in text for text in words)
    assert sorted("is_host=1" in text for text in words) == [False, True]
    capsys.readouterr()
    assert main(["launch", "cancel", "one"]) == 0
    assert main(["launch", "status", "one"]) == 0
    assert "cancelled (a: exit code 143, me@b: exit code 143)" in capsys.readouterr().out
    assert main(["launch", "logs", "one"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"a: NASTY={nasty}" in lines
    assert "me@b: asked to stop" in lines
    assert not (tmp_path / "hacked").exists()


def test_the_end_of_a_job_is_seen(hosts, tmp_path, capsys):
    (tmp_path / "done").touch()
    assert main(["launch", *hosts]) == 0
    wait_for("a: exit code 0, me@b: exit code 0")
    assert main(["launch", "list"]) == 0
    assert "finished  runs/tiny/one" in capsys.readouterr().out


def test_a_host_that_cannot_be_reached_ends_what_was_started_on_the_others(hosts, tmp_path, capsys):
    (tmp_path / "programs" / "ssh").write_text(
        FAKE_SSH.replace("exec", 'case "$*" in *" me@b "*) echo "no route to host" >&2; exit 255 ;; esac\nexec')
    )
    assert main(["launch", *hosts]) == 2
    assert "'ssh' refuses (exit code 255): no route to host" in capsys.readouterr().err
    deadline = time.monotonic() + 20
    while subprocess.run(["pgrep", "--full", f"{tmp_path}/programs/python"], capture_output=True).returncode == 0:
        assert time.monotonic() < deadline, "the first host goes on alone"
        time.sleep(0.05)


def test_without_a_client_it_is_said_how_to_get_one(hosts, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", *hosts]) == 2
    said = capsys.readouterr().err
    assert "the client 'ssh' is not on this machine" in said
    assert "dry_run=true" in said


@pytest.mark.parametrize(
    ("engine", "keys", "said"),
    [
        ("ssh", {}, "no host is named"),
        ("ssh", {"hosts": ("a", "b")}, "the number of hosts is not that of the nodes"),
        ("ssh", {"hosts": ("-oProxyCommand=x",)}, "no name of a host"),
        ("ssh", {"hosts": ("a;b",)}, "no name of a host"),
        ("ssh", {"hosts": ("a", "a"), "nodes": 2}, "a host is named twice"),
        ("ssh", {"hosts": ("a",), "port": 0}, "'launch.port' is out of range"),
        ("ssh", {"hosts": ("a",), "directory": "work"}, "'launch.directory' is a folder of other machines"),
        ("ssh", {"hosts": ("a",), "min_nodes": 2}, "'launch.min_nodes' is out of range"),
        ("torchrun", {"nodes": 2, "endpoint": "a:29500"}, "the hosts have to call the run by one name"),
        ("torchrun", {"endpoint": "a"}, "'launch.endpoint' is no HOST:PORT"),
        ("torchrun", {"endpoint": "a:99999"}, "'launch.endpoint' is no HOST:PORT"),
        ("torchrun", {"environment": {"A=B": "c"}}, "none of a variable"),
    ],
)
def test_what_cannot_work_is_found_before(tmp_path, engine, keys, said):
    config = compose([f"launch={engine}", "hardware=cpu", f"runs_dir={tmp_path}"]).config
    job = engine_job(replace(config, launch=replace(config.launch, **keys)), "one", [])
    found = [str(problem) for problem in engine_of(engine).problems(job, engine_of(engine).render(job))]
    assert len(found) == 1, found
    assert said in found[0]


@pytest.fixture
def sshd(tmp_path):
    """A real sshd on this machine, and the file by which ssh reaches it under two names."""
    server = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if server is None or os.geteuid() != 0:
        pytest.skip("no sshd that could be started here (Debian: apt-get install openssh-server)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("key", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # it insists
    server_lines = [f"Port {port}", "ListenAddress 127.0.0.1", f"HostKey {tmp_path}/host", "UsePAM no"]
    server_lines += [f"AuthorizedKeysFile {tmp_path}/key.pub", "StrictModes no", "PasswordAuthentication no"]
    (tmp_path / "sshd_config").write_text("\n".join([*server_lines, "PermitRootLogin yes", "PidFile none", ""]))
    client = ["Host host-a host-b", "HostName 127.0.0.1", f"Port {port}", f"IdentityFile {tmp_path}/key"]
    client += ["IdentitiesOnly yes", "UserKnownHostsFile /dev/null", "StrictHostKeyChecking no", "LogLevel ERROR"]
    (tmp_path / "ssh_config").write_text("\n".join([*client, ""]))
    process = subprocess.Popen([server, "-D", "-f", tmp_path / "sshd_config", "-E", tmp_path / "sshd.log"])
    yield tmp_path / "ssh_config"
    process.kill()
    process.wait()


@slow
def test_a_run_on_two_hosts_by_a_real_sshd_is_cancelled_and_goes_on(sshd, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    steps = ("train.max_steps=40", "checkpoint.every_steps=1000", "train.sample.tokens=0", "layout.fsdp=2")
    pace = "callbacks=[{_target_: tests.engines.pace.Paced, seconds: 0.5}]"
    words = ["engine=ssh", "launch.hosts=[host-a,host-b]", "launch.nodes=2", "launch.address=localhost", "run_id=one"]
    words += [f"launch.port={port}", f"launch.ssh_config={sshd}", *small_overrides(tmp_path, *TINY, *steps, pace)]
    assert main(["launch", *words]) == 0
    run_dir = tmp_path / "runs" / "tiny" / "one"
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() or (run_dir / "metrics.jsonl").read_text().count("\n") < 3:
        assert time.monotonic() < deadline, (run_dir / "launch" / "host-0.log").read_text()
        time.sleep(0.2)
    assert main(["launch", "cancel", "one"]) == 0
    saved = list(run_dir.glob("checkpoints/*/manifest.json"))
    assert len(saved) == 1, "it was asked to save first"
    assert main(["launch", *[word.replace("0.5", "0") for word in words]]) == 0
    assert main(["launch", "logs", "one", "follow"]) == 0
    assert f"goes on from {saved[0].parent.name}" in capfd.readouterr().out
    wait_for("host-a: exit code 0, host-b: exit code 0")


@slow
def test_torchrun_starts_a_killed_process_again(tmp_path):
    steps = ("train.max_steps=20", "checkpoint.every_steps=5", "train.sample.tokens=0", "layout.fsdp=2")
    pace = "callbacks=[{_target_: tests.engines.pace.Paced, seconds: 0.3}]"
    words = small_overrides(tmp_path, *TINY, *steps, pace, "hardware.devices=2", "run_id=one")
    command = [sys.executable, "-m", "orchestrator", "launch", "engine=torchrun", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run_dir = tmp_path / "runs" / "tiny" / "one"
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        with contextlib.suppress(ProcessLookupError):
            deadline = time.monotonic() + 120
            while not (run_dir / "checkpoints" / "step-00000005" / "manifest.json").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(found[-1]), signal.SIGKILL)
        assert process.wait(120) == 0
        assert process.stdout is not None
        assert "goes on from step-" in process.stdout.read()
