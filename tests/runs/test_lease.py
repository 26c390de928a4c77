"""One process at a time writes into a store: by leases on a real S3 server, with other times than a run's."""

from __future__ import annotations

import threading
import time

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto")

from orchestrator.checkpoint.storage import children, locate
from orchestrator.errors import FAILED, CheckpointError, SaveError
from orchestrator.runs import lease
from tests.lab.store import reachable, serve

PEERS_WAIT_SECONDS = 6.0
EXPIRY_SECONDS = PEERS_WAIT_SECONDS / 3


def _take(kept, host, patient=False, seconds=PEERS_WAIT_SECONDS):
    return lease.take_lease(kept, host, patient, seconds)


@pytest.fixture(scope="module")
def server():
    with serve("s3") as store, reachable(store):
        yield store


@pytest.fixture
def kept(server, request):
    return locate(f"{server.place}/{request.node.name}")


@pytest.fixture
def hosts(tmp_path):
    places = [tmp_path / "first", tmp_path / "second"]
    for place in places:
        place.mkdir()
    return places


def _leases(kept) -> list[str]:
    return [path.name for path in children(kept)]


def test_a_living_holder_is_waited_for_or_refused(kept, hosts):
    with _take(kept, hosts[0]):
        with pytest.raises(CheckpointError, match="another process is training this run"):
            _take(kept, hosts[1])
        begin = time.monotonic()
        with pytest.raises(CheckpointError, match="another process is training this run"):
            _take(kept, hosts[1], True)
        assert time.monotonic() - begin > EXPIRY_SECONDS, "also beyond the time after which a silent one counts as dead"
    begin = time.monotonic()
    with _take(kept, hosts[1]):
        assert time.monotonic() - begin < EXPIRY_SECONDS / 2, "what was let go is free at once"
    assert _leases(kept) == ["lease-00000002.json"]


def test_who_waits_gets_it_when_it_is_let_go(kept, hosts):
    first = _take(kept, hosts[0])
    with first:
        taken = []
        waiting = threading.Thread(target=lambda: taken.append(_take(kept, hosts[1], True)))
        waiting.start()
        time.sleep(2.3)
        assert not taken
    waiting.join(10)
    assert taken


def test_a_dead_holder_blocks_its_own_directory_not_at_all_and_others_for_a_moment(kept, hosts):
    _take(kept, hosts[0])  # and is killed: it never gives a sign of life
    begin = time.monotonic()
    _take(kept, hosts[0])
    assert time.monotonic() - begin < EXPIRY_SECONDS / 2
    begin = time.monotonic()
    _take(kept, hosts[1])
    assert EXPIRY_SECONDS <= time.monotonic() - begin < 3 * EXPIRY_SECONDS


def test_a_holder_that_was_only_silent_commits_nothing_and_ends(kept, hosts, monkeypatch):
    _take(kept, hosts[0])
    allowed = lease.fence(kept, hosts[0])
    allowed()
    _take(kept, hosts[1])
    with pytest.raises(SaveError, match="another process has gone on with this run"):
        allowed()
    lease.fence(kept, hosts[1])()
    ended = []
    monkeypatch.setattr(lease.os, "_exit", lambda code: ended.append(code) or silent.ended.set())
    silent = lease._Lease(kept, hosts[0], 0.1)
    silent.number = 1
    silent.beat()
    assert ended == [FAILED]


def test_of_many_that_come_at_once_one_gets_it(kept, tmp_path):
    taken, refused = [], []

    def take(number: int) -> None:
        place = tmp_path / str(number)
        place.mkdir()
        try:
            held = _take(kept, place)
            held.__enter__()
            taken.append(held)
        except CheckpointError:
            refused.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 5)
    taken[0].__exit__(None, None, None)
