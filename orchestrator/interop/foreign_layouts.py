"""State dicts of other software by their names: what they are, where they cannot be read as what a model wants."""

from __future__ import annotations

import re
from collections.abc import Iterable

from orchestrator.errors import CheckpointError

_TO_TRANSFORMERS = "convert them to the format of transformers with that software's own tool"
# A name of a tensor -> what software writes such names, and what to do.
_QUANTISED = (
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\.(absmax|quant_map|quant_state(\..*)?|SCB)$", "bitsandbytes"),
    (r"\.weight_scale(_inv)?$|\.weight_packed$", "FP8 or compressed-tensors"),
    (r"\.scales$", "MLX or another"),
)
_LAYOUTS = (
    (r"\blora_[AB]\b", "an adapter of peft", "merge it into its model: merge_and_unload() of peft"),
    (r"^transformer\.h\.\d+\.(attn\.(attn|qkv)|norm_1)\.", "LitGPT", "litgpt convert_from_litgpt"),
    (r"(^|\.)tok_embeddings\.weight$", "Meta's and Mistral's own code, or torchtitan", _TO_TRANSFORMERS),
    (r"(^|\.)word_embeddings\.weight$", "Megatron or BLOOM", _TO_TRANSFORMERS),
    (r"(^|\.)(linear_qkv|query_key_value)\.weight$", "Megatron or GPT-NeoX", _TO_TRANSFORMERS),
)
_NANOGPT = re.compile(r"^transformer\.h\.\d+\.attn\.c_attn\.weight$")


def refuse_quantised(names: Iterable[str]) -> None:
    """Refuse weights whose names say that they are quantised: codes and scales.

    Args:
        names: of the tensors.

    Raises:
        CheckpointError: they do.
    """
    for name in names:
        for pattern, method in _QUANTISED:
            if re.search(pattern, name):
                raise CheckpointError(
                    f"the weights are quantised ({method}), and cannot be trained on",
                    got=f"tensor '{name}'"[:200],
                    allowed="weights in fp32, bf16 or fp16",
                    fix="import the model that they were made from",
                )


def known_layout(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> CheckpointError | None:
    """Make the error for weights of other software that is recognised by their names; None if none is.

    Args:
        shapes: name and shape of each tensor.
    """
    for name, shape in shapes:
        if _NANOGPT.match(name) and len(shape) == 2 and shape[0] == 3 * shape[1]:
            return CheckpointError(
                "the tensors are those of nanoGPT, whose matrices are the transpose of GPT-2's of transformers",
                got=f"{name}: {shape}",
                fix="transpose attn.c_attn, attn.c_proj, mlp.c_fc and mlp.c_proj, and give config= of GPT-2's kind",
            )
        for pattern, software, fix in _LAYOUTS:
            if re.search(pattern, name):
                return CheckpointError(
                    f"the tensors have the names of {software}, which are not read here",
                    got=f"tensor '{name}'"[:200],
                    allowed="the names of transformers, or of this product",
                    fix=fix,
                )
    return None
