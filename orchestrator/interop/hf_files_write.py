"""Writing weights as Hugging Face lays them out: safetensors files, with an index where there are several."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orchestrator.checkpoint.format import ITEM_BYTES
from orchestrator.checkpoint.reader import DTYPES
from orchestrator.checkpoint.storage import write_file
from orchestrator.interop.hf_files import INDEX, WEIGHTS, FileLayout

# transformers asks which framework wrote a file.
_METADATA = {"format": "pt"}
_ALIGNMENT = 8
_BUFFERS = ".e_score_correction_bias"  # no parameters in transformers, which counts them in an index


@dataclass(frozen=True)
class Spec:
    """A tensor to be written.

    Attributes:
        name: of the tensor.
        dtype: as safetensors names it.
        shape: of the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def write_tensors(
    directory: Path,
    specs: Sequence[Spec],
    produce: Callable[[Spec], torch.Tensor],
    max_file_bytes: int,
    progress: Callable[[int], object],
    layouts: Sequence[FileLayout] = (),
) -> None:
    """Write tensors one by one, into files of at most `max_file_bytes` or of one tensor.

    Args:
        directory: an existing directory.
        specs: the tensors, in the order of writing.
        produce: called for each tensor when its turn comes.
        max_file_bytes: size of a file, unless one tensor is larger.
        progress: told the bytes of each tensor that was written.
        layouts: the files that these tensors came in. They are written in that order and with that metadata, and into
            those files where none is larger than `max_file_bytes`.
    """
    groups = _as_they_came(specs, layouts, max_file_bytes) or _groups(_in_order(specs, layouts), max_file_bytes)
    metadata = layouts[0].metadata if layouts else _METADATA
    count, weight_map = len(groups), dict[str, str]()
    for number, group in enumerate(groups, 1):
        name = WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        weight_map |= {spec.name: name for spec in group}
        write_file(directory / name, _parts(group, produce, progress, metadata))
    if count > 1:
        elements = sum(math.prod(spec.shape) for spec in specs if not spec.name.endswith(_BUFFERS))
        totals = {"total_parameters": elements, "total_size": sum(spec.bytes for spec in specs)}
        index = {"metadata": totals, "weight_map": weight_map}
        write_file(directory / INDEX, [json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"])


def _in_order(specs: Sequence[Spec], layouts: Sequence[FileLayout]) -> list[Spec]:
    places = {name: number for number, name in enumerate(name for one in layouts for name in one.tensors)}
    return sorted(specs, key=lambda spec: places.get(spec.name, len(places)))


def _as_they_came(specs: Sequence[Spec], layouts: Sequence[FileLayout], max_file_bytes: int) -> list[list[Spec]] | None:
    """Return the groups that the tensors came in; None where they are others, or the files larger than asked."""
    by_name = {spec.name: spec for spec in specs}
    groups = [[by_name[name] for name in one.tensors if name in by_name] for one in layouts]
    groups = [group for group in groups if group]
    if sum(map(len, groups)) != len(specs):
        return None
    small = all(len(group) == 1 or sum(spec.bytes for spec in group) <= max_file_bytes for group in groups)
    return groups if small else None


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
    specs: Sequence[Spec],
    produce: Callable[[Spec], torch.Tensor],
    progress: Callable[[int], object],
    metadata: Mapping[str, Any] | None,
) -> Iterator[Any]:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for spec in specs:
        offsets = [offset, offset + spec.bytes]
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
        offset += spec.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for spec in specs:
        tensor = produce(spec)
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, DTYPES[spec.dtype]), spec
        if tensor.numel():
            yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        progress(spec.bytes)
