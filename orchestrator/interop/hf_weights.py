"""Names and layouts of weights in Hugging Face state dicts, and ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from orchestrator.config.schema import ModelConfig
from orchestrator.errors import CheckpointError
from orchestrator.interop.hf_dense import FAMILIES
from orchestrator.interop.hf_experts import expert_tensors, is_fused
from orchestrator.interop.hf_family import LLAMA, QK_NORM
from orchestrator.interop.hf_tensor import HFSource, HFTensor
from orchestrator.models.decoder import Decoder

Family = Literal[
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt2",
    "mixtral",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "olmo3",
    "smollm3",
    "granite",
    "phi3",
    "glm4",
    "gpt_neox",
    "stablelm",
    "starcoder2",
    "cohere",
    "cohere2",
    "olmoe",
    "deepseek_v3",
    "gpt_oss",
]


# Our module -> theirs. The parameter's own name (weight, bias) is the same on both sides, but for these.
_LEAVES = {"balance_bias": "e_score_correction_bias"}
_ROUTER = {"layers.{i}.mlp.router": HFSource("model.layers.{i}.mlp.gate")}
# GPT-2's projections are Conv1D modules, which hold the transpose of what nn.Linear holds.
_GPT2 = {
    "embed": HFSource("transformer.wte"),
    "positions": HFSource("transformer.wpe"),
    "norm": HFSource("transformer.ln_f"),
    "head": HFSource("lm_head"),
    "layers.{i}.attn_norm": HFSource("transformer.h.{i}.ln_1"),
    "layers.{i}.attn.q": HFSource("transformer.h.{i}.attn.c_attn", transposed=True),
    "layers.{i}.attn.k": HFSource("transformer.h.{i}.attn.c_attn", transposed=True),
    "layers.{i}.attn.v": HFSource("transformer.h.{i}.attn.c_attn", transposed=True),
    "layers.{i}.attn.o": HFSource("transformer.h.{i}.attn.c_proj", transposed=True),
    "layers.{i}.mlp_norm": HFSource("transformer.h.{i}.ln_2"),
    "layers.{i}.mlp.up": HFSource("transformer.h.{i}.mlp.c_fc", transposed=True),
    "layers.{i}.mlp.down": HFSource("transformer.h.{i}.mlp.c_proj", transposed=True),
}
_TABLES: dict[str, dict[str, HFSource]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA | QK_NORM,
    "gpt2": _GPT2,
    "mixtral": LLAMA | {"layers.{i}.mlp.router": HFSource("model.layers.{i}.block_sparse_moe.gate")},
    "qwen3_moe": LLAMA | QK_NORM | _ROUTER,
    **{name: dict(family.weights) for name, family in FAMILIES.items()},
}
# Where files with all experts in one tensor have other names of other tensors, too.
_FUSED_TABLES = {"mixtral": LLAMA | _ROUTER}
# The inner model of each family, which files may have been saved from without its prefix.
_INNER = {
    **dict.fromkeys(_TABLES, "model."),
    "gpt2": "transformer.",
    **{name: family.inner for name, family in FAMILIES.items()},
}
# Tables that old checkpoints carry although they follow from the configuration.
_DERIVED = re.compile(r"((^|\.)rotary_emb\.inv_freq|\.(attn|attention)\.(masked_)?bias|(^|\.)position_ids)$")


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


def head_of(family: Family) -> str:
    """Return the name of the head in the family's files.

    Args:
        family: the Hugging Face family.
    """
    return _source("head.weight", family).name


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
    return stacked(parts_from_hf(state_dict, family, config))


def stacked(parts: Mapping[str, Tensor | list[Tensor]]) -> dict[str, Tensor]:
    """Return parameters, those of experts that came one by one in a tensor of their own.

    Args:
        parts: as `parts_from_hf` returns them.
    """
    return {name: torch.stack(part) if isinstance(part, list) else part for name, part in parts.items()}


def parts_from_hf(
    state_dict: Mapping[str, Tensor], family: Family, config: ModelConfig
) -> dict[str, Tensor | list[Tensor]]:
    """Our parameters as `from_hf`, those of experts that are stored one by one as lists of rows: nothing is copied.

    Args:
        state_dict: tensors by name.
        family: whose names they carry.
        config: the model that they are for.

    Raises:
        CheckpointError: as `from_hf`.
    """
    given = {_with_prefix(name, family): tensor for name, tensor in state_dict.items() if not is_derived(name)}
    if config.tied_embeddings and (head := given.pop(head_of(family), None)) is not None:
        # Of a tied pair either may be stored; of two that differ the caller knows.
        given.setdefault(embedding_of(family), head)
    tensors = hf_tensors(family, config, given)
    _refuse_other_names({tensor.name for tensor in tensors}, set(given), family)
    wrong = [
        f"  {tensor.name}: {tuple(given[tensor.name].shape)}, wanted {tensor.shape}"
        for tensor in tensors
        if tuple(given[tensor.name].shape) != tensor.shape
    ]
    if wrong:
        raise CheckpointError(
            "tensors do not have the shapes of the configured model:\n" + "\n".join(_some(wrong)),
        )
    ours: dict[str, Tensor | list[Tensor]] = {}
    for tensor in tensors:
        for name, part in zip(tensor.parts, tensor.split(given[tensor.name]), strict=True):
            if tensor.expert is None:
                ours[name] = part
                continue
            rows = ours.setdefault(name, [])
            assert isinstance(rows, list), name
            rows.append(part)
    return {name: ours[name] for name in our_shapes(config)}


def hf_tensors(family: Family, config: ModelConfig, names: Iterable[str] = ()) -> list[HFTensor]:
    """List the tensors that `Decoder(config)` has in a Hugging Face state dict; a tied head is none, as in their files.

    Args:
        family: the Hugging Face family.
        config: of the model.
        names: of the tensors of a file, which say whether experts have a tensor each; none: they do.

    Raises:
        CheckpointError: a family that is not known, or that has no counterpart of a parameter.
    """
    fused = is_fused(names, family)
    table = _FUSED_TABLES.get(family) if fused else None
    shapes, result = our_shapes(config), list[HFTensor]()
    parts, sources = dict[str, list[str]](), dict[str, HFSource]()
    for name, shape in shapes.items():  # query, key, value come in this order
        if (experts := expert_tensors(name, shape, family, fused)) is not None:
            result += experts
            continue
        source = _source(name, family, table)
        parts.setdefault(source.name, []).append(name)
        sources[source.name] = source
    for name, ours in parts.items():
        sizes = tuple(shapes[part][0] for part in ours)
        joined = (sum(sizes), *shapes[ours[0]][1:])
        transposed = sources[name].transposed and len(joined) == 2
        blocks = config.kv_heads if sources[name].by_head else 1
        shape = joined[::-1] if transposed else joined
        result.append(HFTensor(name, shape, tuple(ours), transposed, sizes=sizes, blocks=blocks))
    return result


def to_hf(
    parameters: Mapping[str, Tensor], family: Family, config: ModelConfig, names: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Convert our parameters to a Hugging Face state dict, the inverse of `from_hf`; a tied head is left out.

    Args:
        parameters: every parameter of `Decoder(config)` by name.
        family: whose names to give.
        config: the model that they are of.
        names: as for `hf_tensors`.

    Raises:
        CheckpointError: a family that is not known; parameters that are missing or left over.
    """
    tensors = hf_tensors(family, config, names)
    given = {name for name in parameters if not (config.tied_embeddings and name == "head.weight")}
    _refuse_other_names({part for tensor in tensors for part in tensor.parts}, given, family)
    return {
        tensor.name: tensor.join([parameters[part][tensor.box(parameters[part].shape)] for part in tensor.parts])
        for tensor in tensors
    }


def our_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of `Decoder(config)`; a tied head is none of its own.

    Args:
        config: of the model.
    """
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Decoder(config).named_parameters()}


def _source(name: str, family: str, table: Mapping[str, HFSource] | None = None) -> HFSource:
    """Where our parameter `name` lies; its source's name is complete."""
    if family not in _TABLES:
        raise CheckpointError("this model family has no name table", got=family, allowed=", ".join(get_args(Family)))
    module, _, leaf = name.rpartition(".")
    layer = re.search(r"\d+", module)
    pattern = re.sub(r"\d+", "{i}", module)
    table = _TABLES[family] if table is None else table
    if pattern not in table:
        raise CheckpointError(
            f"a {family} checkpoint has no counterpart of '{name}'", fix="choose the preset that fits the checkpoint"
        )
    source = table[pattern]
    foreign = source.name.replace("{i}", layer.group()) if layer else source.name
    return HFSource(f"{foreign}.{_LEAVES.get(leaf, leaf)}", source.transposed, source.by_head)


def _with_prefix(name: str, family: str) -> str:
    """Return a name as the whole model has it: some files on the hub, as GPT-2's, were saved from the inner model."""
    if family not in _TABLES:
        return name
    inner, head = _INNER[family], _TABLES[family]["head"].name
    return name if name.startswith((inner, f"{head}.")) else f"{inner}{name}"


def _some(lines: list[str]) -> list[str]:
    return lines[:12] + ([f"  … and {len(lines) - 12} more"] if len(lines) > 12 else [])


def _refuse_other_names(wanted: set[str], given: set[str], family: str) -> None:
    missing, extra = sorted(wanted - given), sorted(given - wanted)
    if missing or extra:
        lines = [f"  missing:   {name}" for name in missing] + [f"  left over: {name}" for name in extra]
        raise CheckpointError(
            f"the tensors are not those of the configured {family} model:\n" + "\n".join(_some(lines)),
            fix="check model=… (layers, tied_embeddings, qk_norm, biases) against the checkpoint's config.json",
        )
