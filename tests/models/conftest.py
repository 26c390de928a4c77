"""Small models with random weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from orchestrator.config.schema import ModelConfig
from orchestrator.models.decoder import Decoder

SMALL = {"vocab_size": 97, "dim": 48, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_dim": 80, "max_seq_len": 64}


def randomise(model: torch.nn.Module, seed: int = 0, std: float = 0.1) -> None:
    """Random weights everywhere, norms and biases too, so that no term hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(base + std * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def make_model() -> Callable[..., Decoder]:
    def make(loss_chunk_tokens: int = 2048, **changes: object) -> Decoder:
        model = Decoder(ModelConfig(**{**SMALL, **changes}), loss_chunk_tokens)  # type: ignore[arg-type]
        randomise(model)
        return model

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(1))
