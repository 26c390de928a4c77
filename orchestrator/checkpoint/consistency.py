"""Consistency of a checkpoint beyond its hashes: its parts are compared with each other. No torch.

Hashes that fit can be forged. What is looked at here is what a run, an export or a generation would trip
over: the tensor files against the manifest, the state, the configuration, and what travels beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import CONFIG, STATE, StoredShard
from orchestrator.checkpoint.reference import read_reference, read_sums
from orchestrator.checkpoint.tensorfile import TensorFile
from orchestrator.constants import CODE_BLOCK, SCALE
from orchestrator.errors import UserError

REQUIRED = (STATE, CONFIG)


def contradictions(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield a line for each part of a checkpoint that contradicts another.

    Args:
        checkpoint: the checkpoint to read.
    """
    yield from (f"{name} is missing" for name in REQUIRED if name not in checkpoint.manifest.files)
    yield from _tensor_files(checkpoint)
    yield from _optimizer(checkpoint)
    for name, look in _LOOKS.items():
        if name not in REQUIRED or name in checkpoint.manifest.files:
            yield from _said(lambda look=look: look(checkpoint))  # type: ignore[misc]


def _said(look: Callable[[], object]) -> Iterator[str]:
    try:
        look()
    except UserError as error:
        yield error.what


def _tensor_files(checkpoint: Checkpoint) -> Iterator[str]:
    """Every entry of a tensor file is one shard of the manifest, with its dtype and shape, and the other way round."""
    wanted: dict[str, list[tuple[str, StoredShard, str]]] = {}
    for name, tensor in checkpoint.manifest.tensors.items():
        for shard in tensor.shards:
            wanted.setdefault(shard.file, []).append((name, shard, tensor.dtype))
    for file, shards in wanted.items():
        try:
            entries = TensorFile(checkpoint.directory / file).entries
        except (UserError, OSError) as error:
            yield getattr(error, "what", None) or f"{file} cannot be read: {error}"
            continue
        for name, shard, dtype in shards:
            entry, shape = entries.get(shard.key), tuple(b - a for a, b in zip(shard.start, shard.stop, strict=True))
            if entry is None:
                yield f"{file} has no '{shard.key}', which the manifest names"
            elif (entry.dtype, entry.shape) != (dtype, shape):
                yield f"{file}: '{shard.key}' is {entry.dtype} {entry.shape}, by the manifest {dtype} {shape} of {name}"
        times = Counter(shard.key for _, shard, _ in shards)
        yield from (f"{file}: '{key}' stands for several shards" for key, count in times.items() if count > 1)
        yield from (f"{file}: '{key}' belongs to no tensor" for key in entries if key not in times)


# What the optimizers here keep of a weight: docs/optimizers.md. Of a user's own one nothing is known beforehand.
_STATES = (
    frozenset({"exp_avg", "exp_avg_sq", "step"}),
    frozenset({"exp_avg", f"exp_avg{SCALE}", "exp_avg_sq", f"exp_avg_sq{SCALE}", "step"}),
    frozenset({"momentum_buffer"}),
    frozenset({"row_var", "col_var", "step"}),
    frozenset({"variance", "step"}),
)


_OF_ISLANDS = ("island_", "outer_")  # what runs with islands keep beside an optimizer's state: docs/islands.md
_ENCODED = "outer_update_"  # bytes of an exchange
_CODED = ("exp_avg", "exp_avg_sq")  # what may be kept as codes of 8 bits, with a scale for each block


def _optimizer(checkpoint: Checkpoint) -> Iterator[str]:
    """Each tensor of the optimizer is a scalar or fits its weight, and of each weight all of its state is there."""
    tensors = checkpoint.manifest.tensors
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    kinds: dict[str, set[str]] = {}
    for full in sorted(name for name in tensors if name.startswith("optimizer.")):
        kind, _, name = full.removeprefix("optimizer.").partition(".")
        if not kind.startswith(_OF_ISLANDS):
            kinds.setdefault(name, set()).add(kind)
        if name not in weights:
            yield f"{full} is of no weight"
        elif kind.startswith(_ENCODED):
            continue
        elif tensors[full].shape not in _shapes(kind, weights[name].shape):
            yield f"{full} has shape {tensors[full].shape}, its weight {weights[name].shape}"
        elif (
            kind in _CODED and tensors[full].dtype in ("I8", "U8") and f"optimizer.{kind}{SCALE}.{name}" not in tensors
        ):
            yield f"optimizer.{kind}{SCALE}.{name} is missing, without which the codes of {full} mean nothing"
    everywhere = frozenset().union(*kinds.values())
    if everywhere and everywhere <= frozenset().union(*_STATES):
        for name in sorted(weights):
            has = kinds.get(name, set())
            if any(state <= has for state in _STATES):
                continue
            meant = max(_STATES, key=lambda state: (len(state & has), len(state & everywhere)))
            yield from (f"optimizer.{kind}.{name} is missing" for kind in sorted(meant - has))


def _shapes(kind: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the shapes that state of a kind may have for a weight of `shape`."""
    if kind == "step":
        return ((),)
    if kind in ("row_var", "col_var") and len(shape) == 2:
        return ((shape[0], 1) if kind == "row_var" else (1, shape[1]),)
    if kind.endswith(SCALE) and kind.removesuffix(SCALE) in _CODED and shape and shape[-1] % CODE_BLOCK == 0:
        return ((*shape[:-1], shape[-1] // CODE_BLOCK),)
    return (shape,) if any(kind in state for state in _STATES) else ((), shape)


def _sums(checkpoint: Checkpoint) -> None:
    if unknown := sorted(read_sums(checkpoint).keys() - checkpoint.manifest.tensors.keys()):
        raise UserError(f"sums.json speaks of tensors that are not there: {', '.join(unknown[:3])}")


_LOOKS: dict[str, Callable[[Checkpoint], object]] = {
    STATE: Checkpoint.state,
    CONFIG: Checkpoint.config,
    "reference": read_reference,
    "sums": _sums,
}
