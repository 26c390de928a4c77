"""The wire: who has the key is answered, who has not learns why; cuts are bridged; rubbish harms nothing."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import socket
import threading
import time
from concurrent.futures import Future, wait
from pathlib import Path

import numpy as np
import pytest
import zmq

from orchestrator.errors import ConfigError, LostPeerError
from orchestrator.islands import island_keys as keys
from orchestrator.islands.boxes import Box
from orchestrator.islands.hub_socket import HubSocket
from orchestrator.islands.island_messages import (
    MAX_FRAME_BYTES,
    REQUESTS,
    Beating,
    Bye,
    LeaseRequest,
    MessageError,
    Offer,
    Peer,
    Refused,
    Report,
    Taken,
    read,
    write,
)
from orchestrator.islands.link import HubRefusedError, Link
from orchestrator.islands.part_frames import part_header
from orchestrator.islands.wire import about, pack, read_answer, unpack
from tests.lab.bad_wire import mutated

KEY = bytes(range(32))
PEER = Peer("a", "x", 0)


class Answering:
    """A hub that answers by `answer`, in a thread."""

    def __init__(self, answer=lambda request: Taken(), key=KEY, bind="tcp://127.0.0.1:*"):
        self.socket, self.heard, self._ends, self._answer = HubSocket(bind, key), [], False, answer
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self):
        while not self._ends:
            if (found := self.socket.receive(0.05)) is not None:
                peer, number, request, frames = found
                if not isinstance(request, Beating):
                    self.heard.append((request, [bytes(frame) for frame in frames]))
                if (answer := self._answer(request)) is not None:
                    self.socket.reply(peer, number, answer, ())

    def close(self):
        self._ends = True
        self._thread.join()
        self.socket.close()


@pytest.fixture
def hub():
    hub = Answering()
    yield hub
    hub.close()


@pytest.fixture
def link(hub):
    link = Link(hub.socket.address, KEY, PEER, retry_seconds=0.3)
    yield link
    link.close()


def offer(size: int = 1000, seed: int = 0) -> tuple[Offer, list[bytes]]:
    box, frame = Box.whole("w", (size,)), np.random.default_rng(seed).bytes(4 * size)
    return Offer(0, 0, 0, 1, 0, 1, (part_header(box, frame),)), [frame]


def test_a_request_and_its_frames_arrive_and_are_answered(hub, link):
    request, frames = offer()
    assert link.ask(request, frames).result(10) == (Taken(), [])
    assert hub.heard == [(request, frames)]
    assert link.sent["Offer"] == 4000


def test_much_arrives_in_order_and_what_is_under_way_is_bounded(hub, link):
    futures = [link.ask(*offer(1 << 20, seed)) for seed in range(40)]  # 160 MB; 64 may be under way
    for future in futures:
        future.result(60)
    assert [frames for _, frames in hub.heard] == [offer(1 << 20, seed)[1] for seed in range(40)]


def test_a_refusal_is_an_error_of_the_one_who_asked():
    hub = Answering(lambda request: Refused("no such lease", "7", "1", "ask for 1"))
    link = Link(hub.socket.address, KEY, PEER)
    with pytest.raises(HubRefusedError, match="no such lease"):
        link.ask(LeaseRequest(7)).result(10)
    link.close()
    hub.close()


def test_what_was_damaged_is_sent_again(hub, link):
    request, frames = offer()
    socket = zmq.Context.instance().socket(zmq.DEALER)
    public, secret = keys.curve_pair(KEY, "island")
    socket.curve_publickey, socket.curve_secretkey = public, secret
    socket.curve_serverkey = keys.curve_pair(KEY, "hub")[0]
    socket.connect(hub.socket.address)
    socket.send(pack([about(PEER, 3), write(request), frames[0][:-1] + b"?"]))
    number, answer, _ = read_answer(socket.recv())
    socket.close(0)
    assert "damaged on the way" in answer.what
    assert answer.final is False
    assert number == 3
    said = [Refused("damaged", final=False), Refused("damaged", final=False), Taken()]
    other = Answering(lambda request: said.pop(0))
    again = Link(other.socket.address, KEY, PEER)
    assert again.ask(request, frames).result(10) == (Taken(), [])
    assert len(other.heard) == 3
    again.close()
    other.close()


def test_another_key_is_said_to_be_another(hub):
    link = Link(hub.socket.address, bytes(32), PEER)
    with pytest.raises(ConfigError, match="its key is another one"):
        link.ask(LeaseRequest(0)).result(20)
    with pytest.raises(ConfigError, match="its key is another one"):
        link.ask(LeaseRequest(0)).result(1)
    link.close()
    assert hub.heard == []


def test_no_hub_at_the_address_is_said():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    link = Link(f"tcp://127.0.0.1:{port}", KEY, PEER, first_seconds=1)
    with pytest.raises(ConfigError, match="no hub answers"):
        link.ask(LeaseRequest(0)).result(20)
    link.close()


def test_a_hub_that_was_started_anew_is_asked_again(hub, link):
    link.ask(LeaseRequest(0)).result(10)
    address = hub.socket.address
    hub.close()
    waiting = link.ask(*offer())
    time.sleep(0.5)
    assert not waiting.done()
    second = Answering(bind=address)
    assert waiting.result(20) == (Taken(), [])
    assert second.heard == [offer()]
    second.close()
    hub.socket = HubSocket("tcp://127.0.0.1:*", KEY)  # for the fixture to close


def test_a_hub_that_stays_silent_is_lost(hub):
    silent = Answering(lambda request: None)
    link = Link(silent.socket.address, KEY, PEER, retry_seconds=0.2, silent_seconds=1.5)
    with pytest.raises(LostPeerError, match="does not answer any more"):
        link.ask(LeaseRequest(0)).result(20)
    assert len(silent.heard) > 2, "it was asked again meanwhile"
    link.close()
    silent.close()


def test_signs_of_life_bring_the_request_to_stop():
    hub = Answering(lambda request: Taken(15 if isinstance(request, Beating) else 0))
    link = Link(hub.socket.address, KEY, PEER)
    link.beating(lambda: (3, "training"))
    deadline = time.monotonic() + 10
    while not link.stop and time.monotonic() < deadline:
        time.sleep(0.05)
    assert link.stop == 15
    link.close()
    hub.close()


def test_keys_are_private_and_kept(tmp_path):
    first = keys.make(tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert keys.make(tmp_path / "key") == first == keys.read(tmp_path / "key")
    (tmp_path / "other").write_text("no key")
    with pytest.raises(ConfigError, match="holds no key"):
        keys.read(tmp_path / "other")
    with pytest.raises(ConfigError, match="cannot be read"):
        keys.read(tmp_path / "none")


def resident_mib() -> float:
    """Return the memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / (1 << 20)


def disturb(address: str, chance: random.Random) -> None:
    """Connect without the key: rubbish, also behind a good greeting of ZeroMQ."""
    host, port = address.removeprefix("tcp://").split(":")
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + chance.choice([b"CURVE", b"NULL", b"PLAIN"]).ljust(20, b"\0")
    body = chance.randbytes(chance.randrange(300))
    command = chance.choice([b"\x04" + bytes([len(body) % 256]), b"\x06" + chance.randbytes(8), b"\x02" + b"\xff" * 8])
    with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as raw:
        if chance.random() < 0.7:
            raw.sendall(greeting.ljust(64, b"\0") + chance.choice([b"\x04\xc8\x05HELLO", command]))
        raw.sendall(body)


def test_ten_thousand_messages_that_are_none_harm_nothing():
    hub, chance = Answering(), random.Random(0)
    inside = zmq.Context.instance().socket(zmq.DEALER)
    inside.curve_publickey, inside.curve_secretkey = keys.curve_pair(KEY, "island")
    inside.curve_serverkey = keys.curve_pair(KEY, "hub")[0]
    inside.connect(hub.socket.address)
    request, frames = offer(100)
    messages = [request, LeaseRequest(3), Beating(1, "x"), Report(1, (1.0,), (2,)), Bye("failed", "why")]
    link = Link(hub.socket.address, KEY, PEER)
    assert link.ask(request, frames).result(30) == (Taken(), [])
    before = resident_mib()
    for number in range(9800):
        line, text = about(PEER, number), mutated(chance.choice(messages), chance)
        parts = chance.choice([[], frames, [chance.randbytes(50)], frames * 3])
        choice = chance.randrange(6)
        if choice == 0:
            message = chance.randbytes(chance.randrange(60))
        elif choice == 1:
            other = [
                chance.choice([PEER.island, 7, None, "\ud800", "x" * 5000]),
                "x",
                chance.choice([0, -1, 1 << 70]),
                number,
            ]
            message = pack([json.dumps(other[: chance.choice([4, 4, 3])]).encode(), text, *parts])
        elif choice == 2:
            message = bytearray(pack([line, text, *parts]))
            message[chance.randrange(min(24, len(message)))] = chance.randrange(256)  # where the lengths are
        else:
            message = pack([line, text, *parts])
        inside.send(message)
        while inside.poll(0):
            inside.recv()
    for _ in range(200):
        disturb(hub.socket.address, chance)
    assert link.ask(request, frames).result(30) == (Taken(), [])
    grown = resident_mib() - before
    assert grown < 60, f"{grown:.0f} MiB more"
    assert hub.socket.dropped > 6000
    link.close()
    inside.close(0)
    hub.close()


def test_a_message_is_the_frames_that_were_packed():
    frames = [b"", b"x", bytes(range(256)), np.arange(5, dtype="<f4").data, b""]
    message = pack(frames)
    found = unpack(message)
    assert [bytes(one) for one in found] == [bytes(memoryview(one).cast("B")) for one in frames]
    base = np.frombuffer(message, np.uint8).ctypes.data
    assert {(np.frombuffer(one, np.uint8).ctypes.data - base) % 16 for one in found if len(one)} == {0}
    assert unpack(pack([])) == []
    for wrong in (b"", message[:-1], message + b"x", message[:10], b"\xff" * 8, message[4:]):
        with pytest.raises(MessageError, match="a message"):
            unpack(wrong)


def test_a_message_of_several_frames_is_dropped_whole(hub):
    inside = zmq.Context.instance().socket(zmq.DEALER)
    inside.curve_publickey, inside.curve_secretkey = keys.curve_pair(KEY, "island")
    inside.curve_serverkey = keys.curve_pair(KEY, "hub")[0]
    inside.connect(hub.socket.address)
    good = pack([about(PEER, 1), write(LeaseRequest(1))])
    inside.send_multipart([good, good, good])
    inside.send(pack([about(PEER, 2), write(LeaseRequest(2))]))
    assert inside.poll(20_000)
    assert read_answer(inside.recv())[:2] == (2, Taken())
    assert [asked for asked, _ in hub.heard] == [LeaseRequest(2)]
    assert hub.socket.dropped == 1
    inside.close(0)


def test_a_frame_that_is_too_large_ends_its_connection_alone(hub, link):
    inside = zmq.Context.instance().socket(zmq.DEALER)
    inside.curve_publickey, inside.curve_secretkey = keys.curve_pair(KEY, "island")
    inside.curve_serverkey = keys.curve_pair(KEY, "hub")[0]
    monitor = inside.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    inside.connect(hub.socket.address)
    inside.send(bytes(MAX_FRAME_BYTES + 1))
    assert monitor.poll(20_000), "the hub has cut the connection"
    assert link.ask(LeaseRequest(5)).result(20) == (Taken(), [])
    assert [asked for asked, _ in hub.heard] == [LeaseRequest(5)]
    inside.disable_monitor()
    monitor.close(0)
    inside.close(0)


def test_whoever_asks_while_the_link_ends_gets_an_answer_or_an_error(hub, link):
    link.beating(lambda: (0, "training"))
    futures: list[Future] = []

    def ask() -> None:
        for number in range(2000):
            futures.append(link.ask(LeaseRequest(number)))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    link.close()
    for thread in threads:
        thread.join()
    assert len(futures) == 8000
    assert not wait(futures, 5).not_done
    assert {type(one.exception()) for one in futures} <= {type(None), LostPeerError}


def test_reading_takes_exactly_what_a_message_has():
    chance = random.Random(1)
    for _ in range(2000):
        text = mutated(offer(10)[0], chance)
        try:
            found = read(text, REQUESTS)
        except MessageError:
            continue
        assert read(write(found), REQUESTS) == found
