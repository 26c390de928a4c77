"""Write a snapshot into the memory of the hosts, with a copy on the next host, and commit it by its manifest.

The tensor files never meet: each rank writes its own where it is and sends it to one other rank. Rank 0 makes the
manifest of all listings as for any checkpoint, and every host has it, with the small files, put into place last.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from orchestrator.checkpoint.async_saver import Saver
from orchestrator.checkpoint.format import MANIFEST
from orchestrator.checkpoint.host_memory import HostMemory, first_of
from orchestrator.checkpoint.memory_folder import remove_snapshot
from orchestrator.checkpoint.storage import PIECE_BYTES, AnyPath, put_last, write_file
from orchestrator.checkpoint.writer import Contents, commit_ranks, failure, reason_of, write_rank
from orchestrator.distributed.exchange import SingleProcess
from orchestrator.distributed.lane import Lane, pack, unpack
from orchestrator.sharding.shard import Shard

_TENSORS = ".safetensors"


class SnapshotSaver(Saver):
    """Writes snapshots into the memory of the hosts, one at a time, beside the training.

    Args:
        memory: of this host.
    """

    def __init__(self, memory: HostMemory):
        super().__init__(memory.folder.path, SingleProcess(), asynchronous=True)
        self._memory = memory

    def _begin(self, step: int) -> Callable[[Sequence[Shard], Contents], AnyPath]:
        # The name is the step's: at the start of a leg nothing but the snapshot that it began with is left.
        return lambda kept, contents: write_snapshot(self._memory, step, kept, contents)


def write_snapshot(memory: HostMemory, step: int, shards: Sequence[Shard], contents: Contents) -> Path:
    """Write, copy and commit the snapshot of `step`; then the one before it goes. All ranks call it together.

    Args:
        memory: of this host.
        step: optimizer steps completed.
        shards: this rank's parts of the tensors.
        contents: what is saved beside the tensors; rank 0's counts.

    Returns:
        Its directory on this host.

    Raises:
        SaveError: a rank could not write, the same on all ranks. The snapshot before it is untouched.
        NonFiniteError: a tensor holds NaN or infinity; the same.
    """
    directory = memory.folder.path / f"step-{step:08d}"
    for stage in (_write, _copy, _commit):
        if problem := stage(memory, directory, step, shards, contents):
            if memory.first_here:
                remove_snapshot(directory)
            raise failure(step, directory, problem)
    if memory.first_here:
        for other in memory.folder.path.glob("step-*"):
            if other != directory:
                remove_snapshot(other)
    return directory


def attempted(action: Callable[[], object]) -> str:
    """Do something; return why it failed, for the other ranks, empty where it did not.

    Args:
        action: what to do.
    """
    try:
        action()
    except Exception as error:
        return reason_of(error) or repr(error)
    return ""


def _write(memory: HostMemory, directory: Path, step: int, shards: Sequence[Shard], contents: Contents) -> str:
    return memory.agree(attempted(lambda: write_rank(directory, memory.rank, shards, contents)))


def _copy(memory: HostMemory, directory: Path, step: int, shards: Sequence[Shard], contents: Contents) -> str:
    if len(memory.hosts.groups) == 1:
        return ""
    size = _size(_tensor_file(directory, memory.rank))
    answer = memory.lane.exchange(str(size).encode(), lambda parts: b"[%b]" % b",".join(parts))
    sizes = dict(enumerate(json.loads(answer)))
    peer = memory.hosts.peer_of(memory.rank)
    assert peer is not None, "there are several hosts"
    sends: dict[int, memoryview] = {}
    receives: dict[int, memoryview] = {}

    def prepare() -> None:
        sends[peer] = map_file(_tensor_file(directory, memory.rank), size, new=False)
        for rank in memory.hosts.kept_by(memory.rank):
            directory.mkdir(exist_ok=True)
            receives[rank] = map_file(_tensor_file(directory, rank), sizes[rank], new=True)

    problem = memory.agree(attempted(prepare))
    if not problem:
        transfer(memory.lane, sends, receives)
    return problem


def _commit(memory: HostMemory, directory: Path, step: int, shards: Sequence[Shard], contents: Contents) -> str:
    listing = directory / f"rank-{memory.rank:05d}.json"

    def merge(parts: list[bytes]) -> bytes:
        beside: dict[str, bytes] = {}

        def act() -> None:
            for rank, part in enumerate(parts):
                (directory / f"rank-{rank:05d}.json").write_bytes(part)
            commit_ranks(directory, step, contents)

            beside.update({path.name: path.read_bytes() for path in _beside(directory)})

        problem = attempted(act)
        return pack(first_of([problem]).encode(), {} if problem else beside)

    said, files = unpack(memory.lane.exchange(listing.read_bytes(), merge))
    problem = ""
    if not said and memory.first_here and memory.rank:
        problem = attempted(lambda: _put_beside(directory, files))
    return said.decode() or memory.agree(problem)


def _beside(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.is_file() and not path.name.endswith(_TENSORS)]


def _put_beside(directory: Path, files: Mapping[str, bytes]) -> None:
    directory.mkdir(exist_ok=True)  # of a host whose ranks own nothing
    for listing in directory.glob("rank-*.json"):
        listing.unlink()
    for name, content in files.items():
        if name != MANIFEST:
            write_file(directory / name, [content])
    put_last(directory / MANIFEST, files[MANIFEST])


def transfer(lane: Lane, sends: Mapping[int, memoryview], receives: Mapping[int, memoryview]) -> None:
    """Send the memory of files to other ranks and receive that of others, piece by piece.

    Args:
        lane: to them.
        sends: what each rank gets.
        receives: where what each rank sends goes.
    """
    longest = max((len(view) for view in (*sends.values(), *receives.values())), default=0)
    for start in range(0, longest, PIECE_BYTES):
        part = slice(start, start + PIECE_BYTES)
        lane.transfer(
            {rank: view[part] for rank, view in sends.items()}, {rank: view[part] for rank, view in receives.items()}
        )


def map_file(path: Path, size: int, new: bool) -> memoryview:
    """Map a file into memory.

    Args:
        path: of the file.
        size: in bytes.
        new: make it, with its pages: a full file system is an error here, and would be a signal later.

    Raises:
        OSError: there is no room, or no such file of that size.
    """
    if not size:
        return memoryview(bytearray())
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC if new else os.O_RDONLY
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if new:
            os.posix_fallocate(handle, 0, size)
        elif os.fstat(handle).st_size != size:
            raise OSError(errno.EIO, "a file is not as large as it was", str(path))
        return memoryview(mmap.mmap(handle, size, access=mmap.ACCESS_WRITE if new else mmap.ACCESS_COPY))
    except OSError:
        if new:
            path.unlink()
        raise
    finally:
        os.close(handle)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _tensor_file(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank:05d}{_TENSORS}"
