"""Weights out of formats that are pickle: `torch.distributed.checkpoint` directories, and files of `torch.save`.

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
from orchestrator.interop.hf_files import PICKLED, PICKLED_INDEX, file_names, read_json, regular_file

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
# What Lightning, most training loops (nanoGPT, LitGPT) and DeepSpeed call the state dict in what they save.
_WRAPPED = ("state_dict", "model_state_dict", "model", "module")


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
    """The tensors of a `torch.distributed.checkpoint` directory, each read on access.

    Args:
        directory: of the checkpoint.

    Attributes:
        skipped: what else lies there by name, and why it is no weight.

    Raises:
        CheckpointError: it is damaged, incomplete, or names what it must not.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self.skipped: dict[str, str] = {}
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

    def about(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return the dtype, as safetensors names it, and the shape of a tensor.

        Args:
            name: of a tensor.
        """
        dtype, shape, _ = self._tensors[name]
        return DTYPE_NAMES[dtype], shape

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
                self.skipped[str(name)[:200]] = "no tensor: never read"
                continue
            dtype, shape = properties.state[0], _counts(entry.field("size"))
            if dtype not in DTYPE_NAMES or not dtype.is_floating_point:
                self.skipped[str(name)[:200]] = f"{dtype}: no floating point numbers"
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


class StateDict(dict[str, torch.Tensor]):
    """Weights by name, mapped from their files.

    Attributes:
        notes: what is worth saying about where they lay.
        skipped: what lay among them by name, and why it is none of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.skipped: dict[str, str] = {}


def read_state_dict(path: Path) -> StateDict:
    """Read the weights of a file of `torch.save`: a state dict, or what training loops wrap around one.

    A directory is one of transformers from before safetensors: `pytorch_model.bin`, or an index and its parts.

    Args:
        path: a file or a directory.

    Raises:
        CheckpointError: it cannot be read, or holds more than tensors and plain data.
    """
    if not path.is_dir():
        return _read_file(path)
    index = path / PICKLED_INDEX
    names = [PICKLED]
    if not (path / PICKLED).exists():
        names = file_names(read_json(index).get("weight_map"), index)
    result = StateDict()
    for name in names:
        part = _read_file(regular_file(path / name))
        if twice := next((key for key in part if key in result), None):
            raise CheckpointError(f"tensor '{twice}' is there twice", got=f"{path / name} and another file")
        result.update(part)
        result.notes += part.notes
        result.skipped |= part.skipped
    return result


def _read_file(path: Path) -> StateDict:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises anything, an OSError included
        raise CheckpointError(
            f"the file cannot be read as weights alone: {(str(error).splitlines() or [repr(error)])[0][:300]}",
            got=path,
            allowed="a file of torch.save with tensors and plain data",
            fix="nothing of it was executed; where you trust it, save its state dict alone with torch.save",
        ) from None
    data = data if isinstance(data, Mapping) else {}
    inner = [key for key in _WRAPPED if isinstance(data.get(key), Mapping)]
    # Of several the fullest: beside a model there may be its average, or single tensors such as a loss.
    where = max(["", *inner], key=lambda key: _count(data[key] if key else data))
    state, result = data[where] if where else data, StateDict()
    for name, value in state.items():
        if _is_weight(value):
            result[str(name)] = value
        else:
            result.skipped[str(name)[:200]] = f"{type(value).__name__}: no tensor of floating point numbers"
    if not result:
        raise CheckpointError(
            "the file holds no state dict",
            got=f"{path}: {', '.join(str(key)[:40] for key in list(data)[:6]) or 'no dictionary'}",
            allowed=f"tensors by name, or below {', '.join(map(repr, _WRAPPED))}",
        )
    if where:
        beside = ", ".join(sorted(str(key)[:40] for key in data if key != where)[:8])
        result.notes.append(f"the weights are those below '{where}'{f'; left out: {beside}' if beside else ''}")
    return result


def _count(state: Mapping[Any, Any]) -> int:
    return sum(_is_weight(value) for value in state.values())


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
