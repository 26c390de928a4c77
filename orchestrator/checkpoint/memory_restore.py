"""Find the snapshots of a run in the memories of its hosts, and bring together what a host needs of one.

All ranks go through the same steps, and all take a snapshot or none does. Nothing is believed that a checkpoint in
storage would not be: its files are checked by their hashes while they are read, its manifest by its signature.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import DIRECTORY, MANIFEST, SIGNATURE, Manifest, is_file_name, read_manifest
from orchestrator.checkpoint.host_memory import HostMemory
from orchestrator.checkpoint.memory_saver import attempted, map_file, transfer
from orchestrator.checkpoint.signing import Trust
from orchestrator.errors import CheckpointError, DamagedError
from orchestrator.sharding.shard import Shard

_ASIDE = ".partial"


@dataclass(frozen=True)
class _Held:
    """What a host has of one snapshot: the digest of its manifest, empty where there is none, and its files' sizes."""

    manifest: str
    files: dict[str, int]


@dataclass(frozen=True)
class Snapshot:
    """A snapshot every file of which is in the memory of some host.

    Attributes:
        memory: of this host.
        directory: of the snapshot, on each host.
        manifest: what it says, the same on all ranks.
        held: by each host, in their order; changed by what is brought.
    """

    memory: HostMemory
    directory: Path
    manifest: Manifest
    held: tuple[_Held, ...]

    def open(self, trust: Trust) -> Checkpoint:
        """Bring the small files to every host, and open the snapshot as a checkpoint. All ranks call it together.

        Args:
            trust: whose snapshots are accepted.

        Raises:
            CheckpointError: a host cannot take it, or it is not trusted; on all ranks.
        """
        beside = set(self.manifest.files) - self.manifest.tensor_files()
        signed = {SIGNATURE} if any(SIGNATURE in one.files for one in self.held) else set()
        # The manifest last: it makes a checkpoint of what is there.
        self._bring([beside | signed] * self.memory.lane.size)
        self._bring([{MANIFEST}] * self.memory.lane.size)
        opened: list[Checkpoint] = []

        def act() -> None:
            checkpoint = Checkpoint(self.directory, trust, look=False, partial=True)
            checkpoint.verify_beside()
            checkpoint.state()
            opened.append(checkpoint)

        self._refuse(attempted(act))
        return opened[0]

    def fetch(self, names: Collection[str]) -> None:
        """Bring the files that this rank reads to its host, from a host that has them. All ranks call it together.

        Args:
            names: of the files.

        Raises:
            CheckpointError: a host has no room, or cannot read them; on all ranks.
        """
        told = json.dumps(sorted(names)).encode()
        wanted = json.loads(self.memory.lane.exchange(told, lambda parts: b"[%b]" % b",".join(parts)))
        self._bring([set(one) for one in wanted])

    def _bring(self, wanted: Sequence[set[str]]) -> None:
        """Copy what ranks want to their hosts. Each goes through its copies in the order that all of them have."""
        hosts, mine, views = self.memory.hosts, [], {}
        for host, ranks in enumerate(hosts.groups):
            missing = sorted(set().union(*(wanted[rank] for rank in ranks)) - set(self.held[host].files))
            for number, name in enumerate(missing):
                source = next(at for at, one in enumerate(self.held) if name in one.files)
                sender, receiver = (hosts.groups[at][number % len(hosts.groups[at])] for at in (source, host))
                if self.memory.rank in (sender, receiver):
                    mine.append((name, sender, receiver))
                self.held[host].files[name] = self.held[source].files[name]

        def prepare() -> None:
            self.directory.mkdir(exist_ok=True)
            for name, _, receiver in mine:
                new = receiver == self.memory.rank
                path = self.directory / (name + _ASIDE if new else name)
                views[name, receiver] = map_file(path, self._size(name), new)

        self._refuse(attempted(prepare))
        for name, sender, receiver in mine:
            view = views[name, receiver]
            sends = sender == self.memory.rank
            transfer(self.memory.lane, {receiver: view} if sends else {}, {} if sends else {sender: view})
            if not sends:
                (self.directory / (name + _ASIDE)).touch()  # an empty file was not mapped
                (self.directory / (name + _ASIDE)).rename(self.directory / name)
        self.memory.agree("")

    def _size(self, name: str) -> int:
        return next(one.files[name] for one in self.held if name in one.files)

    def _refuse(self, problem: str) -> None:
        if said := self.memory.agree(problem):
            raise CheckpointError(f"the snapshot in memory cannot be used: {said}", got=self.directory)


def find_snapshots(memory: HostMemory, newer_than: int, report: Callable[[str], object]) -> Iterator[Snapshot]:
    """Yield the snapshots that are whole over the hosts, the newest first. All ranks go through them together.

    Args:
        memory: of this host.
        newer_than: steps of the newest checkpoint in storage, which is taken where both are of one step.
        report: told of what is passed over.
    """
    mine = _inventory(memory.folder.path) if memory.first_here else {}
    told = json.dumps({name: [one.manifest, one.files] for name, one in mine.items()}).encode()
    answers = json.loads(memory.lane.exchange(told, lambda parts: b"[%b]" % b",".join(parts)))
    by_host = [answers[ranks[0]] for ranks in memory.hosts.groups]
    for name in sorted({name for one in by_host for name in one}, key=_step, reverse=True):
        if _step(name) <= newer_than:
            return
        held = tuple(_Held(*one.get(name, ["", {}])) for one in by_host)
        try:
            manifest = _manifest(memory, name, held)
        except CheckpointError as error:
            report(f"skipping {memory.folder.path / name}: {error}")
            continue
        yield Snapshot(memory, memory.folder.path / name, manifest, held)


def _manifest(memory: HostMemory, name: str, held: Sequence[_Held]) -> Manifest:
    """Read the manifest where it is, for all ranks, and see that every file is somewhere."""
    digests = {one.manifest for one in held if one.manifest}
    if not digests:
        raise DamagedError("the process ended while it was written", got="no manifest")
    if len(digests) > 1:
        raise DamagedError("the memories of two hosts hold different snapshots of that step", got=", ".join(digests))
    host = next(at for at, one in enumerate(held) if one.manifest)
    source, directory = memory.hosts.groups[host][0], memory.folder.path / name
    content = b""
    if memory.rank == source:
        try:
            content = read_manifest(directory)
        except CheckpointError:
            content = b""  # said by what parses it, on all ranks
    content = memory.lane.broadcast(content, source)
    if hashlib.sha256(content).hexdigest() not in digests:
        raise DamagedError("its manifest was changed while it was read", got=directory)
    manifest = Manifest.parse(content, directory)
    lost = [
        file for file, stored in manifest.files.items() if not any(one.files.get(file) == stored.bytes for one in held)
    ]
    if lost:
        raise DamagedError(
            "files of it are in the memory of no host that is here", got=f"{len(lost)}, such as {', '.join(lost[:3])}"
        )
    for one in held:
        # What has another size is no part of it: brought anew from where it is whole.
        for file in [file for file, size in one.files.items() if size != _bytes_of(manifest, file, size)]:
            del one.files[file]
    return manifest


def _bytes_of(manifest: Manifest, file: str, otherwise: int) -> int:
    stored = manifest.files.get(file)
    return stored.bytes if stored else otherwise


def _step(name: str) -> int:
    match = DIRECTORY.fullmatch(name)
    assert match, name
    return int(match[1])


def _inventory(folder: Path) -> dict[str, _Held]:
    """List what this host has: plain files of snapshots, by the name of the snapshot. Links count as nothing."""
    found = {}
    for directory in folder.iterdir():
        if not DIRECTORY.fullmatch(directory.name) or directory.is_symlink() or not directory.is_dir():
            continue
        sizes = {}
        for path in directory.iterdir():
            about = os.lstat(path)
            if stat.S_ISREG(about.st_mode) and is_file_name(path.name):
                sizes[path.name] = about.st_size
        digest = ""
        if MANIFEST in sizes:
            try:
                digest = hashlib.sha256(read_manifest(directory)).hexdigest()
            except CheckpointError:
                del sizes[MANIFEST]
        found[directory.name] = _Held(digest, sizes)
    return found


def files_for(manifest: Manifest, shards: Iterable[Shard]) -> set[str]:
    """Return the files that a rank reads to fill its parts.

    Args:
        manifest: of the snapshot.
        shards: this rank's parts.
    """
    return {
        part.file
        for shard in shards
        if shard.name in manifest.tensors
        for part in manifest.tensors[shard.name].shards
        if _meet(shard, part.start, part.stop)
    }


def _meet(shard: Shard, start: Sequence[int], stop: Sequence[int]) -> bool:
    return all(max(p.start, a) < min(p.stop, b) for p, a, b in zip(shard.slices, start, stop, strict=True))
