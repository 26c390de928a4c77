"""The interface through which saving and loading reach the other ranks, and a gather-merge-broadcast over it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from typing import Protocol

_POLL_SECONDS = 0.01
TIMEOUT_SECONDS = 1800.0
SAID_NOTHING = "has said nothing"


class Coordinator(Protocol):
    """What ranks tell each other, as a strategy provides it. Any thread may call `put` and `get_now`."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def broadcast(self, text: str) -> str: ...
    def put(self, key: str, text: str) -> None: ...
    def get_now(self, key: str) -> str | None: ...


class SingleProcess:
    """The coordinator of a single process."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self._board: dict[str, str] = {}

    def broadcast(self, text: str) -> str:
        return text

    def put(self, key: str, text: str) -> None:
        self._board[key] = text

    def get_now(self, key: str) -> str | None:
        return self._board.get(key)


def new_topic() -> str:
    """A name for an `exchange` that nobody has used; the ranks have to agree on one."""
    return f"exchange/{uuid.uuid4().hex}"


def exchange(coordinator: Coordinator, topic: str, text: str, merge: Callable[[list[str]], str]) -> str:
    """Tell rank 0 `text`, and hear what it makes of what all have told. All ranks call it for the same topic.

    Args:
        merge: called on rank 0 with the texts, by rank; what it returns is returned everywhere.

    Raises:
        TimeoutError: a rank has said nothing for `TIMEOUT_SECONDS`; raised on all of them.
    """
    coordinator.put(f"{topic}/{coordinator.rank}", text)
    if coordinator.rank == 0:
        try:
            answer = [
                "",
                merge([_wait_for(coordinator, f"{topic}/{rank}", f"rank {rank}") for rank in range(coordinator.size)]),
            ]
        except TimeoutError as error:
            answer = [str(error), ""]
        coordinator.put(f"{topic}/outcome", json.dumps(answer))
    late, outcome = json.loads(_wait_for(coordinator, f"{topic}/outcome", "rank 0"))
    if late:
        raise TimeoutError(late)
    return str(outcome)


def _wait_for(coordinator: Coordinator, key: str, who: str) -> str:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while (text := coordinator.get_now(key)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{who} {SAID_NOTHING} for {TIMEOUT_SECONDS:g} s")
        time.sleep(_POLL_SECONDS)
    return text
