"""Names and layouts of weights in Hugging Face state dicts, and ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from orchestrator.config.schema import ModelConfig
from orchestrator.errors import CheckpointError
from orchestrator.models.decoder import Decoder

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gpt2"]


@dataclass(frozen=True)
class _Source:
    """Where a parameter lies in a foreign state dict.

    Attributes:
        name: foreign name, with `{i}` for the layer.
        transposed: stored as [in, out].
        part: which third of dim 0 (after transposing) it is, of a fused query-key-value projection.
    """

    name: str
    transposed: bool = False
    part: int | None = None


# Our module -> theirs. The parameter's own name (weight, bias) is the same on both sides.
_LLAMA = {
    "embed": _Source("model.embed_tokens"),
    "norm": _Source("model.norm"),
    "head": _Source("lm_head"),
    "layers.{i}.attn_norm": _Source("model.layers.{i}.input_layernorm"),
    "layers.{i}.attn.q": _Source("model.layers.{i}.self_attn.q_proj"),
    "layers.{i}.attn.k": _Source("model.layers.{i}.self_attn.k_proj"),
    "layers.{i}.attn.v": _Source("model.layers.{i}.self_attn.v_proj"),
    "layers.{i}.attn.o": _Source("model.layers.{i}.self_attn.o_proj"),
    "layers.{i}.mlp_norm": _Source("model.layers.{i}.post_attention_layernorm"),
    "layers.{i}.mlp.gate": _Source("model.layers.{i}.mlp.gate_proj"),
    "layers.{i}.mlp.up": _Source("model.layers.{i}.mlp.up_proj"),
    "layers.{i}.mlp.down": _Source("model.layers.{i}.mlp.down_proj"),
}
_QK_NORM = {
    "layers.{i}.attn.q_norm": _Source("model.layers.{i}.self_attn.q_norm"),
    "layers.{i}.attn.k_norm": _Source("model.layers.{i}.self_attn.k_norm"),
}
# GPT-2's projections are Conv1D modules, which hold the transpose of what nn.Linear holds.
_GPT2 = {
    "embed": _Source("transformer.wte"),
    "positions": _Source("transformer.wpe"),
    "norm": _Source("transformer.ln_f"),
    "head": _Source("lm_head"),
    "layers.{i}.attn_norm": _Source("transformer.h.{i}.ln_1"),
    "layers.{i}.attn.q": _Source("transformer.h.{i}.attn.c_attn", transposed=True, part=0),
    "layers.{i}.attn.k": _Source("transformer.h.{i}.attn.c_attn", transposed=True, part=1),
    "layers.{i}.attn.v": _Source("transformer.h.{i}.attn.c_attn", transposed=True, part=2),
    "layers.{i}.attn.o": _Source("transformer.h.{i}.attn.c_proj", transposed=True),
    "layers.{i}.mlp_norm": _Source("transformer.h.{i}.ln_2"),
    "layers.{i}.mlp.up": _Source("transformer.h.{i}.mlp.c_fc", transposed=True),
    "layers.{i}.mlp.down": _Source("transformer.h.{i}.mlp.c_proj", transposed=True),
}
_TABLES: dict[str, dict[str, _Source]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | _QK_NORM,
    "gpt2": _GPT2,
}
# The inner model of each family, which files may have been saved from without its prefix, and its embedding.
_INNER = {"llama": "model.", "mistral": "model.", "qwen2": "model.", "qwen3": "model.", "gpt2": "transformer."}
HEAD = "lm_head.weight"
# Tables that old checkpoints carry although they follow from the configuration.
_DERIVED = re.compile(r"((^|\.)rotary_emb\.inv_freq|\.attn\.(masked_)?bias|(^|\.)position_ids)$")


def is_derived(name: str) -> bool:
    """Return whether a foreign tensor follows from the configuration: a table of angles or positions, or a mask.

    Args:
        name: of a tensor.
    """
    return _DERIVED.search(name) is not None


def embedding_of(family: Family) -> str:
    """Return the name of the embedding in the family's files.

    Args:
        family: the Hugging Face family.
    """
    return _source("embed.weight", family).name


def without_prefix(name: str, family: Family) -> str:
    """Return a foreign name as files that were saved from the inner model have it.

    Args:
        name: of a tensor.
        family: the Hugging Face family.
    """
    return name.removeprefix(_INNER[family])


def from_hf(state_dict: Mapping[str, Tensor], family: Family, config: ModelConfig) -> dict[str, Tensor]:
    """Our parameters from a Hugging Face state dict.

    Args:
        state_dict: tensors by name; what is returned are views of them.
        family: whose names they carry.
        config: the model that they are for.

    Returns:
        Every parameter of `Decoder(config)` by name; a tied weight once, as `embed.weight`.

    Raises:
        CheckpointError: a family that is not known; tensors that are missing, left over, or of another shape.
    """
    given = {_with_prefix(name, family): tensor for name, tensor in state_dict.items() if not is_derived(name)}
    if config.tied_embeddings and HEAD in given:
        # Of a tied pair either may be stored; of two that differ the caller knows.
        head = given.pop(HEAD)
        given.setdefault(embedding_of(family), head)
    shapes = our_shapes(config)
    sources = {name: _source(name, family) for name in shapes}
    _refuse_other_names({source.name for source in sources.values()}, set(given), family)
    ours = {name: _take(given[source.name], source) for name, source in sources.items()}
    wrong = [
        f"  {name}: {tuple(ours[name].shape)}, wanted {shape}"
        for name, shape in shapes.items()
        if ours[name].shape != shape
    ]
    if wrong:
        raise CheckpointError("tensors do not have the shapes of the configured model:\n" + "\n".join(wrong))
    return ours


@dataclass(frozen=True)
class HFTensor:
    """A tensor of a Hugging Face state dict.

    Attributes:
        name: theirs.
        shape: theirs.
        parts: our parameters that it consists of, in order along dim 0 of ours.
        transposed: it is the transpose of what the parts make.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    transposed: bool

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Make the tensor from our parameters, given in the order of `parts`."""
        joined = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        return joined.T.contiguous() if self.transposed else joined


def hf_tensors(family: Family, config: ModelConfig) -> list[HFTensor]:
    """List the tensors that `Decoder(config)` has in a Hugging Face state dict; a tied head is none, as in their files.

    Args:
        family: the Hugging Face family.
        config: of the model.

    Raises:
        CheckpointError: a family that is not known, or that has no counterpart of a parameter.
    """
    shapes, parts, transposed = our_shapes(config), dict[str, list[str]](), set[str]()
    for name, shape in shapes.items():  # query, key, value come in this order
        source = _source(name, family)
        parts.setdefault(source.name, []).append(name)
        if source.transposed and len(shape) == 2:
            transposed.add(source.name)
    result = []
    for name, ours in parts.items():
        joined = (sum(shapes[part][0] for part in ours), *shapes[ours[0]][1:])
        shape = joined[::-1] if name in transposed else joined
        result.append(HFTensor(name, shape, tuple(ours), name in transposed))
    return result


def to_hf(parameters: Mapping[str, Tensor], family: Family, config: ModelConfig) -> dict[str, Tensor]:
    """Convert our parameters to a Hugging Face state dict, the inverse of `from_hf`; a tied head is left out.

    Args:
        parameters: every parameter of `Decoder(config)` by name.
        family: whose names to give.
        config: the model that they are of.

    Raises:
        CheckpointError: a family that is not known; parameters that are missing or left over.
    """
    tensors = hf_tensors(family, config)
    given = {name for name in parameters if not (config.tied_embeddings and name == "head.weight")}
    _refuse_other_names({part for tensor in tensors for part in tensor.parts}, given, family)
    return {tensor.name: tensor.join([parameters[part] for part in tensor.parts]) for tensor in tensors}


def our_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of `Decoder(config)`; a tied head is none of its own.

    Args:
        config: of the model.
    """
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Decoder(config).named_parameters()}


def _source(name: str, family: str) -> _Source:
    """Where our parameter `name` lies; its source's name is complete."""
    if family not in _TABLES:
        raise CheckpointError("this model family has no name table", got=family, allowed=", ".join(get_args(Family)))
    module, _, leaf = name.rpartition(".")
    layer = re.search(r"\d+", module)
    pattern = re.sub(r"\d+", "{i}", module)
    if pattern not in _TABLES[family]:
        raise CheckpointError(
            f"a {family} checkpoint has no counterpart of '{name}'", fix="choose the preset that fits the checkpoint"
        )
    source = _TABLES[family][pattern]
    foreign = source.name.replace("{i}", layer.group()) if layer else source.name
    return _Source(f"{foreign}.{leaf}", source.transposed, source.part)


def _with_prefix(name: str, family: str) -> str:
    """Return a name as the whole model has it: some files on the hub, as GPT-2's, were saved from the inner model."""
    inner = _INNER.get(family, "")
    return name if name.startswith((inner, "lm_head.")) else f"{inner}{name}"


def _take(tensor: Tensor, source: _Source) -> Tensor:
    if source.transposed and tensor.ndim == 2:
        tensor = tensor.T
    if source.part is not None:
        tensor = tensor.chunk(3)[source.part]
    return tensor


def _refuse_other_names(wanted: set[str], given: set[str], family: str) -> None:
    missing, extra = sorted(wanted - given), sorted(given - wanted)
    if missing or extra:
        lines = [f"  missing:   {name}" for name in missing] + [f"  left over: {name}" for name in extra]
        shown = lines[:12] + ([f"  … and {len(lines) - 12} more"] if len(lines) > 12 else [])
        raise CheckpointError(
            f"the tensors are not those of the configured {family} model:\n" + "\n".join(shown),
            fix="check model=… (layers, tied_embeddings, qk_norm, biases) against the checkpoint's config.json",
        )
