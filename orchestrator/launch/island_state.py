"""The checkpoint of a run with islands: one directory with the outer weights, the hub's state, and the islands' own.

It is a checkpoint like any other, whose weights are the outer ones: it is verified, compared, exported and evaluated as
such. The islands' own checkpoints lie in it, below `islands/NAME`; `state.json` says the hash of each one's manifest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import MANIFEST
from orchestrator.checkpoint.reader import read_into
from orchestrator.checkpoint.run_checkpoints import committed, prune, put_aside, set_aside, step_of
from orchestrator.checkpoint.signing import Trust
from orchestrator.checkpoint.storage import AnyPath, is_remote
from orchestrator.checkpoint.writer import Contents, begin, failure, write
from orchestrator.config.convert import to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.distributed.exchange import SingleProcess
from orchestrator.errors import CheckpointError, ConfigError, DamagedError
from orchestrator.islands.hub_state import HubState
from orchestrator.islands.island_messages import Terms
from orchestrator.launch.island_words import FOLDER
from orchestrator.runs.messages import warn
from orchestrator.runs.origin import model_files
from orchestrator.runs.stored_model import files_of
from orchestrator.sharding.shard import Shard

STATE_KEY = "islands"
_OUTER, _STORED = "outer.", "optimizer.outer_"  # as the hub calls its tensors, and as checkpoints do
_TORCH = {"F32": torch.float32, "U8": torch.uint8}


def save_run(parent: AnyPath, state: HubState, config: RunConfig) -> AnyPath:
    """Write the checkpoint of a run, and remove old ones.

    Args:
        parent: the directory of the run's checkpoints.
        state: of the hub.
        config: of the run, as the user has it.

    Returns:
        Its directory, committed.

    Raises:
        CheckpointError: it could not be written; earlier ones are untouched.
    """
    step, alone = int(state.plain["step"]), SingleProcess()
    begun = begin(parent, step, alone)
    if begun.problem:
        raise failure(step, begun.directory, begun.problem)
    saves: dict[str, dict[str, Any]] = {}
    for name, save in state.plain["saves"].items():
        saves[name] = {**save, "manifest": _place(Path(save["path"]), begun.directory, name)}
    lead = next((Checkpoint(begun.directory / FOLDER / name) for name, one in saves.items() if one["manifest"]), None)
    tensors = dict(state.tensors)
    if lead is not None and not any(name.startswith("model.") for name in tensors):
        tensors |= _read(lead, [name for name in lead.manifest.tensors if name.startswith("model.")])
    files = {**files_of(lead), **model_files(lead)} if lead is not None else {}
    contents = Contents(_state(state, config, lead, saves), to_dict(config), files, hash=config.checkpoint.hash)
    path = write(begun, step, [_shard(name, array) for name, array in tensors.items()], alone, contents)
    prune(parent, config.checkpoint.keep_last, config.checkpoint.keep_every_steps)
    return path


def _place(source: Path, directory: AnyPath, name: str) -> str:
    """Put an island's checkpoint below the run's. Returns the hash of its manifest; empty where it is not here."""
    if is_remote(directory) or not (source / MANIFEST).is_file():
        warn(f"the state of the island {name} is not in the run's checkpoint: it is not here ({source})")
        return ""
    target = Path(directory) / FOLDER / name
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if not file.is_file():
            continue
        try:
            os.link(file, target / file.name)  # checkpoints are never written into
        except OSError:
            shutil.copyfile(file, target / file.name)
    return hashlib.sha256((target / MANIFEST).read_bytes()).hexdigest()


def _state(
    state: HubState, config: RunConfig, lead: Checkpoint | None, saves: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return `state.json`: that of an island, at the step of the run."""
    found, step, plain = dict(lead.state()) if lead is not None else {}, state.plain["step"], state.plain
    found.pop("island", None)
    sequences = plain["leases"]["ledger"]["total"] - sum(b - a for a, b in plain["leases"]["ledger"]["pool"])
    data = {key: value for key, value in found.get("data", {}).items() if key != "lease"}
    batch = config.train.global_batch_tokens // config.train.seq_len
    found["data"] = {
        **data,
        "next_sequence": sequences,
        "tokens": step * config.train.global_batch_tokens,
        "global_batch_sequences": batch,
    }
    schedule = {"kind": config.optim.schedule.kind, "step": step, "max_steps": config.train.max_steps}
    return {**found, "step": step, "schedule": schedule, "run": plain["run"], STATE_KEY: {"hub": plain, "saves": saves}}


def _shard(name: str, array: np.ndarray[Any, Any]) -> Shard:
    stored = _stored(name)
    data = torch.from_numpy(np.array(array))
    return Shard(stored, tuple(data.shape), tuple(slice(0, length) for length in data.shape), data)


def read_run(directory: AnyPath, trusted: Trust = Trust()) -> HubState:
    """Read the state of a run from its checkpoint.

    Args:
        directory: of the checkpoint.
        trusted: whose checkpoints are believed.

    Raises:
        CheckpointError: it is damaged, or of a run without islands.
    """
    checkpoint = Checkpoint(directory, trusted)
    found = checkpoint.state().get(STATE_KEY)
    if not isinstance(found, dict) or not isinstance(found.get("hub"), dict):
        raise CheckpointError(
            "the checkpoint is of a run without islands",
            got=str(directory),
            fix=f"start islands from its weights: train.init_from={directory}",
        )
    plain = found["hub"]
    gradients = plain["terms"]["algorithm"] == "synchronous"
    names = [name for name in checkpoint.manifest.tensors if name.startswith(_STORED)]
    names += [] if gradients else [name for name in checkpoint.manifest.tensors if name.startswith("model.")]
    arrays = _read(checkpoint, names)
    return HubState({_own(name): array for name, array in arrays.items()}, plain)


def _stored(name: str) -> str:
    """Return what a tensor of the hub is called in a checkpoint: `optimizer.KIND.WEIGHT`."""
    if not name.startswith(_OUTER):
        return name
    kind, _, rest = name.removeprefix(_OUTER).partition(".")
    if kind == "update":
        fragment, version, rest = rest.split(".", 2)
        kind = f"update_{fragment}_{version}"
    return f"{_STORED}{kind}.{rest}"


def _own(name: str) -> str:
    """Return what the hub calls a tensor of a checkpoint."""
    if not name.startswith(_STORED):
        return name
    kind, _, rest = name.removeprefix(_STORED).partition(".")
    return f"{_OUTER}{kind.replace('_', '.')}.{rest}"


def _read(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    stored, shards = checkpoint.manifest.tensors, list[Shard]()
    for name in names:
        if stored[name].dtype not in _TORCH:
            raise DamagedError(f"the tensor '{name}' is of a type that islands do not have", got=stored[name].dtype)
        data = torch.empty(stored[name].shape, dtype=_TORCH[stored[name].dtype])
        shards.append(Shard(name, tuple(data.shape), tuple(slice(0, length) for length in data.shape), data))
    others = [name for name in stored if name not in set(names)]
    read_into(checkpoint, shards, others, check=SingleProcess())
    return {shard.name: shard.data.numpy() for shard in shards}


def fitting(state: HubState, terms: Terms) -> HubState:
    """Return the state for a run that may exchange otherwise than the one that saved it.

    Weights, outer optimizer and ledger stay. With other terms what islands were answered means nothing any more: what
    they have under way is trained again, from the outer weights.

    Args:
        state: of `read_run`.
        terms: of the run now.

    Raises:
        ConfigError: gradients were exchanged and are not now, or the other way round.
    """
    saved = Terms(**state.plain["terms"])
    if saved == terms:
        return state
    if saved.gradients != terms.gradients:
        raise ConfigError(
            "a run that exchanges gradients has no outer weights, and one that exchanges weights needs them",
            got=f"islands.algorithm={terms.algorithm}",
            allowed=f"islands.algorithm={saved.algorithm}",
            fix="resume with that; or start a new run from the weights: train.init_from=CHECKPOINT",
        )
    plain, leases = dict(state.plain), dict(state.plain["leases"])
    ledger = dict(leases["ledger"])
    taken = sorted((a, b) for ranges in ledger["booked"].values() for a, b in ranges)
    pool, at = [], 0
    for start, stop in taken:
        pool += [[at, start]] if start > at else []
        at = max(at, stop)
    pool += [[at, ledger["total"]]] if at < ledger["total"] else []
    # No version is the first one: who comes takes the outer weights.
    outer = {"versions": [1] * max(1, min(terms.fragments, len(plain["model"]["names"]))), "given": True}
    plain |= {"members": [], "saves": {}, "terms": vars(terms), "merges": {"outer": outer}}
    plain["leases"] = {**leases, "ledger": {**ledger, "pool": pool}, "open": [], "left": [], "rows": {}}
    kept = {name: array for name, array in state.tensors.items() if not name.startswith("outer.update.")}
    return HubState(kept, plain)


def place_saves(checkpoint: AnyPath, run_dir: Path) -> None:
    """Let the islands of a run go on from what its checkpoint has of them: later saves are set aside.

    Args:
        checkpoint: of the run, that it goes on from.
        run_dir: of the run.
    """
    found = Checkpoint(checkpoint).state().get(STATE_KEY, {})
    for name, save in found.get("saves", {}).items():
        own = run_dir / FOLDER / name / "checkpoints"
        stored = None if is_remote(checkpoint) else Path(checkpoint) / FOLDER / name
        for path in committed(own) if own.is_dir() else []:
            if step_of(path) > int(save["step"]) and not set_aside(path):
                put_aside(path, f"the run went back to {checkpoint.name}")
        target = own / f"step-{int(save['step']):08d}"
        if stored is None or not save["manifest"] or (target / MANIFEST).is_file():
            continue
        if not own.is_dir() or not any(step_of(path) == int(save["step"]) for path in committed(own)):
            shutil.copytree(stored, target, copy_function=_linked)


def drop_saves(run_dir: Path, islands: Iterable[str]) -> None:
    """Set aside what islands have saved, as their run begins anew: it was lost before its first checkpoint.

    Args:
        run_dir: of the run.
        islands: their names.
    """
    for name in islands:
        own = run_dir / FOLDER / name / "checkpoints"
        for path in committed(own) if own.is_dir() else []:
            if not set_aside(path):
                put_aside(path, "the run was lost before its first checkpoint, and began anew")


def _linked(source: str, target: str) -> object:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target
