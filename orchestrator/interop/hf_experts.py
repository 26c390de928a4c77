"""Names and layouts of experts in Hugging Face state dicts: each matrix of each expert by itself, or all in one tensor.

Published files of Mixtral, Qwen3-MoE, OLMoE and DeepSeek-V3 have the former, and `save_pretrained` of transformers 5
writes it too; in memory, and where it is asked to save as it computes, the matrices of gate and up are one tensor of
three dims. gpt-oss has that alone, in its own layout. Source: `conversion_mapping.py` of transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from orchestrator.interop.hf_tensor import HFTensor

_OURS = re.compile(r"layers\.(\d+)\.mlp\.experts\.(gate|up|down)(_bias)?")
_FUSED = ".mlp.experts.gate_up_proj"


@dataclass(frozen=True)
class _Experts:
    """How a family names its experts.

    Attributes:
        mixture: their module of a layer's mixture, in files with a tensor for each matrix.
        matrices: our names of matrices -> theirs, there; None: the family has no such files.
        transposed: matrices in one tensor are [in, out], and the columns of gate and up alternate.
    """

    mixture: str = "mlp"
    matrices: Mapping[str, str] | None = None
    transposed: bool = False


_PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_FAMILIES = {
    "mixtral": _Experts("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen3_moe": _Experts("mlp", _PROJECTIONS),
    "olmoe": _Experts("mlp", _PROJECTIONS),
    "deepseek_v3": _Experts("mlp", _PROJECTIONS),
    "gpt_oss": _Experts(transposed=True),
}


def is_fused(names: Iterable[str], family: str) -> bool:
    """Return whether files of a family have the experts' matrices in one tensor.

    Args:
        names: of their tensors; none: as transformers saves them.
        family: the Hugging Face family.
    """
    known = _FAMILIES.get(family)
    return known is not None and (known.matrices is None or any(_FUSED in name for name in names))


def expert_tensors(name: str, shape: tuple[int, ...], family: str, fused: bool) -> Iterator[HFTensor] | None:
    """Return the tensors that hold one of our experts' parameters; of a fused pair, those of the first alone.

    Args:
        name: of our parameter.
        shape: ours.
        family: the Hugging Face family.
        fused: as `is_fused` says.

    Returns:
        None where the parameter is none of experts, or the family has none.
    """
    found = _OURS.fullmatch(name)
    if found is None or family not in _FAMILIES:
        return None
    layer, matrix, bias = found.groups()
    known = _FAMILIES[family]
    if fused:
        return _fused(name, shape, f"model.layers.{layer}.mlp.experts", matrix, bias or "", known.transposed)
    assert known.matrices is not None, family
    if bias:
        return None
    return _separate(name, shape, f"model.layers.{layer}.{known.mixture}.experts", known.matrices[matrix])


def _separate(name: str, shape: tuple[int, ...], module: str, matrix: str) -> Iterator[HFTensor]:
    for expert in range(shape[0]):
        yield HFTensor(f"{module}.{expert}.{matrix}.weight", shape[1:], (name,), expert=expert)


def _fused(
    name: str, shape: tuple[int, ...], module: str, matrix: str, bias: str, transposed: bool
) -> Iterator[HFTensor]:
    if matrix == "up":
        return
    parts = (name,) if matrix == "down" else (name, name.replace(f".gate{bias}", f".up{bias}"))
    joined = (shape[0], len(parts) * shape[1], *shape[2:])
    turned = transposed and not bias
    yield HFTensor(
        f"{module}.{'down_proj' if matrix == 'down' else 'gate_up_proj'}{bias}",
        (joined[0], joined[2], joined[1]) if turned else joined,
        parts,
        turned,
        axis=1,
        interleaved=transposed and len(parts) == 2,
    )
