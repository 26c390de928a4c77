"""Initial weights do not depend on who draws them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.schema import ModelConfig
from orchestrator.models import init as init_module
from orchestrator.models.decoder import Decoder
from orchestrator.models.init import Init, draw_slice, rows_per_chunk

NORMAL = Init("normal", 0.02)
PINNED = [-0.9881166815757751, 1.6733192205429077, 0.6044283509254456, 0.4443033039569855]


def whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_slice_equals_that_slice_of_the_whole(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 700), min_size=1, max_size=2)))
    bounds = [sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in shape]
    slices = tuple(slice(low, high) for low, high in bounds)
    everything = draw_slice(NORMAL, "layers.0.attn.q.weight", 7, shape, whole(shape))
    part = draw_slice(NORMAL, "layers.0.attn.q.weight", 7, shape, slices)
    assert part.dtype == torch.float32
    assert torch.equal(part, everything[slices])


def test_only_overlapping_chunks_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    generator = init_module._generator
    monkeypatch.setattr(
        init_module, "_generator", lambda seed, name, chunk: drawn.append(chunk) or generator(seed, name, chunk)
    )
    shape = (4096, 256)
    rows = rows_per_chunk(shape)
    assert rows == 256
    draw_slice(NORMAL, "w", 0, shape, (slice(rows, 2 * rows + 1), slice(0, 10)))
    assert drawn == [1, 2]


def test_seed_name_and_chunk_all_matter() -> None:
    shape = (3000, 64)
    base = draw_slice(NORMAL, "w", 0, shape, whole(shape))
    assert torch.equal(base, draw_slice(NORMAL, "w", 0, shape, whole(shape)))
    assert not torch.equal(base, draw_slice(NORMAL, "w", 1, shape, whole(shape)))
    assert not torch.equal(base, draw_slice(NORMAL, "v", 0, shape, whole(shape)))
    rows = rows_per_chunk(shape)
    assert not torch.equal(base[:rows], base[rows : 2 * rows])


def test_values_are_pinned() -> None:
    """A change of the rule would change every run's weights."""
    got = draw_slice(Init("normal", 1.0), "embed.weight", 0, (4, 2), whole((4, 2)))
    torch.testing.assert_close(got.flatten()[:4], torch.tensor(PINNED), atol=0, rtol=0)


def test_moments() -> None:
    values = draw_slice(NORMAL, "w", 3, (1000, 500), whole((1000, 500)))
    assert abs(values.mean().item()) < 1e-4
    assert values.std().item() == pytest.approx(0.02, rel=5e-3)


def test_constant_kinds_and_empty_slices() -> None:
    assert torch.equal(draw_slice(Init("ones"), "n", 0, (5,), (slice(1, 4),)), torch.ones(3))
    assert torch.equal(draw_slice(Init("zeros"), "n", 0, (5,), whole((5,))), torch.zeros(5))
    assert draw_slice(NORMAL, "n", 0, (5, 4), (slice(5, 5), slice(0, 4))).shape == (0, 4)
    assert rows_per_chunk((3, 1 << 20)) == 1


def test_slices_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="2 dims"):
        draw_slice(NORMAL, "w", 0, (4, 4), (slice(0, 4),))
    with pytest.raises(ValueError, match="step 1"):
        draw_slice(NORMAL, "w", 0, (4,), (slice(0, 4, 2),))


def test_what_is_cut_off_is_drawn_again_whatever_the_part():
    shape = (3000, 40)
    init = Init("normal", 0.02, cutoff=1.5)
    whole = draw_slice(init, "w", 0, shape, (slice(0, 3000), slice(0, 40)))
    plain = draw_slice(Init("normal", 0.02), "w", 0, shape, (slice(0, 3000), slice(0, 40)))
    assert whole.abs().max() <= 0.02 * 1.5 + 1e-9
    kept = plain.abs() <= 0.02 * 1.5
    assert torch.equal(whole[kept], plain[kept]), "the others are as they were"
    assert whole.std() == pytest.approx(0.02 * 0.7428, rel=0.01)  # of a normal distribution cut at 1.5
    part = (slice(1500, 2500), slice(7, 21))
    assert torch.equal(draw_slice(init, "w", 0, shape, part), whole[part])


def test_spreads_follow_depth_and_place():
    config = ModelConfig(vocab_size=64, dim=32, layers=3, heads=2, kv_heads=2, mlp_dim=48, init_std=0.1)
    own = replace(config, init_depth="layer", embedding_init_std=1.0, head_init_std=0.5, init_cutoff=3.0)
    found = {name: one.std for name, one in Decoder(own).initializers().items()}
    assert found["embed.weight"] == 1.0
    assert found["head.weight"] == 0.5
    assert found["layers.1.attn.q.weight"] == 0.1
    assert [found[f"layers.{n}.mlp.down.weight"] for n in range(3)] == [0.1 / math.sqrt(2 * (n + 1)) for n in range(3)]
    assert {one.cutoff for one in Decoder(own).initializers().values() if one.kind == "normal"} == {3.0}
    plain = {name: one.std for name, one in Decoder(replace(config, init_depth="none")).initializers().items()}
    assert plain["layers.2.attn.o.weight"] == 0.1
    assert Decoder(config).initializers()["layers.0.attn.o.weight"].std == 0.1 / math.sqrt(6)
