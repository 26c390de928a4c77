"""The work of one decoder layer: elements, matrix products, and bytes that cross the memory."""

from __future__ import annotations

import functools
from typing import NamedTuple

from orchestrator.planner.spec import ModelShape


class Product(NamedTuple):
    """`copies` matrix products of (rows, inner) with (inner, columns)."""

    copies: float
    rows: float
    inner: float
    columns: float

    @property
    def flops(self) -> float:
        """Floating-point operations of all copies."""
        return 2 * self.copies * self.rows * self.inner * self.columns

    @property
    def elements(self) -> float:
        """Read and written, each once."""
        return self.copies * (self.rows * (self.inner + self.columns) + self.inner * self.columns)


class LayerElements(NamedTuple):
    """Parameters of one layer, by how they can be split.

    Attributes:
        attention: projections of the attention.
        mlp: a dense block, or the shared experts of a sparse one.
        experts: all routed experts together.
        router: scores of the experts; no axis splits it.
        norms: scales; no tensor axis splits them.
    """

    attention: int
    mlp: int
    experts: int
    router: int
    norms: int

    @property
    def total(self) -> int:
        """Parameters of the layer."""
        return self.attention + self.mlp + self.experts + self.router + self.norms


@functools.lru_cache(maxsize=256)
def layer_elements(shape: ModelShape, sparse: bool) -> LayerElements:
    """Count the parameters of a dense or a sparse layer.

    Args:
        shape: of the model.
        sparse: whether the layer has routed experts.
    """
    per_width = (3 if shape.gated else 2) * shape.dim
    dense = shape.shared_width if sparse else shape.mlp_dim
    experts = shape.experts * per_width * shape.expert_dim if sparse else 0
    router = shape.dim * shape.experts if sparse else 0
    return LayerElements(_attention_elements(shape), per_width * dense, experts, router, 2 * shape.dim)


@functools.lru_cache(maxsize=256)
def sparse_layers(shape: ModelShape) -> int:
    """Return the number of layers that have routed experts.

    Args:
        shape: of the model.
    """
    return shape.layers - shape.dense_layers if shape.experts else 0


@functools.lru_cache(maxsize=256)
def parameters(shape: ModelShape) -> int:
    """Count all elements of the model, a tied weight once.

    Args:
        shape: of the model.
    """
    sparse = sparse_layers(shape)
    layers = sparse * layer_elements(shape, True).total + (shape.layers - sparse) * layer_elements(shape, False).total
    ends = shape.vocab * shape.dim * (1 if shape.tied else 2) + shape.dim + shape.learned_positions * shape.dim
    return layers + ends


@functools.lru_cache(maxsize=256)
def mean_attended(shape: ModelShape, seq_len: int, causal: bool = True, block: int = 0) -> float:
    """Return how many positions a query is multiplied with, averaged over a sequence and over the layers.

    Args:
        shape: of the model.
        seq_len: tokens of a sequence.
        causal: what lies after the query is skipped.
        block: positions that a windowed kernel computes beyond the window, since it skips whole blocks only.
    """
    everything = seq_len / 2 if causal else float(seq_len)
    if shape.window is None or shape.window >= seq_len:
        return everything
    near = shape.window - shape.window**2 / (2 * seq_len) if causal else everything
    near = min(everything, near + block)
    share = shape.global_layers / shape.layers
    return share * everything + (1 - share) * near


def score_width(shape: ModelShape) -> int:
    """Return the elements of a query and a value that each pair of positions costs a multiplication and an addition.

    Args:
        shape: of the model.
    """
    return shape.heads * (2 * shape.head_dim + shape.rope_dim)


@functools.lru_cache(maxsize=256)
def model_flops_per_token(shape: ModelShape, seq_len: int, causal: bool = True) -> float:
    """Count forward and backward FLOPs per token, without recomputation: `6 N + 6 L W S`.

    It is `flops.flops_per_token` for any `ModelShape`. W is `score_width` (2 H Q for ordinary attention), S the mean
    number of positions seen. With `causal=False` S is the whole sequence, which is the convention of the PaLM paper
    and of many benchmarks.

    Args:
        shape: of the model.
        seq_len: tokens of a sequence.
        causal: whether what the mask hides is left out of S.
    """
    sparse = sparse_layers(shape)
    active = shape.experts_per_token * (3 if shape.gated else 2) * shape.dim * shape.expert_dim
    matrices = shape.vocab * shape.dim
    for count, kind in ((sparse, layer_elements(shape, True)), (shape.layers - sparse, layer_elements(shape, False))):
        matrices += count * (kind.attention + kind.mlp + kind.router + (active if kind.experts else 0))
    return 6.0 * matrices + 6.0 * shape.layers * score_width(shape) * mean_attended(shape, seq_len, causal)


@functools.lru_cache(maxsize=256)
def layer_flops_per_token(shape: ModelShape, seq_len: int, sparse: bool) -> float:
    """Count forward and backward FLOPs per token of one layer, as `model_flops_per_token` does of all.

    Args:
        shape: of the model.
        seq_len: tokens of a sequence.
        sparse: whether the layer is one of those with routed experts, if the model has any.
    """
    kind = layer_elements(shape, sparse and bool(shape.experts))
    active = kind.experts * shape.experts_per_token / shape.experts if kind.experts else 0
    matrices = kind.attention + kind.mlp + kind.router + active
    return 6.0 * matrices + 6.0 * score_width(shape) * mean_attended(shape, seq_len)


def layer_products(
    shape: ModelShape, tokens: float, tensor: int, expert: int, sparse: bool
) -> tuple[list[Product], list[Product]]:
    """List the matrix products of one layer's forward pass on one device, without those of attention itself.

    Args:
        shape: of the model.
        tokens: of the micro-batch on this device, before the tensor axis splits anything.
        tensor: devices over which a product is split.
        expert: devices over which the experts are split; each then multiplies the tokens of all of them.
        sparse: whether the layer has routed experts.

    Returns:
        The dense products, and those of the experts.
    """
    products = _attention_products(shape, tokens, tensor)
    gate = 2 if shape.gated else 1
    width = shape.shared_width if sparse else shape.mlp_dim
    if width:
        products.append(Product(1, tokens, shape.dim, gate * width / tensor))
        products.append(Product(1, tokens, width / tensor, shape.dim))
    if not sparse:
        return products, []
    local = shape.experts / expert
    rows = tokens * shape.experts_per_token / local
    up = Product(local, rows, shape.dim, gate * shape.expert_dim / tensor)
    return products, [up, Product(local, rows, shape.expert_dim / tensor, shape.dim)]


def _attention_elements(shape: ModelShape) -> int:
    width = shape.heads * shape.head_dim
    if not shape.latent_kv:
        return 2 * shape.dim * (width + shape.kv_heads * shape.head_dim)
    query_width = shape.heads * (shape.head_dim + shape.rope_dim)
    query = shape.dim * shape.latent_q + shape.latent_q * query_width if shape.latent_q else shape.dim * query_width
    return query + shape.dim * (shape.latent_kv + shape.rope_dim) + shape.latent_kv * 2 * width + width * shape.dim


def _attention_products(shape: ModelShape, tokens: float, tensor: int) -> list[Product]:
    width = shape.heads * shape.head_dim / tensor
    out = Product(1, tokens, width, shape.dim)
    if not shape.latent_kv:
        kv_width = max(shape.kv_heads / tensor, 1) * shape.head_dim
        return [Product(1, tokens, shape.dim, width + 2 * kv_width), out]
    query_width = shape.heads * (shape.head_dim + shape.rope_dim) / tensor
    query = (
        [Product(1, tokens, shape.dim, shape.latent_q), Product(1, tokens, shape.latent_q, query_width)]
        if shape.latent_q
        else [Product(1, tokens, shape.dim, query_width)]
    )
    down = Product(1, tokens, shape.dim, shape.latent_kv + shape.rope_dim)
    return [*query, down, Product(1, tokens, shape.latent_kv, 2 * width), out]
