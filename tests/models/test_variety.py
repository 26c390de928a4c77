"""Each way in which dense models differ, against the same written out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from orchestrator.config.schema import ModelConfig
from orchestrator.models.attention import AttentionCore, BlockedAttentionCore
from orchestrator.models.decoder import Decoder
from orchestrator.models.feed_forward import ACTIVATIONS, GATES
from orchestrator.models.kv_cache import KVCache
from orchestrator.models.loss import chunked_cross_entropy
from orchestrator.models.mask import CausalMask, additive, attention_mask
from orchestrator.models.norms import WidthRMSNorm
from tests.models.conftest import SMALL, randomise

B, H, KV, T, D = 2, 4, 2, 12, 6
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])


def by_hand(q, k, v, mask, scale, softcap, sinks):
    """Softmax attention, every score written out."""
    k, v = k.repeat_interleave(H // KV, 1), v.repeat_interleave(H // KV, 1)
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(1, H, 1, 1).expand(B, H, q.shape[2], 1)), -1)
    weights = scores.softmax(-1)
    return weights[..., : k.shape[2]] @ v


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, T, D), (B, KV, T, D), (B, KV, T, D), (H,))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("mask", ["none", "bool", "additive", "blocked"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_the_core_scales_caps_and_has_sinks(mask, softcap, sinks):
    documents = None if mask == "none" else DOCUMENTS
    window = None if mask == "none" else 4
    rule = CausalMask(queries=T, past=0, documents=documents, window=window, device=torch.device("cpu"))
    written = rule.whole()
    whole = torch.ones(T, T, dtype=torch.bool).tril() if written is None else written
    q, k, v, sink = given = tensors()
    core = AttentionCore(0.0, 0.7, softcap, sinks=sinks)
    more = (sink,) if sinks else ()
    if mask == "blocked":
        blocked = BlockedAttentionCore(core, 5, lambda function, *args: function(*args))
        got = blocked(q, k, v, rule, *more)
    else:
        got = core(q, k, v, additive(written, q.dtype) if mask == "additive" else written, *more)
    expected = by_hand(q, k, v, whole, 0.7, softcap, sink if sinks else None)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    wanted = given[: 3 + sinks]
    ours, theirs = (torch.autograd.grad(out.square().sum(), wanted, retain_graph=True) for out in (got, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_sink_takes_part_when_one_position_is_generated():
    q, k, v, sink = tensors()
    got = AttentionCore(sinks=True)(q[:, :, -1:], k, v, None, sink)
    everything = torch.ones(1, T, dtype=torch.bool)
    torch.testing.assert_close(got, by_hand(q[:, :, -1:], k, v, everything, D**-0.5, None, sink))


def test_activations_are_what_their_papers_write():
    x, up = torch.randn(64) * 4, torch.randn(64) * 6
    assert torch.equal(ACTIVATIONS["relu2"](x), x.clamp(min=0) ** 2)
    torch.testing.assert_close(ACTIVATIONS["gelu_erf"](x), x * 0.5 * (1 + torch.erf(x / 2**0.5)))
    gate = x.clamp(max=7.0)
    expected = gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1)
    torch.testing.assert_close(GATES["swiglu_clamped"](x, up), expected)
    torch.testing.assert_close(GATES["geglu"](x, up), F.gelu(x, approximate="tanh") * up)


def test_logits_are_bounded_in_the_loss_as_where_they_are_written_out():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 8, generator=generator).requires_grad_()
    weight = torch.randn(20, 8, generator=generator).requires_grad_()
    targets = torch.randint(0, 20, (10,), generator=generator).index_fill(0, torch.tensor([3]), -100)
    got = chunked_cross_entropy(hidden, weight, targets, 4, softcap=3.0)
    logits = 3.0 * torch.tanh(hidden @ weight.T / 3.0)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(got, expected)
    wanted = [torch.autograd.grad(loss, (hidden, weight)) for loss in (got, expected)]
    torch.testing.assert_close(*wanted)


def test_a_norm_over_the_width_is_the_usual_one_written_out():
    norm = WidthRMSNorm(24, 1e-5)
    randomise(norm)
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (24,), norm.weight, 1e-5))


def test_one_mask_is_made_for_each_window_and_shared(make_model, tokens):
    model, made = make_model(layers=6, windows=(4, 8, None)), []
    model.make_mask = lambda **given: made.append(given["window"]) or attention_mask(**given)
    seen = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    model(tokens)
    assert made == [4, 8, None]
    assert [seen[i] is seen[i + 3] for i in range(3)] == [True] * 3
    assert seen[2] is None


FEATURES = {
    "windows": {"windows": (5, None), "rope_local_theta": 100.0},
    "nope": {"rope_layers": (True, False), "rope_share": 0.5, "rope_layout": "interleaved"},
    "heads": {"layer_heads": (4, 6), "layer_kv_heads": (2, 3), "head_dim": 12},
    "sinks": {"attention_sinks": True, "windows": (5, None)},
    "gemma": {"norm": "rms_offset", "norm_placement": "both", "attention_softcap": 5.0, "activation": "geglu"},
    "width": {"qk_norm": True, "qk_norm_over": "width", "norm_placement": "post"},
    "parallel": {"residual": "parallel_one_norm", "norm": "layer_no_bias", "residual_scale": 0.5},
    "plain": {"norm": "rms_plain", "qk_norm": True, "qk_norm_after_rope": True, "logit_softcap": 4.0},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_cache_gives_the_logits_of_the_whole(make_model, tokens, feature):
    model = make_model(**FEATURES[feature]).eval()
    cache = KVCache(model.config.layers, 1)
    with torch.no_grad():
        whole = model(tokens[:1])
        cache.fill([0], [8], 8)
        parts = [model(tokens[:1, :8], cache=cache)]
        for at in range(8, 24):
            cache.step([1], 1)
            parts.append(model(tokens[:1, at : at + 1], cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_changes_what_is_computed(tokens, feature):
    plain = ModelConfig(**{**SMALL, "head_dim": 12})
    model, without = Decoder(replace(plain, **FEATURES[feature])), Decoder(plain)
    assert set(model.logical_axes()) == set(model.initializers()) == {name for name, _ in model.named_parameters()}
    randomise(model)
    randomise(without)
    assert not torch.allclose(model(tokens), without(tokens), atol=1e-3)


def test_heads_that_differ_by_layer_are_two_plain_layers(make_model, tokens):
    """Layer 0 of a model with (4, 6) heads is that of a model with 4, layer 1 that of one with 6."""
    model = make_model(**FEATURES["heads"])
    x = torch.randn(1, 7, 48)
    for layer, (heads, kv_heads) in enumerate(((4, 2), (6, 3))):
        plain = make_model(heads=heads, kv_heads=kv_heads, head_dim=12)
        plain.layers[0].load_state_dict(model.layers[layer].state_dict())
        torch.testing.assert_close(model.layers[layer](x), plain.layers[0](x))
