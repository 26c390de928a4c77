"""A checkpoint of adapters: it holds what was trained, and names the weights that lie beneath. No torch.

`state.json` of such a checkpoint has

    "adapters": {"base": PATH, "beside": PATH from the checkpoint's directory or null, "content": SUM, "scale": NUMBER}

`content` is a sum over the base's weights that does not depend on how they are cut into files. The base is looked for
at both paths: a run directory may be moved as a whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import MANIFEST, StoredTensor
from orchestrator.checkpoint.reference import read_sums
from orchestrator.checkpoint.signing import Trust
from orchestrator.checkpoint.storage import AnyPath, is_remote, locate
from orchestrator.constants import LORA_A, LORA_B
from orchestrator.errors import CheckpointError

STATE_KEY = "adapters"
_WEIGHTS = "model."


@dataclass(frozen=True)
class AdapterRecord:
    """What a checkpoint of adapters says of the weights beneath them.

    Attributes:
        base: path or URL of a checkpoint.
        beside: its path from the directory of the checkpoint that says so; None where there is none.
        content: what `content_of` it gives.
        scale: factor on what adapters add.
    """

    base: str
    beside: str | None
    content: str
    scale: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as `state.json` has it."""
        return {"base": self.base, "beside": self.beside, "content": self.content, "scale": self.scale}


def is_adapter(name: str) -> bool:
    """Whether the parameter called `name`, or its state, is an adapter's."""
    return name.rpartition(".")[2] in (LORA_A, LORA_B)


def content_of(checkpoint: Checkpoint) -> str:
    """Return a sum over the weights of a checkpoint, the same however they are cut into files.

    Args:
        checkpoint: the checkpoint.

    Raises:
        CheckpointError: it was written before sums of tensors were kept.
    """
    sums = read_sums(checkpoint)
    weights = {name: one for name, one in checkpoint.manifest.tensors.items() if name.startswith(_WEIGHTS)}
    if lacking := sorted(weights.keys() - sums.keys()):
        raise CheckpointError(
            "the checkpoint has no sums of its tensors, by which adapters recognise the weights beneath them",
            got=f"none of {lacking[0]} in {checkpoint.directory}",
            fix="save it again with this version, or import it again",
        )
    lines = [[name, one.dtype, list(one.shape), sums[name]] for name, one in sorted(weights.items())]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def adapter_record(checkpoint: Checkpoint) -> AdapterRecord | None:
    """Return what a checkpoint says of the weights beneath its adapters; None where it holds whole weights.

    Args:
        checkpoint: which may be a stranger's.

    Raises:
        CheckpointError: its state is damaged.
    """
    data = checkpoint.state().get(STATE_KEY)
    if data is None:
        return None
    try:
        beside, scale = data["beside"], float(data["scale"])
        if not math.isfinite(scale):
            raise ValueError(f"scale {scale}")
        return AdapterRecord(str(data["base"]), None if beside is None else str(beside), str(data["content"]), scale)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(
            "the state of the checkpoint is damaged",
            got=f"{STATE_KEY}: {error!r}"[:200] + f" in {checkpoint.directory}",
        ) from None


def record_for(base: Checkpoint, scale: float, directory: AnyPath) -> AdapterRecord:
    """Describe the weights beneath adapters.

    Args:
        base: their checkpoint.
        scale: factor on what adapters add.
        directory: of the adapters' checkpoint.
    """
    place, beside = base.directory, None
    if not is_remote(place) and not is_remote(directory):
        place = Path(place).resolve()
        beside = os.path.relpath(place, Path(directory).resolve())
    return AdapterRecord(str(place), beside, content_of(base), scale)


def open_base(
    checkpoint: Checkpoint, trust: Trust = Trust(), named: str | None = None, look: bool = True
) -> Checkpoint | None:
    """Open the weights beneath the adapters of a checkpoint.

    Args:
        checkpoint: which may be a stranger's: what it names in a store is opened where the user names it, too.
        trust: whose checkpoints are believed.
        named: where the user says that they are, if they are not where the checkpoint says; None: nowhere else.
        look: as for `Checkpoint`.

    Returns:
        The base; None where the checkpoint holds whole weights.

    Raises:
        CheckpointError: it is not there, or has other weights.
    """
    record = adapter_record(checkpoint)
    if record is None:
        return None
    places = _places(record, checkpoint.directory)
    places = list(dict.fromkeys([*places, *([] if named is None else [locate(named)])]))
    others = []
    for place in places:
        if not _is_checkpoint(place):
            continue
        base = Checkpoint(place, trust, look=look)
        if adapter_record(base) is None and content_of(base) == record.content:
            return base
        others.append(place)
    if others:
        raise CheckpointError(
            "these are not the weights that the adapters were trained on",
            got=f"{', '.join(map(str, others))}, with other bits",
            allowed=f"weights with the sum {record.content[:12]}, which {checkpoint.directory} names",
            fix="put the checkpoint that the run started from there; or, to train on: train.init_from=ITS DIRECTORY "
            "beside resume=",
        )
    raise CheckpointError(
        "the weights beneath the adapters are not where the checkpoint says",
        got=f"no checkpoint at {', '.join(map(str, places)) or record.base}",
        allowed=f"the checkpoint of whole weights that {checkpoint.directory} lies beside",
        fix="put it there; or, to train on: train.init_from=ITS DIRECTORY beside resume=",
    )


def whole_tensors(checkpoint: Checkpoint, base: Checkpoint | None) -> Mapping[str, StoredTensor]:
    """Return the stored tensors of a model: those of a base where there is one, without its optimizer state.

    Args:
        checkpoint: the checkpoint.
        base: as `open_base` gave it.
    """
    if base is None:
        return checkpoint.manifest.tensors
    return {name: one for name, one in base.manifest.tensors.items() if name.startswith(_WEIGHTS)}


def _places(record: AdapterRecord, directory: AnyPath) -> list[AnyPath]:
    """Where the base may be. A store of a stranger's is not asked with the user's credentials."""
    places: list[AnyPath] = []
    if record.beside is not None and not is_remote(directory):
        places.append(Path(os.path.normpath(Path(directory).resolve() / record.beside)))
    named = locate(record.base)
    if not is_remote(named) or is_remote(directory):
        places.insert(0, named)
    return places


def _is_checkpoint(place: AnyPath) -> bool:
    try:
        return (place / MANIFEST).is_file()
    except OSError:
        return False
