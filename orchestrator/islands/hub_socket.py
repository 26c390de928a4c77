"""The hub's end of the wire."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.islands.island_keys import curve_pair, import_zmq
from orchestrator.islands.island_messages import Answer, Peer, Refused, Request
from orchestrator.islands.wire import LARGE, PREFERENCES, read_asked, write_answer

_ZAP = "inproc://zeromq.zap.01"
_LAST_ANSWERS_MS = 1000
_MOST_ROUTES = 1 << 17  # processes that are known


class HubSocket:
    """Takes requests of islands that have the key, and sends answers.

    What is damaged, too large or no message is answered by `Refused` or dropped, and counted; it raises nothing.

    Args:
        bind: `tcp://ADDRESS:PORT`; the port `*` is any that is free.
        key: that the islands share; None: no encryption, and everybody is let in. For comparisons alone.
        threads: of ZeroMQ, that encrypt and copy.

    Attributes:
        address: where it listens, for islands.
        dropped: messages that were none.
    """

    def __init__(self, bind: str, key: bytes | None, threads: int = 2):
        self._zmq = zmq = import_zmq()
        self._context = zmq.Context(io_threads=threads)
        self._socket = self._context.socket(zmq.ROUTER)
        self._zap: Any = None
        self.dropped, self._routes = 0, dict[Peer, bytes]()
        for name, value in PREFERENCES.items():
            self._socket.setsockopt(getattr(zmq, name), value)
        # A peer that comes anew by the same name takes the place of the old connection.
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._allowed = b""
        if key is not None:
            self._admit(key)
        try:
            self._socket.bind(bind)
        except zmq.ZMQError as error:
            self.close()
            fix = "give another: islands.bind=tcp://0.0.0.0:PORT, or tcp://127.0.0.1:* for any port of this machine"
            raise ConfigError("the hub cannot listen there", got=f"{bind}: {error.strerror}", fix=fix) from error
        self.address = self._socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()

    def _admit(self, key: bytes) -> None:
        zmq = self._zmq
        public, secret = curve_pair(key, "hub")
        self._allowed = curve_pair(key, "island")[0]
        self._socket.curve_server, self._socket.curve_publickey, self._socket.curve_secretkey = True, public, secret
        self._zap = self._context.socket(zmq.REP)
        self._zap.linger = 0
        self._zap.bind(_ZAP)
        self._poller.register(self._zap, zmq.POLLIN)

    def receive(self, timeout_seconds: float) -> tuple[Peer, int, Request, list[Any]] | None:
        """Return the next request; None where there is none in time.

        Args:
            timeout_seconds: how long to wait.
        """
        ready = dict(self._poller.poll(round(1000 * timeout_seconds)))
        if self._zap is not None and self._zap in ready:
            self._authenticate()
        if self._socket not in ready:
            return None
        route, message = self._socket.recv(), self._socket.recv(copy=False)
        whole = not message.more
        while message.more:  # none of ours: none of it is kept
            message = self._socket.recv(copy=False)
        asked = read_asked(message.buffer) if whole else None
        if asked is None:
            self.dropped += 1
            return None
        self._routes.pop(asked.peer, None)
        self._routes[asked.peer] = route
        if len(self._routes) > _MOST_ROUTES:
            del self._routes[next(iter(self._routes))]  # who was silent longest
        if asked.request is None:
            self.dropped += 1
            said = asked.problem
            assert said is not None
            refused = Refused(said.what, str(said.got or ""), said.allowed or "", "it is sent again", final=False)
            self.reply(asked.peer, asked.number, refused, ())
            return None
        return asked.peer, asked.number, asked.request, asked.frames

    def _authenticate(self) -> None:
        """Answer ZeroMQ, which asks whether a connection may be made (RFC 27/ZAP)."""
        assert self._zap is not None
        version, number, _, _, _, mechanism, *credentials = self._zap.recv_multipart()
        from zmq.utils import z85

        good = mechanism == b"CURVE" and bool(credentials) and z85.encode(credentials[0]) == self._allowed
        status = (b"200", b"OK") if good else (b"400", b"the key is another one")
        self._zap.send_multipart([version, number, *status, b"", b""])

    def reply(self, peer: Peer, number: int, answer: Answer, frames: Sequence[Any]) -> None:
        """Send an answer. To a peer that has gone nothing is sent; it asks again when it is back.

        Args:
            peer: who asked.
            number: of the request.
            answer: to it.
            frames: of its parts.
        """
        if (route := self._routes.get(peer)) is None:
            return
        with suppress(self._zmq.Again):
            message = write_answer(number, answer, frames)
            self._socket.send_multipart([route, message], flags=self._zmq.NOBLOCK, copy=len(message) < LARGE)

    def forget(self, peer: Peer) -> None:
        """Forget where a peer is that does not come back.

        Args:
            peer: who it was.
        """
        self._routes.pop(peer, None)

    def close(self) -> None:
        """Stop listening, once the last answers have left: an island whose goodbye is not answered would ask again."""
        self._socket.close(_LAST_ANSWERS_MS)
        if self._zap is not None:
            self._zap.close(0)
        self._context.term()
