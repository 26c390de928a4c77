"""Whether a checkpoint means something: beyond its hashes, its parts are held against each other. No torch.

Whoever wants to can make hashes that fit. What is looked at here is what a run, an export or a generation would trip
over: the tensor files against the manifest, the state, the configuration, and what travels beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from orchestrator.checkpoint.format import CONFIG, STATE, StoredShard
from orchestrator.checkpoint.handover import read_reference, read_sums
from orchestrator.checkpoint.tensorfile import TensorFile
from orchestrator.checkpoint.verify import Checkpoint
from orchestrator.errors import UserError

REQUIRED = (STATE, CONFIG)


def contradictions(checkpoint: Checkpoint) -> Iterator[str]:
    """What does not fit, a line each; nothing where all does."""
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


def _optimizer(checkpoint: Checkpoint) -> Iterator[str]:
    """Averages of the optimizer have the shape of their weight, and each weight has both or none has."""
    tensors = checkpoint.manifest.tensors
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    for kind in ("exp_avg", "exp_avg_sq", "step"):
        prefix = f"optimizer.{kind}."
        found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for name in found.keys() - weights.keys():
            yield f"{prefix}{name} is of no weight"
        for name in weights.keys() - found.keys() if found else ():
            yield f"{prefix}{name} is missing"
        for name in sorted(found.keys() & weights.keys()):
            shape = () if kind == "step" else weights[name].shape
            if found[name].shape != shape:
                yield f"{prefix}{name} has shape {found[name].shape}, its weight {weights[name].shape}"


def _sums(checkpoint: Checkpoint) -> None:
    if unknown := sorted(read_sums(checkpoint).keys() - checkpoint.manifest.tensors.keys()):
        raise UserError(f"sums.json speaks of tensors that are not there: {', '.join(unknown[:3])}")


_LOOKS: dict[str, Callable[[Checkpoint], object]] = {
    STATE: Checkpoint.state,
    CONFIG: Checkpoint.config,
    "reference": read_reference,
    "sums": _sums,
}
