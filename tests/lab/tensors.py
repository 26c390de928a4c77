"""A second, independent way to read a checkpoint: plain safetensors and JSON, no product code."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor, whole."""
    manifest = json.loads((directory / "manifest.json").read_text())
    files = {name: load_file(directory / name) for name in manifest["files"] if name.endswith(".safetensors")}
    dtypes = {
        "F32": torch.float32,
        "F64": torch.float64,
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I8": torch.int8,
        "U8": torch.uint8,
    }
    result = {}
    for name, entry in manifest["tensors"].items():
        dtype = dtypes[entry["dtype"]]
        whole = torch.full(entry["shape"], float("nan") if dtype.is_floating_point else 0, dtype=dtype)
        for shard in entry["shards"]:
            box = tuple(slice(a, b) for a, b in zip(shard["start"], shard["stop"], strict=True))
            whole[box] = files[shard["file"]][shard["key"]]
        assert not whole.isnan().any(), f"{name} is not covered"
        result[name] = whole
    return result
