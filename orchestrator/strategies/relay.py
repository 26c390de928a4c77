"""Work that one process leads: it says what is computed next, and the others of the job compute it with it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from orchestrator.distributed.exchange import new_topic
from orchestrator.strategies.parallel_strategy import ParallelStrategy

_POLL_SECONDS = 0.01
_END = ""
Result = TypeVar("Result")


class Relay:
    """All processes of a job make one together. The operations are collective; what calls them runs on rank 0 alone.

    A process that waits asks the store from time to time, and no collective: however long rank 0 reads data or counts
    results, nobody's patience ends. Should it be lost, whoever watches the job says so, as in a training.

    Args:
        parallel: the strategy, joined.
        operations: by name; each takes what JSON carries, and all processes call it together.
    """

    def __init__(self, parallel: ParallelStrategy, operations: Mapping[str, Callable[[Any], Any]]):
        self._parallel, self._operations = parallel, operations
        self._topic, self._number = parallel.broadcast(new_topic()), 0

    def call(self, name: str, arguments: Any) -> Any:
        """Run an operation on all processes; called by rank 0. Returns its result there.

        Args:
            name: of the operation.
            arguments: what it gets on each of them.
        """
        self.tell(name, arguments)
        return self._operations[name](arguments)

    def lead(self, work: Callable[[], Result]) -> Result | None:
        """Do `work` on rank 0, and be there for it elsewhere. All processes call it together.

        Args:
            work: calls `call`.

        Returns:
            What `work` returned; None on the other processes, also where it raised.
        """
        if self._parallel.rank:
            self._follow()
            return None
        try:
            return work()
        finally:
            self.tell(_END, None)

    def tell(self, name: str, arguments: Any) -> None:
        """Let the other processes begin an operation, which rank 0 runs itself.

        Args:
            name: of the operation.
            arguments: what it gets.
        """
        if self._parallel.size > 1:
            self._number += 1
            self._parallel.put(f"{self._topic}/{self._number}", json.dumps([name, arguments]))

    def _follow(self) -> None:
        while True:
            self._number += 1
            key = f"{self._topic}/{self._number}"
            while (told := self._parallel.get_now(key)) is None:
                time.sleep(_POLL_SECONDS)
            name, arguments = json.loads(told)
            if name == _END:
                return
            self._operations[name](arguments)
