"""Summarise a checkpoint as plain data. No torch. What a checkpoint says of itself is no reason to trust it."""

from __future__ import annotations

import math
from typing import Any

from orchestrator.checkpoint.adapters import adapter_record
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import (
    ITEM_BYTES,
    MANIFEST,
    MODEL_SIGNATURE,
    SIGNATURE,
    SIGNATURES,
    STATEMENT,
    VERSION,
    StoredTensor,
)
from orchestrator.checkpoint.storage import size_of

_SHOWN = (
    "written",
    "target",
    "runtime",
    "device_names",
    "devices",
    "hosts",
    "engine",
    "layout",
    "precision",
    "numerics",
    "software",
)


def facts(checkpoint: Checkpoint, tensors: bool = False) -> dict[str, Any]:
    """Return step, provenance, tensors, data position and size of a checkpoint, as plain data for JSON.

    Args:
        checkpoint: the checkpoint.
        tensors: with each tensor's shape and shards.

    Raises:
        CheckpointError: its state or configuration is damaged.
    """
    manifest, state, config = checkpoint.manifest, checkpoint.state(), checkpoint.config()
    sizes = {name: size_of(checkpoint.directory / name) for name in (MANIFEST, *SIGNATURES)}
    beside = {name: size for name, size in sizes.items() if size is not None}
    weights = [tensor for name, tensor in manifest.tensors.items() if name.startswith("model.")]
    model = config.get("model")
    result = {
        "path": str(checkpoint.directory),
        "step": manifest.step,
        "format_version": VERSION,
        "model": model.get("name") if isinstance(model, dict) else None,
        "optimizer": _optimizer(checkpoint, config),
        "adapters_beside": record.base if (record := adapter_record(checkpoint)) else None,
        "parameters": sum(math.prod(tensor.shape) for tensor in weights),
        "tensors": len(manifest.tensors),
        "tensor_bytes": sum(_bytes(tensor) for tensor in manifest.tensors.values()),
        "files": len(manifest.files),
        "bytes_on_disk": sum(file.bytes for file in manifest.files.values()) + sum(beside.values()),
        "signed": SIGNATURE in beside,
        "statement": STATEMENT in beside,
        "model_signature": MODEL_SIGNATURE in beside,
        "tokenizer": "tokenizer.json" in manifest.files,
        "data": state.get("data"),
        "schedule": state.get("schedule"),
        "provenance": {key: state[key] for key in (*_SHOWN, "imported") if key in state},
        "groups": _groups(checkpoint),
    }
    if tensors:
        result["tensor_list"] = [
            {
                "name": name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "shards": [
                    {"file": shard.file, "start": list(shard.start), "stop": list(shard.stop)}
                    for shard in tensor.shards
                ],
            }
            for name, tensor in manifest.tensors.items()
        ]
    return result


def _optimizer(checkpoint: Checkpoint, config: dict[str, Any]) -> dict[str, Any]:
    """Return the optimizer's name in the configuration, and the keys of its stored state."""
    optim = config.get("optim")
    optim = optim if isinstance(optim, dict) else {}
    state = {name.split(".")[1] for name in checkpoint.manifest.tensors if name.startswith("optimizer.")}
    return {"name": optim.get("_target_") or optim.get("name"), "state": sorted(state)}


def _groups(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Tensors by the first two words of their name: `model.layers`, `optimizer.exp_avg`."""
    groups: dict[str, list[StoredTensor]] = {}
    for name, tensor in checkpoint.manifest.tensors.items():
        groups.setdefault(".".join(name.split(".")[:2]), []).append(tensor)
    return [
        {
            "name": name,
            "tensors": len(members),
            "elements": sum(math.prod(tensor.shape) for tensor in members),
            "bytes": sum(_bytes(tensor) for tensor in members),
            "dtypes": sorted({tensor.dtype for tensor in members}),
        }
        for name, members in groups.items()
    ]


def _bytes(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
