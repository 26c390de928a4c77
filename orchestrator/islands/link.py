"""An island's end of the wire: every rank has its own."""

from __future__ import annotations

import collections
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from orchestrator.errors import ConfigError, LostPeerError, UserError
from orchestrator.islands.island_keys import curve_pair, import_zmq
from orchestrator.islands.island_messages import Answer, Beating, MessageError, Peer, Refused, Request, Taken, write
from orchestrator.islands.wire import LARGE, PREFERENCES, about, pack, read_answer

Answered = tuple[Answer, list[Any]]
_UNDER_WAY_BYTES = 64 << 20
_BEAT_SECONDS = 1.0
_LARGE_AGAIN = 6  # times as long before a request with frames is sent again


class HubRefusedError(UserError):
    """The hub does not accept a request."""


class HubRestartedError(LostPeerError):
    """The hub does not know the island any more: started again, it goes on from its newest save."""


@dataclass
class _Sent:
    number: int
    request: Request
    text: bytes
    frames: Sequence[Any]
    future: Future[Answered]
    at: float = 0.0
    size: int = 0
    tries: int = field(default=0)


class Link:
    """Asks the hub. A request is sent until it is answered: connections may break, and the hub may be started anew.

    Args:
        address: of the hub, `tcp://HOST:PORT`.
        key: that the islands share; None: no encryption.
        peer: who this is.
        retry_seconds: before a request that is not answered is sent again.
        silent_seconds: without any answer, after which the hub is taken for lost.
        first_seconds: the same for the first connection.

    Attributes:
        stop: the signal by which the hub asks to save and stop; 0: none.
        sent: bytes of frames by kind of the request.
        received: bytes of frames by kind of the answer.
    """

    def __init__(
        self,
        address: str,
        key: bytes | None,
        peer: Peer,
        retry_seconds: float = 5.0,
        silent_seconds: float = 120.0,
        first_seconds: float = 30.0,
    ):
        self._zmq = zmq = import_zmq()
        self.address, self._peer, self._key = address, peer, key
        self._retry, self._silent, self._first = retry_seconds, silent_seconds, first_seconds
        self.stop, self.sent, self.received = 0, collections.Counter[str](), collections.Counter[str]()
        self._numbers, self._context = itertools.count(1), zmq.Context()
        self._queue: collections.deque[_Sent] = collections.deque()
        self._waiting: dict[int, _Sent] = {}
        self._room, self._under_way = threading.Condition(), 0
        self._beat: Callable[[], tuple[int, str]] | None = None
        self._error: UserError | None = None
        self._met, self._closed, self._heard_at = False, False, time.monotonic()
        self._refusals = self._unmet = 0
        self._wake_in, self._wake_out = self._pair()
        self._wake_lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="islands-link", daemon=True)
        self._thread.start()

    def _pair(self) -> tuple[Any, Any]:
        ends = self._context.socket(self._zmq.PAIR), self._context.socket(self._zmq.PAIR)
        ends[0].bind(f"inproc://wake-{id(self)}")
        ends[1].connect(f"inproc://wake-{id(self)}")
        return ends

    def ask(self, request: Request, frames: Sequence[Any] = ()) -> Future[Answered]:
        """Send a request. Waits while too much is under way. Any thread may call it.

        Args:
            request: of the protocol.
            frames: of its parts.

        Returns:
            The answer and its frames, some time; or the error: `HubRefusedError`, `LostPeerError` where the hub is
            lost, `ConfigError` where there is none at the address, or it has another key.
        """
        sent = _Sent(next(self._numbers), request, write(request), frames, Future())
        sent.size = sum(len(frame) for frame in frames)
        with self._room:
            while self._under_way and self._under_way + sent.size > _UNDER_WAY_BYTES and not self._error:
                self._room.wait(0.5)
            if self._error is not None or self._closed:
                sent.future.set_exception(self._error or LostPeerError("the link to the hub is closed"))
                return sent.future
            self._under_way += sent.size
            self._queue.append(sent)  # under the lock: once the link has failed, nobody would answer
        self._wake()
        return sent.future

    def beating(self, beat: Callable[[], tuple[int, str]]) -> None:
        """Give signs of life from now on.

        Args:
            beat: returns step and phase; called by the link's thread.
        """
        self._beat = beat

    def close(self) -> None:
        """End the connection; what is not answered is not waited for."""
        if not self._closed:
            self._closed = True
            self._wake()
            self._thread.join(10)
            self._wake_in.close(0)
            self._context.term()

    # --- the thread -------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with self._wake_lock:
            if not self._wake_in.closed:
                with contextlib.suppress(self._zmq.ZMQError):  # woken so often, it cannot be asleep
                    self._wake_in.send(b"", flags=self._zmq.NOBLOCK)

    def _work(self) -> None:
        socket, monitor = self._connect()
        poller = self._zmq.Poller()
        for one in (socket, monitor, self._wake_out):
            poller.register(one, self._zmq.POLLIN)
        began, beaten = time.monotonic(), 0.0
        try:
            while not self._closed:
                ready = dict(poller.poll(200))
                while self._wake_out in ready and self._wake_out.poll(0):
                    self._wake_out.recv()
                if monitor in ready:
                    self._watch(monitor)
                while socket.poll(0):
                    self._hear(socket.recv(copy=False))
                now = time.monotonic()
                if self._beat is not None and now - beaten > _BEAT_SECONDS and self._met:
                    beaten = now
                    step, phase = self._beat()
                    with self._room:  # others append meanwhile
                        if not any(isinstance(one.request, Beating) for one in self._queue):
                            self._queue.append(self._small(Beating(step, phase)))
                self._send_all(socket, now)
                self._judge(now, began)
        except Exception as error:  # nobody waits for this thread, but for its answers
            self._fail(error if isinstance(error, UserError) else LostPeerError(f"the link has failed: {error!r}"))
        finally:
            self._fail(self._error or LostPeerError("the link to the hub is closed"))
            socket.disable_monitor()
            for one in (socket, monitor, self._wake_out):
                one.close(0)

    def _connect(self) -> tuple[Any, Any]:
        zmq = self._zmq
        socket = self._context.socket(zmq.DEALER)
        for name, value in PREFERENCES.items():
            socket.setsockopt(getattr(zmq, name), value)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 3000)
        if self._key is not None:
            public, secret = curve_pair(self._key, "island")
            socket.curve_publickey, socket.curve_secretkey = public, secret
            socket.curve_serverkey = curve_pair(self._key, "hub")[0]
        monitor = socket.get_monitor_socket()
        socket.connect(self.address)
        return socket, monitor

    def _watch(self, monitor: Any) -> None:
        from zmq.utils.monitor import recv_monitor_message

        zmq = self._zmq
        while monitor.poll(0):
            event = recv_monitor_message(monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._met, self._heard_at = True, time.monotonic()
                for sent in self._waiting.values():
                    sent.at = 0.0  # what was under way is lost
            elif event in (zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL):
                self._refusals += 1
            elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL or (event == zmq.EVENT_DISCONNECTED and not self._met):
                self._unmet += 1

    def _judge(self, now: float, began: float) -> None:
        """See whether the hub is to be had."""
        if not self._met and (self._refusals >= 2 or self._unmet >= 3):
            raise ConfigError(
                "the hub does not let this island in: its key is another one, or it is no hub of orchestrator",
                got=self.address,
                fix="copy islands/key from the run's directory on the hub's host, and give islands.key_file=FILE",
            )
        if not self._met and now - began > self._first:
            raise ConfigError(
                "no hub answers at this address",
                got=f"{self.address}, after {self._first:g} s",
                fix="give the address that train prints on the hub's host; for other hosts islands.bind=tcp://0.0.0.0:PORT",
            )
        if self._met and now - self._heard_at > self._silent and (self._waiting or self._queue):
            raise LostPeerError(
                "the hub does not answer any more",
                got=f"{self.address}, for {self._silent:g} s",
                fix="see that the process of the run's command still lives; this island goes on when it is back",
            )

    def _small(self, request: Request) -> _Sent:
        return _Sent(next(self._numbers), request, write(request), (), Future())

    def _send_all(self, socket: Any, now: float) -> None:
        if not self._met:
            return
        while self._queue:
            sent = self._queue[0]
            if not self._send(socket, sent, now):
                return
            self._queue.popleft()
            if isinstance(sent.request, Beating):
                self._waiting = {n: one for n, one in self._waiting.items() if not isinstance(one.request, Beating)}
            self._waiting[sent.number] = sent
        for sent in list(self._waiting.values()):
            late = self._retry * (_LARGE_AGAIN if sent.frames and sent.at else 1)
            if now - sent.at > late and not self._send(socket, sent, now):
                return

    def _send(self, socket: Any, sent: _Sent, now: float) -> bool:
        if not socket.poll(0, self._zmq.POLLOUT):
            return False  # before it is packed, which copies it
        message = pack([about(self._peer, sent.number), sent.text, *sent.frames])
        try:
            socket.send(message, flags=self._zmq.NOBLOCK, copy=len(message) < LARGE)
        except self._zmq.Again:
            return False
        sent.at = now
        sent.tries += 1
        self.sent[type(sent.request).__name__] += sent.size
        return True

    def _hear(self, message: Any) -> None:
        self._heard_at = time.monotonic()
        try:
            number, answer, parts = read_answer(message.buffer)
        except MessageError:
            return  # asked again when it is late
        sent = self._waiting.get(number)
        if sent is None:
            return  # an answer to what was asked twice
        if isinstance(answer, Refused) and not answer.final:
            sent.at = 0.0 if sent.tries < 5 else sent.at
            if sent.tries < 5:
                return
        del self._waiting[number]
        with self._room:
            self._under_way -= sent.size
            self._room.notify_all()
        self.received[type(answer).__name__] += sum(len(part) for part in parts)
        if isinstance(answer, Taken):
            self.stop = self.stop or answer.stop
        if isinstance(answer, Refused):
            kind = HubRestartedError if answer.again else HubRefusedError
            sent.future.set_exception(kind(answer.what, got=answer.got or None, allowed=answer.allowed, fix=answer.fix))
        else:
            sent.future.set_result((answer, parts))

    def _fail(self, error: UserError) -> None:
        with self._room:
            self._error = self._error or error
            left = [*self._waiting.values(), *self._queue]
            self._waiting.clear()
            self._queue.clear()
            self._room.notify_all()
        for sent in left:
            if not sent.future.done():
                sent.future.set_exception(self._error)
