"""Weights in a directory as Hugging Face lays them out: safetensors files, with an index where there are several.

Such a directory is untrusted. Links in it are followed, as the hub's cache consists of them, where they end in a
regular file; nothing that a header or an index claims is believed before it was checked against the files.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.checkpoint.format import ITEM_BYTES, read_bounded
from orchestrator.checkpoint.reader import DTYPES
from orchestrator.checkpoint.storage import read_range
from orchestrator.checkpoint.tensorfile import Entry, TensorFile
from orchestrator.errors import CheckpointError, DamagedError, shown

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
# What transformers takes of a directory, first match first: modeling_utils._get_resolved_checkpoint_files.
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_MAX_JSON_BYTES, _MAX_DEPTH = 1 << 26, 64
_FLOATS = ("F64", "F32", "F16", "BF16")
# Formats of whole elements that safetensors knows and no checkpoint of this product holds: quantised weights, masks.
_FOREIGN_ITEMS = {**ITEM_BYTES, "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}
_FOREIGN_ITEMS |= {"F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1}
_LFS = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class FileLayout:
    """The layout of a file: `tensors` by name in the order of its header, and its `metadata`.

    Attributes:
        name: of the file.
        tensors: names in the order of its header.
        metadata: of its header; None: none.
    """

    name: str
    tensors: tuple[str, ...]
    metadata: dict[str, Any] | None


def regular_file(path: Path) -> Path:
    """Return the regular file that `path` is, or that its links end in.

    Raises:
        CheckpointError: there is none: it is missing, a folder, a device, or a link that leads nowhere.
    """
    try:
        found = path.resolve(strict=True)
        if stat.S_ISREG(found.stat().st_mode):
            return found
        reason = "it is no regular file"
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "no file can have this name"
        if path.is_symlink():
            reason = f"it is a link that leads nowhere ({os.readlink(path)})"
    raise CheckpointError(
        f"'{path.name}' cannot be read: {reason}"[:300], got=path.parent, fix="download the directory again"
    )


def read_json(path: Path, limit: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object of untrusted origin.

    Args:
        path: a file or a directory.
        limit: largest size in bytes.

    Raises:
        CheckpointError: it is missing, too large, or none; or names a key twice, where readers would disagree.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
            raise CheckpointError(
                f"'{path.name}' names a key twice, of which readers take one or the other",
                got=f"{shown(twice, 100)} in {path}",
                fix="leave the right one",
            )
        return result

    try:
        content = read_bounded(regular_file(path), limit)
        if content.startswith(_LFS):
            raise _pointer(path)
        data = json.loads(content, object_pairs_hook=unique)
    except OSError as error:
        raise CheckpointError(f"'{path.name}' cannot be read: {error.strerror}", got=path) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path.name}' is not JSON: {error}"[:300], got=path) from None
    if not isinstance(data, dict):
        raise CheckpointError(f"'{path.name}' is not a JSON object", got=path)
    if _depth(data) > _MAX_DEPTH:
        raise CheckpointError(f"'{path.name}' is nested too deep", got=path, allowed=f"{_MAX_DEPTH} levels")
    return data


def _depth(data: Any) -> int:
    levels, layer = 0, [data]
    while layer:
        levels += 1
        inner = [one for one in layer if isinstance(one, (dict, list))]
        layer = [item for one in inner for item in (one.values() if isinstance(one, dict) else one)]
    return levels


class HFTensors(Mapping[str, torch.Tensor]):
    """The weights of a directory by name, each mapped from its file on access.

    Which files they are is decided as transformers does it: the single file before the index.

    Args:
        directory: of the weights.

    Attributes:
        layouts: the files that were taken.
        notes: what is worth saying about them.

    Raises:
        CheckpointError: there are none, one is missing or there twice, or a file is damaged.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self.notes: list[str] = []
        self.layouts: list[FileLayout] = []
        self._files: dict[str, tuple[Path, TensorFile]] = {}
        self._mapped: dict[Path, np.ndarray] = {}
        for name in self._weight_files():
            self._open(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, name: str) -> torch.Tensor:
        path, file = self._files[name]
        entry = file.entries[name]
        if entry.dtype not in _FLOATS:
            raise CheckpointError(
                f"tensor '{name}' holds no floating point numbers that can be trained on",
                got=f"{entry.dtype}{' (quantised weights, or indices)' if entry.dtype != 'BOOL' else ''}",
                allowed=", ".join(_FLOATS),
                fix="import the model that it was made from, in fp32, bf16 or fp16",
            )
        return self._mapped_tensor(path, entry)

    def codes(self, name: str) -> torch.Tensor:
        """Map a tensor of bytes, which are no numbers by themselves.

        Args:
            name: of a tensor of dtype U8.
        """
        path, file = self._files[name]
        return self._mapped_tensor(path, file.entries[name])

    def _mapped_tensor(self, path: Path, entry: Entry) -> torch.Tensor:
        if entry.start == entry.stop:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        if path not in self._mapped:
            # Copy on write: torch wants writable memory, which is never written.
            self._mapped[path] = np.memmap(path, np.uint8, "c")
        items = self._mapped[path][entry.start : entry.stop]
        return torch.from_numpy(items).view(DTYPES[entry.dtype]).reshape(entry.shape)

    def about(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return the dtype, as safetensors names it, and the shape of a tensor, whatever it holds.

        Args:
            name: of a tensor.
        """
        entry = self._files[name][1].entries[name]
        return entry.dtype, entry.shape

    def _open(self, name: str) -> None:
        path = regular_file(self._directory / name)
        if (self._directory / name).is_symlink():
            self.notes.append(f"{name} is a link to {path}")
        try:
            _refuse_what_is_no_tensor_file(path, name)
            file = TensorFile(path, _FOREIGN_ITEMS)
        except OSError as error:
            raise CheckpointError(f"'{name}' cannot be read: {error.strerror}", got=self._directory) from None
        for key in file.entries:
            if key in self._files:
                raise CheckpointError(
                    f"tensor '{key}' is there twice", got=f"{self._directory / name} and another file"
                )
            self._files[key] = path, file
        order = tuple(sorted(file.entries, key=lambda key: file.entries[key].start))
        self.layouts.append(FileLayout(name, order, file.metadata if isinstance(file.metadata, dict) else None))

    def _weight_files(self) -> list[str]:
        single, index = (self._directory / name for name in (WEIGHTS, INDEX))
        if single.exists() or single.is_symlink():
            if index.exists():
                self.notes.append(f"{WEIGHTS} was taken, as transformers does; the files of {INDEX} were not read")
            return [WEIGHTS]
        if index.exists() or index.is_symlink():
            return self._indexed()
        found = sorted(path.name for path in self._directory.glob("*.safetensors"))
        if len(found) == 1 and not (self._directory / ADAPTER_CONFIG).exists():
            self.notes.append(f"{found[0]} was taken: there is no {WEIGHTS}")
            return found
        raise _no_weights(self._directory, found)

    def _indexed(self) -> list[str]:
        listed = read_json(self._directory / INDEX).get("weight_map")
        names = file_names(listed, self._directory / INDEX)
        assert isinstance(listed, dict)
        held: set[str] = set()
        for name in names:
            self._open(name)
            held |= set(self.layouts[-1].tensors)
        if missing := sorted(set(listed) - held):
            raise CheckpointError(
                "the files do not hold what their index lists",
                got=f"{len(missing)} tensors are missing: {', '.join(missing[:3])}"[:300],
                fix="download the directory again",
            )
        if unlisted := sorted(held - set(listed)):
            self.notes.append(
                f"{len(unlisted)} tensors that {INDEX} does not list were read, as transformers does: "
                f"{', '.join(unlisted[:3])}"
            )
        return []


def file_names(weight_map: object, index: Path) -> list[str]:
    """Return the files that an index names, each of its own directory.

    Args:
        weight_map: of the index: tensor to file.
        index: its path, for messages.

    Raises:
        CheckpointError: it names none, or what is no name of a file there.
    """
    names = set(weight_map.values()) if isinstance(weight_map, dict) and _hashable(weight_map.values()) else set()
    if not names or not all(isinstance(name, str) and _is_name(name) for name in names):
        raise CheckpointError(f"'{index.name}' does not name files of its directory", got=index.parent)
    return sorted(names)


def _hashable(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_name(name: str) -> bool:
    """Return whether a name is plain: no folder, no control characters, and one that a file can have."""
    return name == Path(name).name and name not in ("", ".", "..") and name.isprintable() and len(name) <= 255


def _no_weights(directory: Path, found: list[str]) -> CheckpointError:
    """Say what is there instead."""
    allowed = f"{WEIGHTS}, or {INDEX} and its files"
    if (directory / ADAPTER_CONFIG).exists():
        return CheckpointError(
            "the directory holds an adapter (LoRA or another of peft), and not a model",
            got=directory,
            allowed=allowed,
            fix="LoRA of peft: import its model, then checkpoint import DIRECTORY base=CHECKPOINT. Others: merge where "
            "you trust it: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(NEW)",
        )
    if found:
        return CheckpointError(f"several safetensors files, and no {INDEX} that says what they are", got=directory)
    for pattern, what in (("*.gguf", "GGUF, the format of llama.cpp"), ("*.npz", "NumPy archives (MLX)")):
        if others := sorted(path.name for path in directory.glob(pattern)):
            return CheckpointError(f"the weights are {what}, which is not read", got=others[0][:200], allowed=allowed)
    for pattern, what in (("tf_model.h5", "TensorFlow"), ("flax_model.msgpack", "Flax")):
        if (directory / pattern).exists():
            return CheckpointError(f"the weights are those of {what}, which are not read", got=pattern, allowed=allowed)
    allowed += f"; or {PICKLED}"
    return CheckpointError("the directory has no weights in safetensors", got=directory, allowed=allowed)


def _refuse_what_is_no_tensor_file(path: Path, name: str) -> None:
    start = read_range(path, 0, 512)
    if start.startswith(_LFS):
        raise _pointer(path.with_name(name))
    if start.lstrip()[:1] == b"<":
        raise DamagedError(
            "this is a web page, and not the file: the download was answered by an error or a login",
            got=name,
            fix="download it again",
        )


def _pointer(path: Path) -> CheckpointError:
    return CheckpointError(
        "this is a Git LFS pointer, and not the file that it stands for",
        got=path,
        fix=f"git lfs pull, in {path.parent}; or download it with: hf download",
    )
