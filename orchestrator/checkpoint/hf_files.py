"""Weights in a directory as Hugging Face lays them out: safetensors files, with an index where there are several."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orchestrator.checkpoint.format import ITEM_BYTES, parse_json, read_bounded
from orchestrator.checkpoint.reader import DTYPES
from orchestrator.checkpoint.storage import write_file
from orchestrator.checkpoint.tensorfile import TensorFile
from orchestrator.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_JSON_BYTES = 1 << 26
_FLOATS = ("F64", "F32", "F16", "BF16")
_ALIGNMENT = 8


@dataclass(frozen=True)
class Spec:
    """A tensor that is to be written: `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def read_json(path: Path, limit: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object of a stranger.

    Raises:
        CheckpointError: it is missing, too large, or none.
    """
    try:
        data = parse_json(read_bounded(path, limit))
    except OSError as error:
        raise CheckpointError(f"'{path.name}' cannot be read: {error.strerror}", got=path) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path.name}' is not JSON: {error}", got=path) from None
    if not isinstance(data, dict):
        raise CheckpointError(f"'{path.name}' is not a JSON object", got=path)
    return data


def map_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """The weights of a directory by name, mapped into memory: they are read from the disk when they are used.

    Raises:
        CheckpointError: there are none, one is missing or there twice, a file is damaged, or they are no floating
            point numbers.
    """
    names = _weight_files(directory)
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        try:
            file = TensorFile(directory / name)
        except OSError as error:
            raise CheckpointError(f"'{name}' cannot be read: {error.strerror}", got=directory) from None
        for key in file.entries:
            if key in tensors:
                raise CheckpointError(f"tensor '{key}' is there twice", got=f"{directory / name} and another file")
            tensors[key] = _mapped(file, key)
    if (directory / INDEX).exists():
        listed = set(read_json(directory / INDEX)["weight_map"])
        if listed != set(tensors):
            raise CheckpointError(
                "the files do not hold what their index lists",
                got=f"{len(listed - set(tensors))} tensors are missing, {len(set(tensors) - listed)} are not listed",
                fix="download the directory again",
            )
    return tensors


def _weight_files(directory: Path) -> list[str]:
    if (directory / INDEX).exists():
        weight_map = read_json(directory / INDEX).get("weight_map")
        names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
            raise CheckpointError(f"'{INDEX}' does not name files of its directory", got=directory)
        return sorted(names)
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    if WEIGHTS in found or len(found) == 1:
        return [WEIGHTS if WEIGHTS in found else found[0]]
    if found:
        raise CheckpointError(f"several safetensors files, and no {INDEX} that says what they are", got=directory)
    pickled = sorted(path.name for path in directory.glob("*.bin"))
    raise CheckpointError(
        "the directory has no weights in safetensors",
        got=", ".join(pickled[:3]) or "no *.safetensors file",
        allowed=f"{WEIGHTS}, or {INDEX} and its files",
        fix="convert them where you trust them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(NEW), "
        "which writes safetensors"
        if pickled
        else None,
    )


def _mapped(file: TensorFile, key: str) -> torch.Tensor:
    entry = file.entries[key]
    if entry.dtype not in _FLOATS:
        raise CheckpointError(
            f"tensor '{key}' holds no floating point numbers", got=entry.dtype, allowed=", ".join(_FLOATS)
        )
    with warnings.catch_warnings():
        # The mapped file cannot be written to, and nobody does.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        items = torch.from_numpy(file.read(key, tuple(slice(0, size) for size in entry.shape)))
    return items.view(DTYPES[entry.dtype]).reshape(entry.shape)


def write_tensors(
    directory: Path,
    specs: Sequence[Spec],
    produce: Callable[[Spec], torch.Tensor],
    max_file_bytes: int,
    progress: Callable[[int], object],
) -> None:
    """Write tensors one by one, into files of at most `max_file_bytes` or of one tensor.

    Args:
        produce: called for each tensor when its turn comes.
        progress: told the bytes of each tensor that was written.
    """
    groups = _groups(specs, max_file_bytes)
    count, weight_map = len(groups), dict[str, str]()
    for number, group in enumerate(groups, 1):
        name = WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        weight_map |= {spec.name: name for spec in group}
        write_file(directory / name, _parts(group, produce, progress))
    if count > 1:
        index = {"metadata": {"total_size": sum(spec.bytes for spec in specs)}, "weight_map": weight_map}
        write_file(directory / INDEX, [json.dumps(index, indent=2).encode()])


def _groups(specs: Sequence[Spec], max_file_bytes: int) -> list[list[Spec]]:
    groups: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        if groups[-1] and size + spec.bytes > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.bytes
    return groups


def _parts(
    specs: Sequence[Spec], produce: Callable[[Spec], torch.Tensor], progress: Callable[[int], object]
) -> Iterator[Any]:
    # transformers asks which framework wrote a file.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        offsets = [offset, offset + spec.bytes]
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
        offset += spec.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for spec in specs:
        tensor = produce(spec)
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, DTYPES[spec.dtype]), spec
        if tensor.numel():
            yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        progress(spec.bytes)
