"""What goes wrong on a wire: messages that are changed somewhere, and connections that break."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import select
import socket
import threading
from collections.abc import Iterator
from typing import Any

from orchestrator.islands.island_messages import Answer, Request, write

_LARGEST = (1 << 64) - 1
_NUMBERS = [True, -1, 0, 1, 2, 7, 1 << 40, _LARGEST, -_LARGEST, 1 << 70, 10**400, 1e308, -1e308, 1e-308, -0.5]
_OTHERS = [
    None,
    "",
    "x" * 300,
    "x" * 70000,
    "é",
    "\ud800",
    [],
    [[]],
    [-1],
    [0, 0],
    [1 << 60, 1 << 60],
    {},
    [{"name": 1}],
]
_DEEP = b"[" * 5000 + b"]" * 5000


def mutated(message: Request | Answer, chance: random.Random) -> bytes:
    """Return a message with one to three values, keys, entries or bytes changed.

    Args:
        message: of the protocol.
        chance: that decides.
    """
    text = write(message)
    kind = chance.randrange(10)
    if kind == 0:
        at = chance.randrange(len(text))
        return text[:at] + chance.randbytes(1) + text[at + 1 :]
    if kind == 1:
        return chance.choice([text[: chance.randrange(len(text))], _DEEP, text.replace(b"0", _DEEP, 1), b"", text * 2])
    body = json.loads(text)
    for _ in range(chance.choice([1, 1, 2, 3])):
        _change(body, chance)
    return json.dumps(body).encode()


def _change(body: Any, chance: random.Random) -> None:
    path = chance.choice(list(_paths(body)))
    holder = body
    for step in path[:-1]:
        holder = holder[step]
    last, how = path[-1], chance.random()
    if how < 0.1:
        del holder[last]
    elif how < 0.2 and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[last]))
    elif how < 0.2:
        holder["more"] = 1
    elif how < 0.45 and type(holder[last]) is int:
        holder[last] += chance.choice([-1, 1, 2])
    else:
        holder[last] = copy.deepcopy(chance.choice(_NUMBERS + _OTHERS))
    if not body:
        body["kind"] = "none"


def _paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in entries:
        yield from _paths(each, (*at, key))


class CutProxy:
    """Stands between islands and their hub, and breaks each connection after some bytes.

    Args:
        address: of the hub, `tcp://HOST:PORT`.
        least: bytes that a connection lasts: handshake and the largest message.
        most: bytes that it lasts.

    Attributes:
        address: for the islands.
        connections: that were made so far.
    """

    def __init__(self, address: str, least: int, most: int):
        self._chance, self._range = random.Random(0), (least, most)
        host, port = address.removeprefix("tcp://").split(":")
        self._target = (host, int(port))
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        self.connections, self._ends = 0, False
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._left: dict[socket.socket, int] = {}
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def close(self) -> None:
        """End."""
        self._ends = True
        self._thread.join()

    def _work(self) -> None:
        while not self._ends:
            for ready in select.select([self._server, *self._pairs], [], [], 0.02)[0]:
                if ready is self._server:
                    self._accept()
                elif ready in self._pairs:
                    self._pass_on(ready)
        self._drop(list(self._pairs))
        self._server.close()

    def _accept(self) -> None:
        near, _ = self._server.accept()
        far = socket.create_connection(self._target)
        self._pairs |= {near: far, far: near}
        self._left |= dict.fromkeys((near, far), self._chance.randrange(*self._range))
        self.connections += 1

    def _pass_on(self, ready: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if data := ready.recv(min(1 << 14, self._left[ready])):
                self._pairs[ready].sendall(data)
                self._left[ready] -= len(data)
                return
        self._drop([ready, self._pairs[ready]])

    def _drop(self, ends: list[socket.socket]) -> None:
        for one in ends:
            self._pairs.pop(one, None), self._left.pop(one, None)
            one.close()
