"""Weights of gpt-oss as published: experts in MXFP4, which is read as the same numbers in bf16.

Source: OCP Microscaling Formats (MX) Specification 1.0, section 5.3.3; the layout is that of transformers 5.23, as
`integrations/mxfp4.py` reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from orchestrator.errors import CheckpointError
from orchestrator.interop.hf_files import HFTensors

FATE = "MXFP4: read as the same numbers in bf16; an export leaves it out"
_BLOCKS, _SCALES = "_blocks", "_scales"
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1, by its lower three bits
_BIAS = 127  # of the shared exponent of a block, E8M0
_BLOCK = 32


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Return whether a `config.json` says that its weights are those of gpt-oss in MXFP4.

    Args:
        config: the parsed file.
    """
    how = config.get("quantization_config")
    method = how.get("quant_method") if isinstance(how, Mapping) else None
    return config.get("model_type") == "gpt_oss" and method == "mxfp4"


class Mxfp4Tensors(Mapping[str, Tensor]):
    """Tensors of a directory, of which those in blocks with scales are dequantised on access.

    Args:
        stored: as they are in the files.

    Attributes:
        layouts: the files, as they would be without quantisation.
        notes: what is worth saying about them.
    """

    def __init__(self, stored: HFTensors):
        self._stored, self._files = stored, frozenset(iter(stored))
        self._quantised = {name.removesuffix(_BLOCKS) for name in stored if name.endswith(_BLOCKS)}
        self.layouts = [
            replace(one, tensors=tuple(name for found in one.tensors if (name := self._name(found)) is not None))
            for one in stored.layouts
        ]
        self._names = dict.fromkeys(name for found in stored if (name := self._name(found)) is not None)
        count = len(self._quantised)
        self.notes = [*stored.notes, f"{count} tensors of experts were MXFP4, and have the same numbers in bf16 now"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._quantised:
            return self._stored[name]
        self.about(name)
        return dequantise(self._stored.codes(name + _BLOCKS), self._stored.codes(name + _SCALES))

    def about(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return the dtype, as safetensors names it, and the shape of a tensor.

        Args:
            name: of the tensor.

        Raises:
            CheckpointError: blocks without scales that fit them.
        """
        if name not in self._quantised:
            return self._stored.about(name)
        kind, blocks = self._stored.about(name + _BLOCKS)
        scales = self._stored.about(name + _SCALES) if name + _SCALES in self._files else ("none", ())
        fits = len(blocks) == 4 and blocks[-1] == _BLOCK // 2 and scales == ("U8", blocks[:-1]) and kind == "U8"
        if not fits:
            raise CheckpointError(
                "a tensor in MXFP4 is none",
                got=f"{name}: blocks {kind} {blocks}, scales {scales[0]} {scales[1]}"[:300],
                allowed=f"blocks U8 [experts, rows, n, {_BLOCK // 2}] and scales U8 [experts, rows, n]",
                fix="download the directory again",
            )
        return "BF16", (blocks[0], blocks[2] * _BLOCK, blocks[1])

    def _name(self, stored: str) -> str | None:
        """Return the name without quantisation; None of scales, which are none of their own."""
        if stored.removesuffix(_SCALES) in self._quantised:
            return None if stored.endswith(_SCALES) else stored
        plain = stored.removesuffix(_BLOCKS)
        return plain if plain in self._quantised else stored


def dequantise(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the numbers that MXFP4 stands for, in bf16, which has all of them.

    Args:
        blocks: [E, rows, n, 16] uint8, two codes each, the first one in the lower bits.
        scales: [E, rows, n] uint8.

    Returns:
        [E, n * 32, rows], as transformers has experts of gpt-oss in memory.
    """
    values = torch.tensor([*_POSITIVE, *(-value for value in _POSITIVE)], dtype=torch.bfloat16)
    experts = []
    for block, scale in zip(blocks, scales, strict=True):
        codes = torch.stack((block & 0x0F, block >> 4), -1).flatten(-2)
        numbers = torch.ldexp(values[codes.int()].float(), (scale.int() - _BIAS).unsqueeze(-1))
        experts.append(numbers.to(torch.bfloat16).flatten(-2))
    return torch.stack(experts).mT
