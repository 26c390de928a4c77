"""Scores that are bounded are computed tile by tile on one rank."""

from __future__ import annotations

import torch

from orchestrator.config.schema import ModelConfig
from orchestrator.models.attention import AttentionCore
from orchestrator.models.decoder import Decoder
from orchestrator.models.kv_cache import KVCache
from orchestrator.strategies.tiled_attention import TiledAttentionCore, attend_in_tiles
from tests.models.conftest import SMALL, randomise


def test_bounded_scores_are_computed_in_tiles():
    """Loss, gradients, and text behind a cache are those of scores that are written out; other models stay."""
    features = {"attention_softcap": 3.0, "attention_sinks": True, "windows": (5, None)}
    tokens = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    documents = (torch.arange(24) // 9).expand(2, -1)
    found = []
    for tiled in (False, True):
        model = Decoder(ModelConfig(**SMALL, **features))
        randomise(model)
        if tiled:
            attend_in_tiles(model)
        assert isinstance(model.layers[0].attn.core, TiledAttentionCore) == tiled
        loss = model(tokens, documents=documents, targets=tokens.roll(-1, 1))
        loss.backward()
        cache, text = KVCache(2, 2), []
        with torch.no_grad():
            cache.fill([0, 1], [20, 15], 20)
            text.append(model(tokens[:, :20], cache=cache))
            for counts in ([1, 0], [1, 1]):  # rows that agree, and rows that differ
                starts = torch.tensor(cache.step(counts, 1)).unsqueeze(1)
                text.append(model(tokens[:, 20:21], positions=starts, cache=cache)[: sum(counts)])
        found.append([loss.detach(), *text, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    plain = Decoder(ModelConfig(**SMALL))
    attend_in_tiles(plain)
    assert type(plain.layers[0].attn.core) is AttentionCore
