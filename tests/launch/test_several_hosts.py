"""A host of a job starts the processes of its devices by the command line that every host has."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess

import pytest

from tests.lab.cli import command, run, wait_until
from tests.lab.runs import losses, read_rows, small_overrides


def _start(hosts: int, words: list[str]) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        store = f"tcp:localhost:{free.getsockname()[1]}"
    started = []
    for host in range(hosts):
        env = {**os.environ, "ORCHESTRATOR_HOST": str(host), "ORCHESTRATOR_HOSTS": str(hosts)}
        process = subprocess.Popen(
            command("train", *words),
            env={**env, "ORCHESTRATOR_STORE": store},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
    return started


def _words(tmp_path, *more: str) -> list[str]:
    return small_overrides(tmp_path, "hardware.devices=2", "layout.fsdp=4", "resume=auto", "run_id=job", *more)


@pytest.mark.slow
def test_two_hosts_train_like_one_and_stop_and_go_on(tmp_path):
    """Stopped by a signal to one host alone, as an engine that takes a node away; the same command line goes on."""
    alone = run("train", *small_overrides(tmp_path / "alone", "hardware.devices=4", "layout.fsdp=4", "run_id=job"))
    assert alone.returncode == 0, alone.stderr
    (reference,) = (tmp_path / "alone" / "runs").glob("*/job")
    hosts = _start(2, _words(tmp_path))
    wait_until(lambda: any((tmp_path / "runs").glob("*/job/checkpoints/*/manifest.json")), hosts[0])
    hosts[1].send_signal(signal.SIGTERM)
    outputs = [host.communicate(timeout=240)[0] for host in hosts]
    codes = {host.returncode for host in hosts}
    assert codes in ({143}, {0}), outputs  # 0: it was faster than the signal
    hosts = _start(2, _words(tmp_path))
    outputs = [host.communicate(timeout=240)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    (run_dir,) = (tmp_path / "runs").glob("*/job")
    assert losses(read_rows(run_dir)) == losses(read_rows(reference))
    assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_a_mistake_ends_every_host_with_its_exit_code(tmp_path):
    hosts = _start(2, _words(tmp_path, "train.init_from=/nowhere"))
    outputs = [host.communicate(timeout=240)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [2, 2], outputs
