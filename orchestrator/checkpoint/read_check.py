"""Verify hashes while a checkpoint is read: each process those of what it reads, all together the rest.

A piece that lies whole in what a process wants is hashed where it was read to. So on the layout that wrote it a
checkpoint is read once, every process its part, and what is trained on is what was hashed. The pieces that nobody has
read whole (of other layouts, and what lies beside the tensors) are shared out among the processes.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from orchestrator.checkpoint.checkpoint import Checkpoint, Damage, damaged_error
from orchestrator.distributed.exchange import Coordinator, exchange, new_topic
from orchestrator.errors import CheckpointError, DamagedError

_TOLD_LINES = 100


class Checks:
    """The pieces of `checkpoint` that this process has compared with their hashes. Thread-safe."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._places = list(checkpoint.places())
        self._of_file: dict[str, range] = {}
        for file, group in itertools.groupby(range(len(self._places)), lambda index: self._places[index].file):
            indices = list(group)
            self._of_file[file] = range(indices[0], indices[-1] + 1)
        self._seen = np.zeros(len(self._places), bool)
        self._damage: list[Damage] = []

    def portions(self, file: str, start: int, stop: int) -> Iterator[tuple[int, int, int | None]]:
        """Divide `[start, stop)` of a file along its pieces.

        Args:
            file: its name.
            start: first byte.
            stop: the byte behind the last one.

        Yields:
            Where a portion begins and ends, and the number of the piece, where that lies whole in it.
        """
        indices = self._of_file[file]
        first = bisect.bisect_right(indices, start, key=lambda index: self._places[index].start) - 1
        for index in indices[first:]:
            place = self._places[index]
            if place.start >= stop:
                return
            whole = start <= place.start and place.stop <= stop
            yield max(start, place.start), min(stop, place.stop), index if whole else None

    def hold(self, number: int, hash: str) -> None:
        """Compare the computed hash of a piece with the manifest's.

        Args:
            number: of the piece.
            hash: of what was read.
        """
        place = self._places[number]
        if hash != place.piece.hash:
            self._damage.append(self._checkpoint.damage_at(place))
        self._seen[number] = True

    def conclude(
        self, coordinator: Coordinator, problem: CheckpointError | None, progress: Callable[[int], object]
    ) -> None:
        """Have each piece checked by some rank. All ranks call it together, and all end the same way.

        Args:
            coordinator: the processes that read the checkpoint together.
            problem: why this process could not read its part.
            progress: told the number of bytes of each stretch that is read.

        Raises:
            DamagedError: a rank found damage.
            CheckpointError: a rank has a problem.
        """
        topic = coordinator.broadcast(new_topic())
        here = self._checkpoint.tensor_files_here() if self._checkpoint.partial else []
        told = {"problem": _describe(problem), "seen": np.packbits(self._seen).tobytes().hex(), "here": here}
        answer = _exchange(coordinator, topic, told, _together)
        if answer["problem"]:
            # Of one kind everywhere: after damage all go on to another checkpoint, or none.
            same = problem is not None and isinstance(problem, DamagedError) == answer["problem"]["damaged"]
            raise (problem if same else None) or _problem(answer["problem"])
        seen = np.unpackbits(_bits(answer["seen"]), count=len(self._places))
        left = [self._places[index] for index in np.flatnonzero(seen == 0)]
        readers, everybody = answer["readers"], range(coordinator.size)
        mine = [
            place
            for number, place in enumerate(left)
            if (able := readers.get(place.file, everybody))[number % len(able)] == coordinator.rank
        ]
        self._damage.extend(self._checkpoint.damage(progress, mine))
        lines = [(one.file, one.start, str(one)) for one in self._damage[:_TOLD_LINES]]
        found = _exchange(
            coordinator, f"{topic}/damage", lines, lambda parts: sorted(line for part in parts for line in part)
        )
        if found:
            files, _, texts = zip(*found, strict=True)
            raise damaged_error(self._checkpoint.directory, files, texts)


def _exchange(coordinator: Coordinator, topic: str, mine: Any, merge: Callable[[list[Any]], Any]) -> Any:
    def merged(texts: list[str]) -> str:
        return json.dumps(merge([json.loads(text) for text in texts]))

    try:
        return json.loads(exchange(coordinator, topic, json.dumps(mine), merged))
    except TimeoutError as late:
        raise CheckpointError(f"the checkpoint could not be read together: {late}") from None


def _together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine the ranks' findings on rank 0: a problem, damage first, or the pieces that some rank has seen.

    And, where not every host has every file, the ranks that can read each.
    """
    if problems := [part["problem"] for part in parts if part["problem"]]:
        return {"problem": min(problems, key=lambda problem: not problem["damaged"])}
    seen = functools.reduce(np.bitwise_or, [_bits(part["seen"]) for part in parts])
    readers: dict[str, list[int]] = {}
    for rank, part in enumerate(parts):
        for file in part["here"]:
            readers.setdefault(file, []).append(rank)
    return {"problem": None, "seen": seen.tobytes().hex(), "readers": readers}


def _bits(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), np.uint8)


def _describe(problem: CheckpointError | None) -> dict[str, Any] | None:
    if problem is None:
        return None
    got = None if problem.got is None else str(problem.got)
    about = {"what": problem.what, "got": got, "allowed": problem.allowed, "fix": problem.fix}
    return {"damaged": isinstance(problem, DamagedError), "about": about}


def _problem(told: dict[str, Any]) -> CheckpointError:
    about = dict(told["about"])
    return (DamagedError if told["damaged"] else CheckpointError)(about.pop("what"), **about)
