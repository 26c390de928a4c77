"""Asynchronous saving: a step blocks only for the copy to host memory; a thread writes, hashes and commits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from orchestrator.checkpoint.storage import AnyPath
from orchestrator.checkpoint.writer import Contents, begin, write
from orchestrator.distributed.exchange import Coordinator
from orchestrator.errors import CheckpointError, SaveError
from orchestrator.sharding.shard import Shard


class Saver:
    """Writes checkpoints below one directory, at most one at a time.

    Args:
        parent: of the checkpoints.
        coordinator: the other ranks; all of them call the same methods at the same steps.
        asynchronous: return from `save` when the shards are copied, and write in a thread.
        committed: called on rank 0 with each checkpoint's directory, once it counts, by the thread that wrote it.
    """

    def __init__(
        self,
        parent: AnyPath,
        coordinator: Coordinator,
        asynchronous: bool,
        committed: Callable[[AnyPath], object] = lambda path: None,
    ):
        self._parent, self._peers, self._asynchronous, self._committed = parent, coordinator, asynchronous, committed
        self._thread: threading.Thread | None = None
        self._result: AnyPath | Exception | None = None
        self._copies: list[torch.Tensor] = []

    def prepare(self, shards: Sequence[Shard]) -> None:
        """Allocate the memory for copies of such shards ahead of the first save, which then need not wait.

        Args:
            shards: this rank's parts of the tensors.
        """
        if self._asynchronous:
            owned = [shard for shard in shards if shard.owned]
            self._start(lambda: self._allocate(owned))

    def save(self, step: int, shards: Sequence[Shard], contents: Contents) -> None:
        """Save the shards as they are now; they may change when this returns. `wait` tells how it went.

        A save that is under way is waited for first, and its error lost: call `wait` before where it matters.

        Args:
            step: optimizer steps completed.
            shards: this rank's parts of the tensors.
            contents: what is saved beside the tensors.
        """
        self.join()
        writes = self._begin(step)
        kept = self._copy(shards) if self._asynchronous else list(shards)

        def run() -> None:
            try:
                self._result = writes(kept, contents)
                if self._peers.rank == 0:
                    self._committed(self._result)
            except Exception as error:
                self._result = error

        self._result = None
        if not self._asynchronous:
            run()
            return
        self._start(run)

    def _begin(self, step: int) -> Callable[[Sequence[Shard], Contents], AnyPath]:
        """Agree with the other ranks on where; returns what writes there, for the thread."""
        begun = begin(self._parent, step, self._peers)
        return lambda kept, contents: write(begun, step, kept, self._peers, contents)

    def wait(self) -> AnyPath | None:
        """Wait for the save that is under way. Returns its directory; None where nothing was saved since the last.

        Raises:
            CheckpointError: it failed; nothing was committed.
        """
        self.join()
        result, self._result = self._result, None
        if isinstance(result, CheckpointError):
            raise result
        if isinstance(result, Exception):
            raise SaveError(f"the checkpoint could not be written: {result!r}", got=self._parent) from result
        return result

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def join(self, timeout_seconds: float | None = None) -> None:
        """Wait until nothing is being written, or for so long.

        Args:
            timeout_seconds: how long to wait; None: without limit.
        """
        if self._thread is not None:
            self._thread.join(timeout_seconds)
            if not self._thread.is_alive():
                self._thread = None

    def _start(self, action: Callable[[], None]) -> None:
        # A daemon: a run that fails must not hang in its last save; one that ends well waits for it.
        self._thread = threading.Thread(target=action, name="checkpoint", daemon=True)
        self._thread.start()

    def _allocate(self, owned: Sequence[Shard]) -> None:
        self._copies = [
            # Filled: an empty tensor has no pages yet.
            torch.empty(shard.data.shape, dtype=shard.data.dtype, pin_memory=shard.data.is_cuda).fill_(0)
            for shard in owned
        ]

    def _copy(self, shards: Sequence[Shard]) -> list[Shard]:
        """Copy the owned shards into host memory that is reused, page-locked where a GPU copies into it."""
        owned = [shard for shard in shards if shard.owned]
        sizes = [(copy.shape, copy.dtype) for copy in self._copies]
        if sizes != [(shard.data.shape, shard.data.dtype) for shard in owned]:
            self._allocate(owned)
        for copy, shard in zip(self._copies, owned, strict=True):
            copy.copy_(shard.data.detach(), non_blocking=True)
        if any(shard.data.device.type != "cpu" for shard in owned):
            torch.accelerator.current_stream().synchronize()
        return [replace(shard, data=copy) for copy, shard in zip(self._copies, owned, strict=True)]
