"""Write a checkpoint: every rank its own shards, rank 0 the manifest when all are durable."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
import yaml

from orchestrator.checkpoint.finite import describe_nonfinite, finite_flags
from orchestrator.checkpoint.format import (
    CONFIG,
    MANIFEST,
    NOT_COVERED,
    SIGNATURE,
    STATE,
    SUMS,
    Manifest,
    StoredShard,
    StoredTensor,
    stored_from_dict,
    stored_to_dict,
)
from orchestrator.checkpoint.hashing import StoredFile
from orchestrator.checkpoint.storage import (
    AnyPath,
    UndecidedError,
    children,
    is_remote,
    make_directory,
    put_last,
    read_range,
    remove_file,
    remove_tree,
    size_of,
    there,
    write_file,
)
from orchestrator.distributed.exchange import SAID_NOTHING, Coordinator, exchange, new_topic
from orchestrator.errors import CheckpointError, NonFiniteError, SaveError
from orchestrator.sharding.shard import Shard

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8
SUM_RANGE = 1 << 64
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_LISTING = re.compile(r"rank-\d{5,}\.json")
_NOT_FINITE = "not finite: "  # begins the text that ranks tell each other, where that is the reason
T = TypeVar("T")
Attest: TypeAlias = Callable[[str, int, bytes, Mapping[str, str], Mapping[str, bytes]], Mapping[str, bytes]]


@dataclass(frozen=True)
class Contents:
    """The contents of a checkpoint beside its tensors.

    Attributes:
        state: JSON data that travels along (the same on all ranks).
        config: the resolved configuration.
        files: further files by name, such as the tokenizer's.
        sign: the signature file's content for a manifest, or None.
        hash: of the files' pieces, `sha256` or `blake3`.
        attested: what signs stands for whole files: every process computes their SHA-256, too.
        attest: from the directory's name, the step, the manifest, the SHA-256 of each file and the small files, both by
            name, it makes what is written beside them, by name (`attestation.Attester`); None on processes that write
            no manifest.
        allowed: asked before the manifest is put into place; it raises what speaks against it.
    """

    state: Mapping[str, Any]
    config: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)
    sign: Callable[[bytes], bytes] | None = None
    hash: str = "sha256"
    attested: bool = False
    attest: Attest | None = None
    allowed: Callable[[], None] | None = None


def save(parent: AnyPath, step: int, shards: Sequence[Shard], coordinator: Coordinator, contents: Contents) -> AnyPath:
    """Write the checkpoint of `step` below `parent`. All ranks call it together.

    Args:
        parent: the directory of checkpoints.
        step: optimizer steps completed.
        shards: this rank's part of everything; those it does not own are skipped.
        coordinator: the processes of the job.
        contents: what is saved beside the tensors.

    Returns:
        The directory, committed.

    Raises:
        SaveError: a rank could not write; nothing was committed and the partial files are gone.
        NonFiniteError: a tensor holds NaN or infinity; the same.
    """
    return write(begin(parent, step, coordinator), step, shards, coordinator, contents)


@dataclass(frozen=True)
class Begun:
    """The directory that all ranks write into, or the reason that there is none.

    Attributes:
        directory: of the checkpoint.
        topic: under which the ranks exchange what they have written.
        problem: why there is no directory; empty where there is one.
    """

    directory: AnyPath
    topic: str
    problem: str = ""


def begin(parent: AnyPath, step: int, coordinator: Coordinator) -> Begun:
    """Choose a directory for `step` together. All ranks call it; none raises, so that none is left waiting.

    Args:
        parent: the directory of checkpoints.
        step: optimizer steps completed.
        coordinator: the processes of the job.
    """
    name, problem, error = f"step-{step:08d}", "", None
    if coordinator.rank == 0:
        name, error = _attempt(lambda: _free_directory(parent, step).name, name)
        problem = reason_of(error) if error else ""
    name, problem, topic = json.loads(coordinator.broadcast(json.dumps([name, problem, new_topic()])))
    return Begun(parent / name, topic, problem)


def write(begun: Begun, step: int, shards: Sequence[Shard], coordinator: Coordinator, contents: Contents) -> AnyPath:
    """Write this rank's shards; rank 0 commits when all ranks have. Uses `put` and `get_now` of the coordinator alone.

    Args:
        begun: what `begin` returned.
        step: optimizer steps completed.
        shards: this rank's parts of the tensors.
        coordinator: the processes of the job.
        contents: what is saved beside the tensors.

    Raises:
        SaveError: as `save`, the same on all ranks.
    """
    problem, error, directory = begun.problem, None, begun.directory

    def commit(parts: list[str]) -> str:
        nonlocal error
        found = next((f"{text} (rank {rank})" for rank, text in enumerate(parts) if text), "")
        if not found:
            _, error = _attempt(lambda: commit_ranks(directory, step, contents), None)
            found = reason_of(error) if error else ""
        if found and not isinstance(error, UndecidedError):
            # A manifest that may still appear must find its files.
            _attempt(lambda: remove_tree(directory), None)
        return found

    if not problem:
        _, error = _attempt(lambda: write_rank(directory, coordinator.rank, shards, contents), None)
        try:
            problem = exchange(coordinator, begun.topic, reason_of(error) if error else "", commit)
        except TimeoutError as late:
            problem = str(late)
            if coordinator.rank == 0:
                _attempt(lambda: remove_tree(directory), None)
    if problem:
        raise failure(step, directory, problem) from error
    return directory


def failure(step: int, directory: AnyPath, problem: str) -> SaveError | NonFiniteError:
    """Return the error of a save, from the text that the ranks have told each other.

    Args:
        step: optimizer steps completed.
        directory: of the checkpoint.
        problem: as `reason_of` makes it, with the rank.
    """
    if problem.startswith(_NOT_FINITE):
        return NonFiniteError(
            f"no checkpoint of step {step} is written: {problem}",
            got=directory,
            fix="nothing can be made of such weights; what was saved before is untouched",
        )
    return SaveError(
        f"the checkpoint of step {step} could not be written: {problem}",
        got=directory,
        fix=f"{_remedy(problem, directory)}; earlier checkpoints are untouched",
    )


def _attempt(action: Callable[[], T], otherwise: T) -> tuple[T, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return otherwise, error


def reason_of(error: Exception) -> str:
    """Return what the ranks tell each other of an error.

    Args:
        error: of this rank.
    """
    return getattr(error, "strerror", None) or str(error) or repr(error)


def _remedy(problem: str, directory: AnyPath) -> str:
    """Return what helps against a problem, of which the ranks exchange the text alone."""
    if any(os.strerror(number) in problem for number in _NO_ROOM):
        return "free space there, or set checkpoint.dir to a place with more"
    if any(os.strerror(number) in problem for number in _NOT_ALLOWED):
        return "get permission to write there, or set checkpoint.dir to a place that you may write"
    if SAID_NOTHING in problem:
        return "look for the error of that rank: it has ended, or its disk or store does not answer"
    if NOT_COVERED in problem:
        return "let all hosts see one directory: a shared folder, or checkpoint.dir=s3://BUCKET/PREFIX"
    if is_remote(directory):
        return "see that the store can be reached and written from every host"
    return "see that every host can write there; if that is so, this is a defect: please report it"


def _free_directory(parent: AnyPath, step: int) -> AnyPath:
    """Return the directory for `step`; a committed one, even if damaged, is never overwritten."""
    directory, number = parent / f"step-{step:08d}", 1
    # In a store a manifest that was given up may still appear: not beside the files of another save.
    while there(directory / MANIFEST) or (is_remote(directory) and there(directory)):
        number += 1
        directory = parent / f"step-{step:08d}.{number}"
    if there(directory):
        remove_tree(directory)  # left by a save that never committed
    return directory


def write_rank(directory: AnyPath, rank: int, shards: Sequence[Shard], contents: Contents) -> None:
    """Write the shards of one rank, and the listing of them that `commit_ranks` reads.

    Args:
        directory: of the checkpoint.
        rank: whose they are.
        shards: its parts of the tensors.
        contents: how its file is hashed.
    """
    make_directory(directory)
    # A part without elements is not written; a tensor without any still has its place in the manifest.
    owned = [shard for shard in shards if shard.owned and shard.data.numel()]
    for shard in owned:
        box = tuple(part.stop - part.start for part in shard.slices)
        if tuple(shard.data.shape) != box:
            # Padding, or a strategy's mistake: the file would hold other elements than the manifest says.
            raise CheckpointError(
                f"a shard of '{shard.name}' is refused: its memory is not its box",
                got=f"{tuple(shard.data.shape)}, {box}",
            )
    empty = [shard for shard in shards if shard.owned and 0 in shard.shape]
    file = f"rank-{rank:05d}.safetensors"
    keys = [f"{shard.name}#{number}" for number, shard in enumerate(owned)]
    with ThreadPoolExecutor(1) as adder:
        # Beside the writing: the disk has most of it to do.
        sums = adder.submit(lambda: [sum_bits(shard.data) for shard in _refuse_nonfinite(owned)])
        tensors, how = [shard.data for shard in owned], (contents.hash, contents.attested)
        stored = write_safetensors(directory / file, keys, tensors, *how) if owned else None
    entries = [
        {
            "name": shard.name,
            "dtype": DTYPE_NAMES[shard.data.dtype],
            "shape": list(shard.shape),
            "key": key,
            "sum": total,
            "start": [part.start for part in shard.slices],
            "stop": [part.stop for part in shard.slices],
        }
        for key, shard, total in zip(keys, owned, sums.result(), strict=True)
    ]
    listing = {
        "file": file,
        "stored": stored_to_dict(stored) if stored else None,
        "sha256": stored.sha256 if stored else "",
        "shards": entries,
        "empty": [
            {"name": shard.name, "dtype": DTYPE_NAMES[shard.data.dtype], "shape": list(shard.shape)} for shard in empty
        ],
    }
    write_file(directory / f"rank-{rank:05d}.json", [json.dumps(listing).encode()])


def _refuse_nonfinite(shards: Sequence[Shard]) -> Sequence[Shard]:
    for shard, good in zip(shards, finite_flags([shard.data for shard in shards]), strict=True):
        if not good:
            raise NonFiniteError(f"{_NOT_FINITE}tensor '{shard.name}' holds {describe_nonfinite(shard.data)}")
    return shards


def commit_ranks(directory: AnyPath, step: int, contents: Contents) -> None:
    """Merge the listings of the ranks into the manifest and put it into place.

    Args:
        directory: of the checkpoint, with the listing that each rank wrote.
        step: optimizer steps completed.
        contents: what is saved beside the tensors.
    """
    contained = {
        STATE: json.dumps(contents.state, indent=1).encode(),
        CONFIG: yaml.dump(dict(contents.config), Dumper=_PlainDumper, sort_keys=False).encode(),
        **contents.files,
    }
    how = (contents.hash, contents.attested)
    files = {name: write_file(directory / name, [text], *how) for name, text in contained.items()}
    tensors: dict[str, tuple[str, tuple[int, ...], list[StoredShard]]] = {}
    sums: dict[str, int] = {}
    listings = sorted(path for path in children(directory) if _LISTING.fullmatch(path.name))
    for path in listings:
        listing = json.loads(read_range(path, 0, size_of(path) or 0))
        if listing["stored"]:
            stored = stored_from_dict(listing["file"], listing["stored"])
            files[listing["file"]] = replace(stored, sha256=listing["sha256"])
        for entry in [*listing["shards"], *listing["empty"]]:
            described = (entry["dtype"], tuple(entry["shape"]))
            _, _, shards = tensors.setdefault(entry["name"], (*described, []))
            if tensors[entry["name"]][:2] != described:
                raise CheckpointError(f"ranks disagree on tensor '{entry['name']}'", got=described)
            sums[entry["name"]] = sums.get(entry["name"], 0) + entry.get("sum", 0)
            if "key" in entry:
                shards.append(StoredShard(listing["file"], entry["key"], tuple(entry["start"]), tuple(entry["stop"])))
    texts = {name: f"{total % SUM_RANGE:016x}" for name, total in sorted(sums.items())}
    files[SUMS] = write_file(directory / SUMS, [json.dumps(texts).encode()], *how)
    whole = {name: StoredTensor(dtype, shape, tuple(parts)) for name, (dtype, shape, parts) in sorted(tensors.items())}
    manifest = Manifest(step, whole, files, contents.hash).to_json().encode()
    for path in listings:
        remove_file(path)
    if contents.sign:
        write_file(directory / SIGNATURE, [contents.sign(manifest)])
    if contents.attest:
        digests = {name: file.sha256 for name, file in files.items()}
        if unknown := [name for name, digest in digests.items() if not digest]:
            raise CheckpointError("a process was not told that whole files are signed", got=", ".join(unknown[:3]))
        for name, text in contents.attest(directory.name, step, manifest, digests, contained).items():
            write_file(directory / name, [text])
    if contents.allowed is not None:
        contents.allowed()
    put_last(directory / MANIFEST, manifest)


def sum_bits(data: torch.Tensor) -> int:
    """Sum the elements of a tensor modulo 2^64, each read as a signed integer of its width.

    Any change of one element changes it, and the sums of the parts of a tensor add up to that of the whole, however it
    is cut: so it can be compared on any layout. It is no hash: who wants to can find another tensor with the same.

    Args:
        data: a tensor of any dtype.
    """
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    words = data.detach().contiguous().reshape(-1).view(kinds[data.element_size()])
    # NumPy adds 32-bit words to a 64-bit sum several times as fast as torch does.
    return int(words.cpu().numpy().sum(dtype=np.int64)) % SUM_RANGE


class _PlainDumper(yaml.SafeDumper):
    """Without aliases, which no reader of a checkpoint accepts."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def write_safetensors(
    path: AnyPath, keys: Sequence[str], tensors: Sequence[torch.Tensor], hash: str = "sha256", whole: bool = False
) -> StoredFile:
    """Write tensors one after the other and hash on the way: no second copy in memory, no second read.

    The format is https://github.com/huggingface/safetensors#format; device tensors come to the host one by one.

    Args:
        path: a path of this machine or of an object store.
        keys: names of the tensors.
        tensors: in the order of `keys`, on any device.
        hash: a name that `new_hash` takes.
        whole: compute the SHA-256 of the whole file, too.
    """
    header, offset = {}, 0
    for key, tensor in zip(keys, tensors, strict=True):
        size = tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return write_file(path, _parts(text, tensors), hash, whole)


def _parts(header: bytes, tensors: Sequence[torch.Tensor]) -> Iterator[Any]:
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors:
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
