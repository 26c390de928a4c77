"""Where the first process of a job is reached, where its name does not resolve."""

from __future__ import annotations

import socket

import pytest

from orchestrator.distributed import address
from orchestrator.distributed.address import reachable
from orchestrator.errors import HardwareError

SLURM = {"SLURM_JOB_ID": "7"}


@pytest.fixture
def known(monkeypatch):
    """Names and addresses that resolve; nobody is asked."""
    names = {"127.0.0.1"}

    def look(host, port):
        if host not in names:
            raise socket.gaierror(-2, "Name or service not known")
        return [(host, port)]

    monkeypatch.setattr(address.socket, "getaddrinfo", look)
    monkeypatch.setattr(address, "_POLL_SECONDS", 0.01)
    return names


def _scontrol(monkeypatch, tmp_path, line):
    """Slurm's own program, of which only this one line of its answer matters."""
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\n[ "$*" = "show node --oneliner n1" ] && echo \'{line}\'\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def test_a_name_that_resolves_is_taken(known):
    assert reachable("127.0.0.1", SLURM, 1, pytest.fail) == "127.0.0.1"


def test_slurm_knows_the_address_of_a_node_whose_name_does_not_resolve(known, monkeypatch, tmp_path):
    _scontrol(monkeypatch, tmp_path, "NodeName=n1 Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=elsewhere Version=22.05")
    said = []
    assert reachable("n1", SLURM, 1, said.append) == "127.0.0.1"
    assert said == ["the name 'n1' does not resolve here: taking 127.0.0.1, which Slurm has for it"]


def test_a_cloud_node_has_an_alias(known):
    env = {**SLURM, "SLURM_NODE_ALIASES": "n0:10.0.0.1:n0,n1:[127.0.0.1]:n1"}
    assert reachable("n1", env, 1, lambda text: None) == "127.0.0.1"


def test_a_node_that_nobody_knows_is_an_error_at_once(known, monkeypatch, tmp_path):
    _scontrol(monkeypatch, tmp_path, "NodeName=n1 NodeAddr=n1 NodeHostName=n1")
    with pytest.raises(HardwareError, match="does not resolve on this one and Slurm has no other") as caught:
        reachable("n1", SLURM, 3600, pytest.fail)
    assert "MASTER_ADDR" in str(caught.value)


def test_another_name_is_asked_for_until_it_resolves(known):
    said = []

    def tell(text):
        said.append(text)
        known.add("job-0.job")

    assert reachable("job-0.job", {}, 60, tell) == "job-0.job"
    assert said == ["the name 'job-0.job' does not resolve here: trying for 60 s (hardware.timeout_seconds)"]
    with pytest.raises(HardwareError, match="does not resolve"):
        reachable("job-9.job", {}, 0.05, said.append)
