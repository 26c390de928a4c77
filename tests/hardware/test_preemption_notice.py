"""The word of a cloud that it takes a host away: found, passed on once, and never an error."""

from __future__ import annotations

import signal
import time
from datetime import UTC, datetime, timedelta

import pytest

from orchestrator import stopping
from orchestrator.hardware import preemption_notice
from orchestrator.hardware.preemption_notice import Ec2, ask_gce, cloud_of_host, noticing
from tests.lab.metadata import serve_metadata


@pytest.fixture
def metadata(monkeypatch):
    with serve_metadata() as server:
        monkeypatch.setenv("GCE_METADATA_HOST", server.host)
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{server.host}/")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # it would know another machine's
        yield server


def test_google_says_that_a_machine_is_preempted(metadata):
    assert ask_gce() is None
    metadata.preempt()
    notice = ask_gce()
    assert str(notice) == "Google Cloud takes this host away in about 30 s (preempted)"


def test_google_says_that_a_host_is_maintained(metadata):
    metadata.maintain()
    notice = ask_gce()
    assert (notice.what, notice.seconds) == ("TERMINATE_ON_HOST_MAINTENANCE", 60.0)


def test_amazon_says_when(metadata):
    service = Ec2()
    assert service.ask() is None
    metadata.interrupt((datetime.now(UTC) + timedelta(seconds=100)).strftime("%Y-%m-%dT%H:%M:%SZ"))
    notice = service.ask()
    assert notice.what == "terminate"
    assert 97 < notice.seconds < 101
    assert [method for method, _ in metadata.asked] == ["PUT", "GET", "GET"], "a token serves for hours"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"action": "stop"}', '{"action": "stop", "time": "soon"}', "\x00"])
def test_what_amazon_says_otherwise_is_a_notice_all_the_same(metadata, text):
    metadata.taken["/latest/meta-data/spot/instance-action"] = text
    assert Ec2().ask().seconds == 120.0


def test_the_machine_says_whose_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(preemption_notice.host, "ROOT", tmp_path)
    assert cloud_of_host() is None
    for path, text, cloud in (
        ("sys/hypervisor/uuid", "ec2e1916-9099-7caf-fd21-012345abcdef", "ec2"),
        ("sys/class/dmi/id/board_vendor", "Amazon EC2", "ec2"),
        ("sys/class/dmi/id/product_name", "Google Compute Engine", "gce"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{text}\n")
        assert cloud_of_host() == cloud


def test_a_notice_asks_the_process_to_stop_once_and_says_how_long_it_lives(metadata, capfd):
    heard = []
    with stopping.listening(announce=False), stopping.deferred(), noticing("gce", heard.append, poll_seconds=0.02):
        time.sleep(0.1)
        assert not stopping.requested()
        assert stopping.seconds_left() is None
        metadata.preempt()
        deadline = time.monotonic() + 10
        while not stopping.requested() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stopping.requested() == signal.SIGTERM
        assert 25 < stopping.seconds_left() <= 30
        stopping.allow(10.0)  # the engine leaves less
        assert 5 < stopping.seconds_left() <= 10
        asked = len(metadata.asked)
        time.sleep(0.1)
        assert len(metadata.asked) == asked, "it is not asked again"
    assert [notice.source for notice in heard] == ["Google Cloud"]


@pytest.mark.parametrize("notices", ["gce", "ec2"])
def test_a_server_that_does_not_answer_is_no_news(monkeypatch, notices):
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
    with stopping.listening(announce=False), stopping.deferred(), noticing(notices, poll_seconds=0.02):
        time.sleep(0.1)
        assert not stopping.requested()


def test_elsewhere_nobody_is_asked(metadata, tmp_path, monkeypatch):
    monkeypatch.setattr(preemption_notice.host, "ROOT", tmp_path)
    for notices in ("auto", "none"):
        with noticing(notices, poll_seconds=0.02):
            time.sleep(0.05)
    assert metadata.asked == []
