"""Checkpoints of a Lightning Trainer in the portable format: tensors as shards, everything else as JSON.

`state.json` has Lightning's loops, callbacks' states and schedulers under `trainer`. The random state of each process
travels as a row of a tensor. Nothing is pickled: what JSON cannot carry is left out, with one warning that names it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import MANIFEST
from orchestrator.checkpoint.plain_values import PlainEncoder, decode
from orchestrator.checkpoint.reader import Reader, read_into
from orchestrator.checkpoint.storage import is_remote, locate
from orchestrator.checkpoint.writer import Begun, Contents, write
from orchestrator.distributed.exchange import Coordinator, new_topic
from orchestrator.errors import CheckpointError, DamagedError, SaveError, UserError
from orchestrator.sharding.shard import Shard
from orchestrator.strategies.module_state import ModuleState, clean, part_of

BESIDE = "orchestrator"
"""Key of a checkpoint's dictionary by which a module's `on_save_checkpoint` adds to the portable checkpoint:
`state` (merged into `state.json`), `config` (of `config.yaml`) and `files` (by name, bytes)."""
_TRAINER, _OPTIMIZERS, _BITS, _VALUES = "trainer", "optimizers", "bits", "state_dict"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Ranks(Coordinator, Protocol):
    """What saving and loading ask of a strategy, beside the coordinator."""

    @property
    def root_device(self) -> torch.device:
        """The device of this process."""

    def any_raised(self, flag: bool) -> bool:
        """Return whether any rank calls with `flag` set."""


def save(checkpoint: dict[str, Any], filepath: Any, module: ModuleState, ranks: Ranks) -> None:
    """Write a checkpoint. All ranks call it together.

    Args:
        checkpoint: as `Trainer.dump_checkpoint` makes it.
        filepath: the directory that it becomes.
        module: what its tensors are.
        ranks: the processes.

    Raises:
        SaveError: it could not be written; what was there before is untouched.
        NonFiniteError: weights or optimizer state are not finite.
    """
    path = locate(ranks.broadcast(str(filepath)))
    if is_remote(path):
        raise SaveError(
            "a Trainer's checkpoints are directories of a file system",
            got=path,
            fix="give ModelCheckpoint(dirpath=...) a folder, or train with orchestrator.train, which saves to stores",
        )
    assert isinstance(path, Path)
    step = int(checkpoint["global_step"])
    rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states", BESIDE)}
    beside, weights = checkpoint.get(BESIDE, {}), checkpoint["state_dict"]
    with_optimizers = "optimizer_states" in checkpoint
    shards = module.shards(weights, with_optimizers)
    encoder = PlainEncoder(lambda tensor: _store(tensor, shards, ranks.rank))
    values = {clean(key): value for key, value in weights.items() if not isinstance(value, Tensor)}
    state = {
        **beside.get("state", {}),
        "step": step,
        _TRAINER: encoder.encode(rest),
        _VALUES: encoder.encode(values, "state_dict"),
        _OPTIMIZERS: module.describe_optimizers(encoder) if with_optimizers else None,
        _BITS: _hide_nonfinite_buffers(shards, module),
    }
    shards += _random_states(ranks)
    if encoder.left_out:
        rank_zero_warn(
            "The checkpoint is portable and nothing in it is pickled, so this is left out of it: "
            + "; ".join(dict.fromkeys(encoder.left_out))
        )
    contents = Contents(state, beside.get("config", {}), beside.get("files", {}))
    _write(path, step, shards, ranks, contents)


def _write(path: Path, step: int, shards: Sequence[Shard], ranks: Ranks, contents: Contents) -> None:
    """Write beside `path`, and put it there when it is complete."""
    staging = path.with_name(f".{path.name}.writing")
    problem = ""
    if ranks.rank == 0:
        problem = _tried(lambda: _clear(path, staging))
    problem, topic = json.loads(ranks.broadcast(json.dumps([problem, new_topic()])))
    write(Begun(staging, topic, problem), step, shards, ranks, contents)
    problem = _tried(lambda: _put(staging, path)) if ranks.rank == 0 else ""
    problem = ranks.broadcast(problem)
    if problem:
        raise SaveError(f"the checkpoint of step {step} could not be put into place: {problem}", got=path)


def _tried(action: Any) -> str:
    try:
        action()
    except (OSError, UserError) as error:
        return getattr(error, "what", None) or getattr(error, "strerror", None) or str(error)
    return ""


def _clear(path: Path, staging: Path) -> None:
    if os.path.lexists(staging):
        shutil.rmtree(staging)  # of a save that never ended
    if os.path.lexists(path) and not path.is_symlink() and not (path / MANIFEST).is_file():
        raise SaveError("something that is no checkpoint has this name", got=path)


def _put(staging: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.replaced")
    if os.path.lexists(old):
        shutil.rmtree(old)
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        path.rename(old)
    staging.rename(path)
    if os.path.lexists(old):
        shutil.rmtree(old)


def _store(tensor: Tensor, shards: list[Shard], rank: int) -> str:
    name = f"state.{sum(shard.name.startswith('state.') for shard in shards)}"
    shards.append(part_of(name, tensor, rank))
    return name


def _hide_nonfinite_buffers(shards: list[Shard], module: ModuleState) -> dict[str, str]:
    """Let buffers with infinities, such as attention masks, travel as whole numbers: weights must be finite.

    Returns:
        Name -> dtype of those that were replaced in `shards`.
    """
    hidden = {}
    names = module.buffer_names()
    for number, shard in enumerate(shards):
        if shard.name in names and shard.data.is_floating_point() and not bool(torch.isfinite(shard.data).all()):
            hidden[shard.name] = str(shard.data.dtype).removeprefix("torch.")
            shards[number] = _as_integers(shard)
    return hidden


def _as_integers(shard: Shard) -> Shard:
    data = shard.data.contiguous()
    return Shard(shard.name, shard.shape, shard.slices, data.view(_INTEGERS[data.element_size()]), shard.owned)


def _random_states(ranks: Ranks) -> list[Shard]:
    """Return the state of torch's generators, a row for each process."""
    return [_row(f"rng.{kind}", state, ranks) for kind, state in _generators(ranks).items()]


def _generators(ranks: Ranks) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    device = ranks.root_device
    if device.type not in ("cpu", "xla"):
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def _row(name: str, state: Tensor, ranks: Ranks) -> Shard:
    rank, count = ranks.rank, state.numel()
    return Shard(name, (ranks.size, count), (slice(rank, rank + 1), slice(0, count)), state.reshape(1, -1).clone())


# --- loading ----------------------------------------------------------------------------------------


def load(filepath: Any, module: ModuleState, ranks: Ranks, strict: bool = True) -> dict[str, Any]:
    """Fill a module and its optimizers. All ranks call it together.

    Args:
        filepath: directory of the checkpoint, of a Trainer's or of a run of the product.
        module: placed; with optimizers, if the training is to go on.
        ranks: the processes.
        strict: every tensor of the module is in the checkpoint, and the other way round.

    Returns:
        The dictionary that Lightning has saved, without tensors.

    Raises:
        CheckpointError: it is none, or of another module or optimizer.
        DamagedError: it is not what was written.
    """
    checkpoint = _open(filepath, ranks)
    state = checkpoint.state()
    trainer, optimizers = state.get(_TRAINER), state.get(_OPTIMIZERS)
    if trainer is None and module.optimizers:
        raise CheckpointError(
            "the checkpoint is of a run of orchestrator and not of a Trainer: it has no state of Lightning's loops",
            got=checkpoint.directory,
            fix="go on with resume=..., or load its weights alone: trainer.validate(..., ckpt_path=...)",
        )
    going_on = bool(module.optimizers) and optimizers is not None
    if optimizers is not None and going_on:
        module.prepare_optimizers(optimizers, checkpoint.manifest.tensors)
    shards = module.shards(optimizers=going_on)
    if not strict:
        shards = [shard for shard in shards if shard.name in checkpoint.manifest.tensors]
    hidden = state.get(_BITS, {})
    wanted = [_as_integers(shard) if shard.name in hidden else shard for shard in shards]
    rows = _matching_rows(checkpoint, ranks) if going_on else []
    ignore = [*([] if going_on else ["optimizer."]), *([] if strict else ["model."])]
    read_into(checkpoint, [*wanted, *rows], ignore, check=ranks)
    module.adopt(shards, going_on)
    _set_generators(rows, ranks)
    reader = Reader(checkpoint)
    if values := decode(state.get(_VALUES, {}), reader.tensor):
        module.module.load_state_dict(values, strict=False)
    return {**_of_a_run(checkpoint), **decode(trainer or {}, reader.tensor), "state_dict": {}}


def _of_a_run(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"epoch": 0, "global_step": checkpoint.step, "pytorch-lightning_version": lightning.__version__}


def _open(filepath: Any, ranks: Ranks) -> Checkpoint:
    """Open the checkpoint on all ranks or on none: what one alone cannot read must not leave the others waiting."""
    path = locate(ranks.broadcast(str(filepath)))
    problem, checkpoint = None, None
    try:
        if isinstance(path, Path) and path.is_file():
            raise CheckpointError(
                "the checkpoint is a file: this strategy reads portable checkpoints, which are directories",
                got=path,
                fix="a pickled one of another strategy is never loaded: load it with that one, and save its weights",
            )
        checkpoint = Checkpoint(path, look=ranks.rank == 0)
        checkpoint.state()
    except CheckpointError as error:
        problem = error
    if ranks.any_raised(problem is not None) or checkpoint is None:
        raise problem or DamagedError("another process cannot read the checkpoint", got=path)
    return checkpoint


def _matching_rows(checkpoint: Checkpoint, ranks: Ranks) -> list[Shard]:
    """Return this process's rows of the random states; none of other devices or another number of them."""
    rows = _random_states(ranks)
    stored = checkpoint.manifest.tensors
    fitting = [row for row in rows if row.name in stored and stored[row.name].shape == row.shape]
    return fitting if len(fitting) == len(rows) else []


def _set_generators(rows: Iterable[Shard], ranks: Ranks) -> None:
    for row in rows:
        if row.name == "rng.cpu":
            torch.set_rng_state(row.data[0])
        else:
            torch.get_device_module(ranks.root_device).set_rng_state(row.data[0], ranks.root_device)
