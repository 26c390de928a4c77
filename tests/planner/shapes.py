"""Models and clusters that the planner's tests speak of."""

from __future__ import annotations

from orchestrator.chips.load import load_catalogue
from orchestrator.planner.spec import Cluster, JobSpec, ModelShape

LLAMA_8B = ModelShape("llama3_8b", 32, 4096, 14336, 32, 8, 128, 128256)
LLAMA_70B = ModelShape("llama3_70b", 80, 8192, 28672, 64, 8, 128, 128256)
MIXTRAL = ModelShape(
    "mixtral_8x7b", 32, 4096, 14336, 32, 8, 128, 32000, experts=8, experts_per_token=2, expert_dim=14336
)
DEEPSEEK_V3 = ModelShape(
    "deepseek_v3", 61, 7168, 18432, 128, 128, 128, 129280, experts=256, experts_per_token=8, shared_experts=1,
    expert_dim=2048, dense_layers=3, latent_q=1536, latent_kv=512, rope_dim=64,
)  # fmt: skip


def cluster(chip: str, chips: int, inter: float | None = None) -> Cluster:
    return Cluster(load_catalogue().get(chip), chips, inter)


def job(model: ModelShape = LLAMA_8B, sequences: int = 64, seq_len: int = 8192, **kwargs) -> JobSpec:
    return JobSpec(model, seq_len, sequences * seq_len, **kwargs)
