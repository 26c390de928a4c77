"""The protocol of a model that every strategy can shard, and everything else train, save and check.

A model is single-device code: no `torch.distributed`, no vendor's library, no device. It says what its parameters are
(`logical_axes`) and where its parts are, and a strategy cuts it. What holds for its modules:

- A block takes the residual stream [B, T, D] as its first positional argument and gives it back, alone or with the
  loss and the statistics of its router (`models.moe.Routing`). It is called positionally.
- Matrices that the tensor axis cuts (`heads`, `kv_heads`, `mlp`) are `nn.Linear`. Those that read the stream lie
  directly in a module below the block, such as its attention, whose first positional argument is what they read: a
  strategy gathers the whole sequence there. Those that write to the stream (`("embed", "heads")`) give one summand.
  Widths between them are a rank's part: count heads by the width that is there.
- Positions meet in an `AttentionCore` only (or a subclass of it), called as `core(q, k, v, mask)`, each query by
  itself. A model without one trains on every layout but those that split sequences (`layout.context`).
- A mixture of experts is a `models.moe.MoE`, which strategies divide as a whole.
- `begin`, `through` and `end` are the forward pass in parts: a pipeline's rank runs those of its layers. What lies in
  no block, `norm` or `head` belongs to the beginning. A model without them trains on every layout but pipelines.
- Everything else acts on each position by itself. No buffers: what is not a parameter is computed in `forward`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.config.schema import ModelConfig
from orchestrator.errors import ConfigError, LayoutError
from orchestrator.models.attention import AttentionCore, BlockedAttentionCore
from orchestrator.models.head import LMHead
from orchestrator.models.init import Init
from orchestrator.models.mask import CausalMask, attention_mask
from orchestrator.models.moe import MoE
from orchestrator.sharding.axes import ParameterAxes

Mask = Tensor | CausalMask | None  # what `AttentionCore` takes; see `models.attention`


class ShardableModel(nn.Module):
    """A decoder language model that strategies can shard. Subclass it; `Decoder` is one.

    A model of one's own is made as `Name(config, loss_chunk_tokens, **config.arguments)`, on the meta device.

    Attributes:
        config: its description. Read by others are `vocab_size`, a number; `tied_embeddings`; `dropout`, 0 where
            nothing random is drawn in training; and `max_seq_len`.
        embed: [V, D].
        norm: what the last block's output goes through before the head.
        head: the output head; its `ops` are replaced by strategies and by the handover check.
        make_mask: builds the attention mask of a forward pass, as `models.mask.attention_mask`; a strategy that splits
            sequences, or has another attention core, replaces it.
        routing: number of a layer with experts -> its router's statistics, summed since they were taken.
        init_factors: name of a parameter -> what scales the spread of its initial values in this run; others: 1.
    """

    config: ModelConfig
    embed: nn.Embedding
    norm: nn.Module
    head: LMHead
    make_mask: Callable[..., Mask]
    routing: dict[int, Tensor]
    init_factors: Mapping[str, float]

    def __init__(self) -> None:
        super().__init__()
        self.make_mask = attention_mask
        self.routing = {}
        self.init_factors = {}

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The layers in their order: what is gathered, recomputed and compiled as one."""

    @abstractmethod
    def logical_axes(self) -> ParameterAxes:
        """Return the logical axis (`sharding.axes`) of each dim of each parameter; a tied weight is listed once."""

    @abstractmethod
    def initializers(self) -> dict[str, Init]:
        """How each parameter starts, before `init_factors`."""

    def starts(self) -> dict[str, Init]:
        """How each parameter starts in this run."""
        factors = self.init_factors
        return {
            name: replace(init, std=init.std * factors.get(name, 1.0)) for name, init in self.initializers().items()
        }

    def tie_weights(self) -> None:
        """Let the head use the embedding's weight, where the configuration says so.

        To be called again after parameters were replaced: sharding and moving break the tie.
        """
        if self.config.tied_embeddings:
            self.head.weight = self.embed.weight

    def note_routing(self, layer: int, statistics: Tensor) -> None:
        """Add a router's statistics to those of its layer, in training.

        Args:
            layer: its number in the whole model.
            statistics: as in `models.moe.Routing`.
        """
        if self.training and torch.is_grad_enabled():
            self.routing[layer] = self.routing[layer] + statistics if layer in self.routing else statistics

    def take_routing(self) -> Tensor | None:
        """Return the routers' statistics [layers, ...] since the last call, zeros where a layer has none here.

        Returns:
            None where the model has no experts, or nothing was computed.
        """
        taken, self.routing = self.routing, {}
        if not taken:
            return None
        zeros = torch.zeros_like(next(iter(taken.values())))
        return torch.stack([taken.get(layer, zeros) for layer in range(self.config.layers)])

    def balance_experts(self, routing: Tensor, bad: Tensor) -> None:
        """Move the offsets that balance experts, by what a step's routers did.

        Args:
            routing: [layers, ...], `take_routing` summed over the job.
            bad: bool scalar; where it is true nothing moves.
        """

    @abstractmethod
    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Loss with targets, logits without.

        Args:
            tokens: [B, T] int64.
            positions: [B, T], position of each token in its document; None: counted from 0.
            documents: [B, T], an integer per document; attention does not leave it. None: one document.
            targets: [B, T], the token to be predicted at each position, -100 for none.

        Returns:
            fp32 scalar, the SUM of the cross-entropies over the targets; or logits [B, T, V].
        """

    def begin(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the residual stream that the first block takes, [B, T, D]: the embedding.

        Args:
            tokens: [B, T] int64.
            positions: [B or 1, T], as in `forward`; never None.
        """
        raise NotImplementedError

    def through(
        self, layers: range, x: Tensor, positions: Tensor, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Pass the residual stream through some blocks. What else these need is made of the arguments.

        Args:
            layers: their numbers in `blocks`.
            x: residual stream, [B, T or a rank's part of T, D].
            positions: [B or 1, T].
            documents: [B, T] or None.

        Returns:
            The stream behind them, and in training the sum of their routers' losses; None where they have none.
        """
        raise NotImplementedError

    def end(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return what `forward` does, but for the routers' losses: by the norm and the head.

        Args:
            x: residual stream behind the last block.
            targets: [B, T] or None.
        """
        raise NotImplementedError


_OF_HEAD = ("weights", "sources")


def run_on(model: ShardableModel, batch: Mapping[str, Tensor], **more: Any) -> Any:
    """Pass `batch` forward; its `weights` and `sources`, if any, go to the head, and `forward` gets the rest.

    Args:
        model: the model.
        batch: arguments of its `forward` by name; `weights` [B, T]: the factor on each target's cross-entropy; and
            `sources` [B, T]: the number of the source of each target.
        more: further arguments.
    """
    with model.head.weighted(batch.get("weights")), model.head.told_apart(batch.get("sources")):
        return model(**{name: value for name, value in batch.items() if name not in _OF_HEAD}, **more)


def attention_cores(model: ShardableModel) -> Iterator[tuple[nn.Module, str, AttentionCore]]:
    """Each attention core in the blocks of `model`: the module that holds it, its name there, and the core."""
    for block in model.blocks:
        for parent in block.modules():
            for name, child in parent.named_children():
                if isinstance(child, AttentionCore):
                    yield parent, name, child


def mixtures(model: ShardableModel) -> Iterator[tuple[str, MoE]]:
    """Each mixture of experts of `model`, with its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, MoE))


def attend_in_blocks(model: ShardableModel, block: int, checkpoint: Callable[..., Tensor]) -> None:
    """Let every layer of `model` attend as `BlockedAttentionCore`, whose arguments these are.

    Args:
        model: before it is sharded.
        block: queries whose scores exist at one time.
        checkpoint: the function that recomputes activations.
    """
    model.make_mask = CausalMask
    for parent, name, core in list(attention_cores(model)):
        setattr(parent, name, BlockedAttentionCore(core, block, checkpoint))


def gathering_modules(model: ShardableModel, axes: ParameterAxes, cut: Callable[[str], bool]) -> list[nn.Module]:
    """List the modules in the blocks that need the whole sequence: those with a matrix that reads the stream.

    Args:
        model: the model, before it is sharded.
        axes: `model.logical_axes()`.
        cut: whether the tensor axis cuts a logical axis.

    Raises:
        LayoutError: such a matrix lies directly in a block, whose input is a part of the sequence; or below such a
            module there is a parameter of the stream, whose gradient each rank would count.
    """
    found: dict[int, nn.Module] = {}
    names = {id(module): name for name, module in model.named_modules()}
    in_mixtures = {id(module) for _, mixture in mixtures(model) for module in mixture.modules()}
    blocks = {id(block) for block in model.blocks}
    for name, module in model.named_modules():
        of_weight = axes.get(f"{name}.weight", ())
        if id(module) in in_mixtures or not (isinstance(module, nn.Linear) and of_weight and cut(of_weight[0])):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        if id(parent) in blocks or parent is model:
            raise LayoutError(
                "the tensor axis cannot cut a matrix that lies directly in a block",
                got=f"{name} {of_weight}",
                fix="put it into a module of its own below the block, whose first argument is what it reads",
            )
        found[id(parent)] = parent
    for parent in found.values():
        for name, _ in parent.named_parameters(prefix=names[id(parent)]):
            if axes.get(name, ())[:1] == ("norm",):
                raise LayoutError(
                    "a module that sees the whole sequence holds a parameter of the residual stream",
                    got=f"{name} {axes[name]} in {names[id(parent)]}",
                    fix="put it into the block, before that module or after it; one head's width has the axis head_dim",
                )
    return list(found.values())


def check_model(model: object, key: str) -> ShardableModel:
    """Check that `model` is what the strategies need; it may be on the meta device.

    Args:
        model: the object to check.
        key: dotted key of the model in the configuration, for messages.

    Raises:
        ConfigError: the first thing that it lacks.
    """
    if not isinstance(model, ShardableModel):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        raise _lacks(key, f"{kind} is no orchestrator.models.protocol.ShardableModel", "subclass it")
    members: dict[str, type] = {"embed": nn.Embedding, "norm": nn.Module, "head": LMHead, "config": ModelConfig}
    for name, wanted in members.items():
        value = getattr(model, name, None)
        if not isinstance(value, wanted):
            raise _lacks(key, f"`{name}` is a {type(value).__name__}", f"set self.{name} to a {wanted.__name__}")
    if not callable(getattr(model, "make_mask", None)):
        raise _lacks(key, "`make_mask` is missing", "call super().__init__() first")
    blocks = list(model.blocks)
    inside = {id(module) for module in model.modules()}
    if not blocks or not all(isinstance(block, nn.Module) and id(block) in inside for block in blocks):
        raise _lacks(key, "`blocks` are not the layers of the model", "give the modules of an nn.ModuleList")
    if buffers := [name for name, _ in model.named_buffers()]:
        raise _lacks(key, f"the buffer '{buffers[0]}' would be lost when shards are made", "compute it in `forward`")
    rows, width = model.config.vocab_size, model.embed.weight.shape[1]
    if tuple(model.embed.weight.shape) != (rows, width) or tuple(model.head.weight.shape) != (rows, width):
        got = f"embed {tuple(model.embed.weight.shape)}, head {tuple(model.head.weight.shape)}"
        raise _lacks(key, got, f"make both [config.vocab_size={rows}, width]")
    _check_names(model, key)
    return model


def _check_names(model: ShardableModel, key: str) -> None:
    names = {name for name, _ in model.named_parameters()}
    for what, given in (("logical_axes", model.logical_axes()), ("initializers", model.initializers())):
        if odd := sorted(names ^ set(given)):
            raise _lacks(key, f"`{what}` and the parameters differ in '{odd[0]}'", "give an entry for each parameter")


def _lacks(key: str, got: str, fix: str) -> ConfigError:
    allowed = "a model as orchestrator.models.protocol describes it: docs/own-parts.md"
    return ConfigError("the model cannot be sharded", got=f"{key}: {got}", allowed=allowed, fix=fix)
