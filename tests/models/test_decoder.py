"""The decoder: masks, remat, tying, names, construction without memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from orchestrator.config.schema import ModelConfig
from orchestrator.errors import ConfigError
from orchestrator.models.decoder import Decoder, resolved_head_dim
from orchestrator.models.remat import apply_remat, remat_function
from orchestrator.sharding.axes import LOGICAL_AXES

Make = Callable[..., Decoder]
GPT2 = {
    "norm": "layer",
    "activation": "gelu",
    "positions": "learned",
    "attention_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "tied_embeddings": True,
    "kv_heads": 4,
}
KINDS = {
    "llama": {},
    "qwen3": {"qk_norm": True, "tied_embeddings": True, "head_dim": 20},
    "gpt2": GPT2,
    "window": {"sliding_window": 5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_documents_packed_into_one_sequence_are_as_if_run_alone(make_model: Make, kind: str) -> None:
    model = make_model(**KINDS[kind])
    lengths = [7, 1, 12, 4]
    generator = torch.Generator().manual_seed(3)
    alone = [torch.randint(0, 97, (1, length), generator=generator) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    documents = torch.cat([torch.full((length,), index) for index, length in enumerate(lengths)])[None]
    packed = model(torch.cat(alone, 1), positions=positions, documents=documents)
    separate = torch.cat([model(part) for part in alone], 1)
    torch.testing.assert_close(packed, separate, atol=1e-5, rtol=0)


def test_rope_sees_only_distances_within_a_document(make_model: Make, tokens: torch.Tensor) -> None:
    model = make_model()
    documents = (torch.arange(24) // 10).expand(2, -1)
    restarted = (torch.arange(24) % 10).expand(2, -1)
    torch.testing.assert_close(
        model(tokens, documents=documents),
        model(tokens, documents=documents, positions=restarted),
        atol=1e-5,
        rtol=0,
    )


def test_attention_is_causal_and_window_is_respected(make_model: Make, tokens: torch.Tensor) -> None:
    model = make_model(layers=1, sliding_window=4)
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 97
    differs = (model(tokens) - model(changed)).abs().amax((0, 2)) > 1e-6
    assert differs.nonzero().flatten().tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_sum_over_targets(make_model: Make, tokens: torch.Tensor, kind: str) -> None:
    model = make_model(loss_chunk_tokens=7, **KINDS[kind])
    targets = tokens.roll(-1, 1).clone()
    targets[:, -1] = -100
    loss = model(tokens, targets=targets)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)


def test_logits_of_one_position_of_each_row(make_model: Make, tokens: torch.Tensor) -> None:
    model, at = make_model(), torch.tensor([23, 4])
    found = model(tokens, at=at)
    torch.testing.assert_close(found, model(tokens)[torch.arange(2), at].unsqueeze(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_remat_gives_bitwise_the_same_gradients(make_model: Make, tokens: torch.Tensor, policy: str, kind: str) -> None:
    model = make_model(dropout=0.1, **KINDS[kind])
    documents = (torch.arange(24) // 10).expand(2, -1)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        model(tokens, documents=documents, targets=tokens).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    plain = gradients()
    apply_remat(model, policy)  # type: ignore[arg-type]
    again = gradients()
    assert len(plain) == len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_remat_keeps_fewer_activations(make_model: Make, tokens: torch.Tensor) -> None:
    def kept(policy: str) -> int:
        model = make_model()
        apply_remat(model, policy)  # type: ignore[arg-type]
        seen: dict[int, int] = {}
        parameters = {parameter.data_ptr() for parameter in model.parameters()}

        def pack(t: torch.Tensor) -> torch.Tensor:
            if t.data_ptr() not in parameters:
                seen[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(tokens, targets=tokens)
        return sum(seen.values())

    assert kept("full") < kept("none") / 2


def test_remat_with_a_foreign_checkpoint_function(make_model: Make, tokens: torch.Tensor) -> None:
    calls = []

    def foreign(function: Callable[..., torch.Tensor], *args: object) -> torch.Tensor:
        calls.append(function)
        return function(*args)

    model = make_model()
    apply_remat(model, "full", foreign)
    model(tokens)
    assert len(calls) == 2
    with pytest.raises(ConfigError, match="selective"):
        remat_function("selective", foreign)


def test_dropout_acts_in_training_only(make_model: Make, tokens: torch.Tensor) -> None:
    model = make_model(dropout=0.5)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    torch.testing.assert_close(model(tokens), make_model()(tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_known_logical_axes_and_an_initialiser(make_model: Make, kind: str) -> None:
    model = make_model(**KINDS[kind])
    axes, shapes = model.logical_axes(), {name: p.shape for name, p in model.named_parameters()}
    assert set(axes) == set(shapes) == set(model.initializers())
    assert all(len(axes[name]) == len(shape) for name, shape in shapes.items())
    assert {axis for names in axes.values() for axis in names} <= set(LOGICAL_AXES)
    assert ("head.weight" in axes) != model.config.tied_embeddings


def test_logical_axes_of_a_layer(make_model: Make) -> None:
    axes = make_model(**GPT2, qk_norm=True).logical_axes()
    assert axes["embed.weight"] == ("vocab", "embed")
    assert axes["positions.weight"] == ("positions", "embed")
    assert axes["layers.0.attn.k.weight"] == ("kv_heads", "embed")
    assert axes["layers.0.attn.q.bias"] == ("heads",)
    assert axes["layers.0.attn.o.weight"] == ("embed", "heads")
    assert axes["layers.0.attn.o.bias"] == ("embed",)
    assert axes["layers.0.attn.q_norm.weight"] == ("head_dim",)
    assert axes["layers.0.mlp.up.bias"] == ("mlp",)
    assert axes["layers.0.mlp.down.weight"] == ("embed", "mlp")
    assert axes["layers.0.mlp_norm.bias"] == ("norm",)


def test_initialisers(make_model: Make) -> None:
    init = make_model(**GPT2).initializers()
    assert init["embed.weight"].std == 0.02
    assert init["layers.1.attn.o.weight"].std == init["layers.1.mlp.down.weight"].std == 0.01  # 0.02 / sqrt(2 * 2)
    assert init["layers.0.attn_norm.weight"].kind == "ones"
    assert init["layers.0.attn_norm.bias"].kind == init["layers.0.attn.q.bias"].kind == "zeros"


@pytest.mark.parametrize("kind", KINDS)
def test_built_on_meta_and_filled_it_computes_the_same(make_model: Make, tokens: torch.Tensor, kind: str) -> None:
    model = make_model(**KINDS[kind])
    with torch.device("meta"):
        twin = Decoder(model.config)
    assert all(parameter.is_meta for parameter in twin.parameters())
    assert not list(twin.buffers())
    twin.to_empty(device="cpu")
    twin.tie_weights()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(tokens), model(tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_nothing_back_to_the_host(make_model: Make, kind: str) -> None:
    """On meta any read of a value, and any shape that depends on one, is an error: so it traces under XLA."""
    with torch.device("meta"):
        model = Decoder(make_model(**KINDS[kind]).config)
        tokens = torch.zeros(2, 24, dtype=torch.int64)
    model(tokens, positions=tokens, documents=tokens, targets=tokens).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_tie_weights_again_after_the_parameter_was_replaced(make_model: Make) -> None:
    model = make_model(tied_embeddings=True)
    assert model.head.weight is model.embed.weight
    model.embed.weight = torch.nn.Parameter(model.embed.weight.detach().clone())
    model.tie_weights()
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_a_rank_with_some_of_the_heads_runs_the_same_code(make_model: Make, tokens: torch.Tensor) -> None:
    model = make_model()
    attention = model.layers[0].attn
    x = torch.randn(2, 24, 48)
    whole = attention(x)
    parts = []
    for rank in range(2):
        half = make_model().layers[0].attn
        rows, kv_rows = slice(24 * rank, 24 * (rank + 1)), slice(12 * rank, 12 * (rank + 1))
        half.q.weight = torch.nn.Parameter(attention.q.weight[rows])
        half.k.weight = torch.nn.Parameter(attention.k.weight[kv_rows])
        half.v.weight = torch.nn.Parameter(attention.v.weight[kv_rows])
        half.o.weight = torch.nn.Parameter(attention.o.weight[:, rows])
        parts.append(half(x))
    torch.testing.assert_close(parts[0] + parts[1], whole, atol=1e-5, rtol=0)


def test_sizes_that_cannot_be_resolved() -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        Decoder(ModelConfig())
    with pytest.raises(ConfigError, match="divided among the heads"):
        resolved_head_dim(ModelConfig(dim=50, heads=4))
    assert resolved_head_dim(ModelConfig(dim=50, heads=4, head_dim=16)) == 16


def test_bf16_activations_stay_close(make_model: Make, tokens: torch.Tensor) -> None:
    model = make_model(qk_norm=True)
    expected = model(tokens, targets=tokens)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(tokens, targets=tokens)
    cast = model.to(torch.bfloat16)(tokens, targets=tokens)
    assert autocast.dtype == cast.dtype == torch.float32
    torch.testing.assert_close(autocast, expected, atol=0, rtol=2e-2)
    torch.testing.assert_close(cast, expected, atol=0, rtol=2e-2)
    cast.backward()
    assert model.head.weight.grad is not None
    assert model.head.weight.grad.dtype == torch.bfloat16
