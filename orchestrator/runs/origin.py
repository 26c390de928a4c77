"""The origin of an imported model: how to import it, and which files of an import travel on. No torch."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.storage import AnyPath
from orchestrator.data.model_files import SOURCE_CONFIG_FILE
from orchestrator.errors import CheckpointError

# Files of an imported checkpoint: what became of the source's tensors and keys, and the config.json that it came with.
REPORT, SOURCE_CONFIG = "import.json", SOURCE_CONFIG_FILE
_FILES = (".ckpt", ".pt", ".pth", ".bin")
_OF_MODELS = ("*.safetensors", "*.safetensors.index.json", "*.bin", ".metadata")


def import_command(place: AnyPath) -> str | None:
    """Return the command that imports what lies at a place of this machine; None where that is no model.

    Args:
        place: a path, or one of a store.
    """
    if not isinstance(place, Path):
        return None
    try:
        if place.is_file():
            source = place.parent if place.suffix == ".safetensors" else place
            known = place.suffix in (".safetensors", *_FILES)
        else:
            source = place
            known = any(next(place.glob(pattern), None) for pattern in _OF_MODELS)
    except (OSError, ValueError):
        return None
    if not known:
        return None
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", source.resolve().stem if source.is_file() else source.resolve().name)
    return f"python -m orchestrator checkpoint import {shlex.quote(str(source))} output=imported/{name or 'model'}"


def refuse_foreign(place: AnyPath) -> None:
    """Point to the import where a checkpoint of this product is wanted and other software's model lies.

    Args:
        place: a path, or one of a store.

    Raises:
        CheckpointError: it does.
    """
    if command := import_command(place):
        raise CheckpointError(
            "this is a model of other software, and not a checkpoint of this product yet",
            got=place,
            fix=f"import it: {command}; then name that output here",
        )


def model_files(source: Checkpoint | None) -> dict[str, bytes]:
    """Return what of the import travels with a run's checkpoints.

    Args:
        source: the checkpoint that the run goes on from, or started from; None for random weights.
    """
    if source is None or SOURCE_CONFIG not in source.manifest.files:
        return {}
    return {SOURCE_CONFIG: source.read(SOURCE_CONFIG)}
