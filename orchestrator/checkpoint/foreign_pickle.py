"""Weights out of formats that are pickle: `torch.distributed.checkpoint` directories, and `.ckpt` files.

The only module that reads pickle, and only on a user's word. Even then nothing of it is executed: the names that it may
call are a short list, each stands for an empty record here, and tensors are read by torch's `weights_only`.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orchestrator.checkpoint.format import StoredShard, StoredTensor, check_cover, read_bounded
from orchestrator.checkpoint.reader import DTYPES
from orchestrator.checkpoint.storage import read_range
from orchestrator.checkpoint.writer import DTYPE_NAMES
from orchestrator.errors import CheckpointError

DCP_METADATA = ".metadata"
_MAX_METADATA_BYTES = 1 << 28
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_DCP = "torch.distributed.checkpoint."
# What the metadata of DCP consists of. Each becomes a record of what it was made of.
_RECORDS = {
    *(
        (f"{_DCP}metadata", name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    (f"{_DCP}filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *(("pathlib", name) for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath")),
}
_MAX_DIMS = 16


class _Record:
    """Stands for an object of the pickle: it keeps what that would have been made of, and does nothing."""

    args: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *args: Any) -> _Record:
        record = object.__new__(cls)
        record.args = args
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        return self.state.get(name) if isinstance(self.state, dict) else None


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return _size
        if (module, name) == ("collections", "OrderedDict"):
            return _mapping
        if (module, name) in _RECORDS:
            # A class of its own for each, so that nothing that a pickle does to one is seen by another.
            return type(name, (_Record,), {})
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}"[:200])


def _size(values: Any) -> tuple[Any, ...]:
    if len(values) > _MAX_DIMS:
        raise pickle.UnpicklingError(f"a tensor has {len(values)} dims")
    return tuple(values)


def _mapping() -> dict[Any, Any]:
    return {}


@dataclass(frozen=True)
class _Chunk:
    """A box of a tensor and the stretch of a file that it lies in."""

    start: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


class DcpTensors(Mapping[str, torch.Tensor]):
    """The tensors of a `torch.distributed.checkpoint` directory, each read when it is asked for.

    Raises:
        CheckpointError: it is damaged, incomplete, or names what it must not.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        metadata = self._read_metadata()
        try:
            self._tensors = self._parse(metadata)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise self._damaged(repr(error)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> torch.Tensor:
        dtype, shape, chunks = self._tensors[name]
        whole = torch.empty(shape, dtype=dtype)
        for chunk in chunks:
            part = self._read(name, chunk, dtype)
            whole[tuple(slice(a, a + size) for a, size in zip(chunk.start, chunk.sizes, strict=True))] = part
        return whole

    def _read_metadata(self) -> _Record:
        path = self._directory / DCP_METADATA
        try:
            metadata = _InertUnpickler(io.BytesIO(read_bounded(path, _MAX_METADATA_BYTES))).load()
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"the metadata is not what torch.distributed.checkpoint writes: {error}",
                got=path,
                fix="nothing of it was executed; do not load this checkpoint with other tools",
            ) from None
        except CheckpointError:
            raise
        except Exception as error:  # a damaged pickle raises anything
            raise self._damaged(repr(error)) from None
        if not isinstance(metadata, _Record):
            raise self._damaged("no Metadata")
        return metadata

    def _parse(self, metadata: _Record) -> dict[str, tuple[torch.dtype, tuple[int, ...], list[_Chunk]]]:
        places = {}
        for index, info in metadata.field("storage_data").items():
            if info.field("transform_descriptors"):
                raise CheckpointError("compressed DCP directories cannot be read", got=self._directory)
            places[index.field("fqn"), _counts(index.field("offset") or ())] = info
        tensors = {}
        for name, entry in metadata.field("state_dict_metadata").items():
            properties = entry.field("properties")
            if properties is None:
                continue  # an object that is no tensor: never read
            dtype, shape = properties.state[0], _counts(entry.field("size"))
            if dtype not in DTYPE_NAMES or not dtype.is_floating_point:
                continue
            chunks = [self._chunk(name, chunk, places, dtype) for chunk in entry.field("chunks")]
            shards = [
                StoredShard(one.file, name, one.start, tuple(map(sum, zip(one.start, one.sizes, strict=True))))
                for one in chunks
                if 0 not in one.sizes
            ]
            check_cover(name, StoredTensor(DTYPE_NAMES[dtype], shape, tuple(shards)))
            tensors[str(name)] = (dtype, shape, chunks)
        return tensors

    def _chunk(self, name: str, chunk: _Record, places: Mapping[Any, _Record], dtype: torch.dtype) -> _Chunk:
        start, sizes = _counts(chunk.field("offsets")), _counts(chunk.field("sizes"))
        info = places.get((name, start)) or (places.get((name, ())) if not any(start) else None)
        if info is None:
            raise CheckpointError(f"a part of tensor '{name}' is in no file of the directory", got=self._directory)
        file = str(info.field("relative_path"))
        offset, length = _counts((info.field("offset"), info.field("length")))
        path = self._directory / file
        if not _FILE_NAME.fullmatch(file) or not path.is_file() or offset + length > path.stat().st_size:
            raise CheckpointError(f"a part of tensor '{name}' is in no file of the directory", got=file[:200])
        if math.prod(sizes) * dtype.itemsize > length:
            raise self._damaged(f"'{name}' is larger than its place in the file")
        return _Chunk(start, sizes, file, offset, length)

    def _read(self, name: str, chunk: _Chunk, dtype: torch.dtype) -> torch.Tensor:
        try:
            data = io.BytesIO(read_range(self._directory / chunk.file, chunk.offset, chunk.offset + chunk.length))
            part = torch.load(data, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises anything, an OSError included
            raise self._damaged(f"'{name}' in {chunk.file}: {str(error)[:200]}") from None
        if not isinstance(part, torch.Tensor) or (part.dtype, tuple(part.shape)) != (dtype, chunk.sizes):
            raise self._damaged(f"'{name}' in {chunk.file} is not what the metadata says")
        return part

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"the DCP directory is damaged: {reason}"[:400], got=self._directory)


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a `.ckpt` of Lightning, or of a file with a state dict, mapped into memory.

    Raises:
        CheckpointError: it cannot be read, or holds more than tensors and plain data.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises anything, an OSError included
        raise CheckpointError(
            f"the file cannot be read as weights alone: {str(error).splitlines()[0][:300]}",
            got=path,
            allowed="a file of torch.save with tensors and plain data",
            fix="nothing of it was executed; where you trust it, save its state dict alone with torch.save",
        ) from None
    state = data.get("state_dict", data) if isinstance(data, dict) else {}
    tensors = (
        {str(name): value for name, value in state.items() if _is_weight(value)} if hasattr(state, "items") else {}
    )
    if not tensors:
        raise CheckpointError(
            "the file holds no state dict", got=path, allowed="tensors by name, or below 'state_dict'"
        )
    return tensors


def _is_weight(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.dtype in DTYPES.values()
        and value.dtype.is_floating_point
        # A stride of 0 makes any size of a few bytes.
        and value.numel() * value.dtype.itemsize <= value.untyped_storage().nbytes()
    )


def _counts(values: Any) -> tuple[int, ...]:
    counts = tuple(values)
    if not all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63 for value in counts):
        raise ValueError("a size or an offset is not a count")
    return counts
