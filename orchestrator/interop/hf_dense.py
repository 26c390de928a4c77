"""Dense families of transformers that are described by a table entry each: their class, names and `config.json`.

To add one: a module with its entry, and the name of that entry in `FAMILIES`, and in `hf_weights.Family`.
"""

from __future__ import annotations

from orchestrator.interop import hf_cohere, hf_gemma, hf_llama_like, hf_moe_families, hf_neox, hf_olmo
from orchestrator.interop.hf_family import Dense

FAMILIES: dict[str, Dense] = {
    "gemma": hf_gemma.GEMMA,
    "gemma2": hf_gemma.GEMMA2,
    "gemma3_text": hf_gemma.GEMMA3,
    "olmo2": hf_olmo.OLMO2,
    "olmo3": hf_olmo.OLMO3,
    "smollm3": hf_llama_like.SMOLLM3,
    "granite": hf_llama_like.GRANITE,
    "phi3": hf_llama_like.PHI3,
    "glm4": hf_llama_like.GLM4,
    "gpt_neox": hf_neox.GPT_NEOX,
    "stablelm": hf_neox.STABLELM,
    "starcoder2": hf_neox.STARCODER2,
    "cohere": hf_cohere.COHERE,
    "cohere2": hf_cohere.COHERE2,
    "olmoe": hf_moe_families.OLMOE,
    "deepseek_v3": hf_moe_families.DEEPSEEK_V3,
    "gpt_oss": hf_moe_families.GPT_OSS,
}
