"""Operations per token, against counts of the operations that torch runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.config.schema import ModelConfig
from orchestrator.errors import ConfigError
from orchestrator.models.decoder import Decoder
from orchestrator.planner.estimate.flops import flops_per_token, mean_attended, parameter_count

CONFIG = ModelConfig(vocab_size=128, dim=64, layers=3, heads=4, kv_heads=2, head_dim=24, mlp_dim=96)


def forward_flops(config: ModelConfig, seq_len: int) -> int:
    """Of one sequence; torch counts attention as if nothing were masked."""
    with torch.device("meta"):
        model = Decoder(config)
        tokens = torch.zeros(1, seq_len, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    return counter.get_total_flops()


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("tied", [False, True])
def test_three_times_what_torch_counts_forward(activation: str, tied: bool) -> None:
    config = ModelConfig(
        vocab_size=128, dim=64, layers=3, heads=4, kv_heads=4, head_dim=24, mlp_dim=96,
        activation=activation, tied_embeddings=tied,  # type: ignore[arg-type]
    )  # fmt: skip
    seq_len = 32
    skipped = 12 * config.layers * config.heads * 24 * seq_len / 2  # the masked half, which torch counts
    assert flops_per_token(config, seq_len) + skipped == 3 * forward_flops(config, seq_len) / seq_len


def test_attention_grows_with_the_sequence_and_stops_at_the_window() -> None:
    windowed = ModelConfig(vocab_size=128, sliding_window=16)
    assert mean_attended(ModelConfig(), 1024) == 512
    assert mean_attended(windowed, 16) == 8
    assert mean_attended(windowed, 1024) == 16 - 16 * 16 / 2048
    per_position = 12 * CONFIG.layers * CONFIG.heads * 24
    assert flops_per_token(CONFIG, 200) - flops_per_token(CONFIG, 100) == per_position * 50


def test_known_figure() -> None:
    """Llama 3 8B at 8192 tokens: 6 x 7.5e9 in the matrices, and 12 x 32 x 4096 x 4096 in attention."""
    llama = ModelConfig(vocab_size=128256, dim=4096, layers=32, heads=32, kv_heads=8, mlp_dim=14336)
    assert flops_per_token(llama, 8192) == pytest.approx(6 * 7.5046e9 + 12 * 32 * 4096 * 4096, rel=1e-4)


def test_vocabulary_left_to_the_tokenizer() -> None:
    assert parameter_count(ModelConfig(), 1000).embedding == 128_000
    with pytest.raises(ConfigError, match="vocabulary"):
        parameter_count(ModelConfig())
