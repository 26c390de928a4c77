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
    """Communication of the ranks, as a strategy provides it. Any thread may call `put` and `get_now`."""

    @property
    def rank(self) -> int:
        """This process among them, from 0."""

    @property
    def size(self) -> int:
        """Number of processes."""

    def broadcast(self, text: str) -> str:
        """Return rank 0's `text` on every rank. All ranks call it, in the same order."""

    def put(self, key: str, text: str) -> None:
        """Publish `text` to all ranks under a key that is used once.

        Args:
            key: used once.
            text: the value.
        """

    def get_now(self, key: str) -> str | None:
        """Return what a rank has published under `key`, or None. Does not wait."""


class SingleProcess:
    """The coordinator of a single process."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self._board: dict[str, str] = {}

    def broadcast(self, text: str) -> str:
        """Return `text`."""
        return text

    def put(self, key: str, text: str) -> None:
        """Keep `text` under `key`."""
        self._board[key] = text

    def get_now(self, key: str) -> str | None:
        """Return what was put under `key`, or None."""
        return self._board.get(key)


def new_topic() -> str:
    """Return a name for an `exchange` that no process has used; the ranks have to agree on one."""
    return f"exchange/{uuid.uuid4().hex}"


def exchange(coordinator: Coordinator, topic: str, text: str, merge: Callable[[list[str]], str]) -> str:
    """Gather one text per rank on rank 0, merge them there, and broadcast the result. Every rank calls it.

    Args:
        coordinator: of this rank.
        topic: a name that was not used before, the same on all ranks (`new_topic`).
        text: this rank's part.
        merge: called on rank 0 with the texts in the order of the ranks.

    Returns:
        What `merge` returned, on every rank.

    Raises:
        TimeoutError: a rank has sent nothing for `TIMEOUT_SECONDS`; raised on all ranks.
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
