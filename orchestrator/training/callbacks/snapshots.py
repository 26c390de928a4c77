"""Keep the last steps of the run in the memory of its hosts, between the checkpoints in storage."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as lightning

from orchestrator.checkpoint.host_memory import HostMemory
from orchestrator.checkpoint.memory_saver import SnapshotSaver
from orchestrator.config.schema import RunConfig
from orchestrator.distributed import standing
from orchestrator.errors import CheckpointError
from orchestrator.hardware import host
from orchestrator.observe.metrics import Metrics
from orchestrator.optim.steps import evaluated
from orchestrator.sharding.shard import Shard
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.training.callbacks.checkpointing import Checkpoints
from orchestrator.training.host_snapshots import LEG

_GRACE_SECONDS, _LAST_SECONDS = 5.0, 60.0
_SPARE = 0.1  # of the host's memory, that stays for what else grows
_FILES = 2  # the last snapshot, and the one that is being written
_BUSY, _BROKEN = 1, 2
_GIB = 2**30


class Snapshots(lightning.Callback):
    """Writes a snapshot every so many steps, beside the training; what goes wrong with one never ends a run.

    Args:
        memory: of this host; None: there are no snapshots.
        config: of the run.
        parallel: the strategy.
        checkpoints: of the run in storage: a snapshot carries what they do, but for the reference batch, whose
            measurement would hold each step, and signatures for others.
        metrics: flushed before a snapshot.
        leg: which start of the run this is.
        say: prints a line.

    Attributes:
        stalls: seconds that each snapshot kept the training waiting.
    """

    def __init__(
        self,
        memory: HostMemory | None,
        config: RunConfig,
        parallel: ParallelStrategy,
        checkpoints: Checkpoints,
        metrics: Metrics,
        leg: int,
        say: Callable[[str], None],
    ):
        self._memory, self._config, self._parallel, self._checkpoints = memory, config, parallel, checkpoints
        self._metrics, self._leg, self._say = metrics, leg, say
        self._saver = SnapshotSaver(memory) if memory else None
        self._problem: CheckpointError | None = None
        self.stalls: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """See that the hosts have the memory for it, and allocate that of the copies."""
        if self._memory is None or self._saver is None:
            return
        shards = self._parallel.state_shards(pl_module.model, pl_module.optimizer)
        if lacking := self._lacking(self._memory, shards):
            self._turn_off(f"there are no snapshots in memory: {lacking}")
            self._memory.folder.remove()
            self._memory = None
            return
        self._saver.prepare(shards)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        """Write a snapshot where a period ends, unless a rank is at the last one still."""
        step, settings = pl_module.step, self._config.checkpoint.memory
        if self._saver is None or step % settings.every_steps or step >= self._config.train.max_steps:
            return
        with standing.within(standing.SAVING):
            vote = self._parallel.start_vote(self._state()).result()
            if vote == _BROKEN:
                self._turn_off(f"there are no more snapshots in memory: {self._problem or 'a process could not go on'}")
            elif not vote:
                self._metrics.flush()
                begin = time.perf_counter()
                self._save(pl_module, self._saver)
                self.stalls.append(time.perf_counter() - begin)
                self._metrics.pause()

    def clear(self) -> None:
        """Remove the snapshots of steps that led astray. All ranks call it together."""
        if self._saver is not None and self._memory is not None:
            self._saver.join()  # the ranks are to speak with each other by the same way
            self._memory.keep_only(None)

    def finish(self) -> None:
        """Remove the snapshots of a run that storage holds as it is, or that has come to its end."""
        if self._saver is not None:
            self._saver.join(_LAST_SECONDS)
        if self._memory is not None:
            self._memory.folder.remove()

    def close(self) -> None:
        """Let the snapshot that is under way end, for a while: what it waits for may have gone."""
        if self._saver is not None:
            self._saver.join(_GRACE_SECONDS)

    def _state(self) -> int:
        """Look how the last snapshot went, and whether it is still being written."""
        assert self._saver is not None
        if self._saver.busy:
            return _BUSY
        try:
            if self._saver.wait():
                self._problem = None
        except CheckpointError as error:
            # What the ranks have told each other may be over at the next one; otherwise they do not hear each other.
            broken, known = error.__cause__ is not None, self._problem is not None
            self._problem = error
            if broken:
                return _BROKEN
            if not known and self._parallel.rank == 0:
                self._say(f"warning: of memory: {error}")
        return 0

    def _save(self, pl_module: Any, saver: SnapshotSaver) -> None:
        with evaluated(pl_module.optimizer):
            contents = self._checkpoints.contents(pl_module.step, {}, attested=False)
            contents = replace(contents, state={**contents.state, LEG: self._leg})
            saver.save(pl_module.step, self._parallel.state_shards(pl_module.model, pl_module.optimizer), contents)

    def _turn_off(self, text: str) -> None:
        self._saver = None
        self._say(f"warning: {text}")

    def _lacking(self, memory: HostMemory, shards: Sequence[Shard]) -> str:
        """Return what a host lacks for snapshots, the same on all ranks; empty where all have enough."""
        mine = sum(shard.data.numel() * shard.data.element_size() for shard in shards if shard.owned)
        told = json.loads(memory.lane.exchange(b"%d" % mine, lambda parts: b"[%b]" % b",".join(parts)))
        here = memory.hosts.groups[memory.hosts.host_of(memory.rank)]
        copies = sum(told[rank] for one in here for rank in memory.hosts.kept_by(one))
        own, problem = sum(told[rank] for rank in here), ""
        if memory.first_here:
            files = _FILES * (own + copies) - memory.folder.used_bytes()
            problem = _missing(memory, files, own)
            if problem and memory.folder.clear_others(older_than=0):
                problem = _missing(memory, files, own)
        return memory.agree(problem)


def _missing(memory: HostMemory, files: int, copies: int) -> str:
    """Return what there is too little of for so many bytes of files and of copies in processes."""
    free, available = memory.folder.free_bytes(), host.available_bytes() - int(_SPARE * host.ram_bytes())
    if files > free:
        return (
            f"they need {files / _GIB:.3f} GiB more in {memory.folder.path}, which has {free / _GIB:.3f} GiB: enlarge "
            "it (docker --shm-size; in Kubernetes a volume emptyDir with medium: Memory at /dev/shm), or set "
            "checkpoint.memory.enabled=false"
        )
    if files + copies > available:
        return (
            f"they need {(files + copies) / _GIB:.3f} GiB of memory more, and this host has "
            f"{max(0, available) / _GIB:.3f} GiB beside a tenth that stays free: take more hosts, or set "
            "checkpoint.memory.enabled=false"
        )
    return ""
