"""Read a checkpoint with safetensors and NumPy alone.

    python recipes/read_checkpoint.py DIRECTORY [TENSOR]

Checks the manifest's digest, every hash, and that the shards hold each element exactly once. The format is described in
docs/checkpoint-format.md. bfloat16, which NumPy lacks, is given as uint16 with the same bits. A checkpoint that was
written with checkpoint.hash=blake3 needs the package blake3, too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import deserialize

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}
DTYPES |= {"I8": "i1", "U8": "u1", "BOOL": "?"}


def read_plain(path: Path, limit: int) -> bytes:
    """Return the content of a plain file: a link leads elsewhere, and a pipe or a device has no end."""
    about = os.lstat(path)
    if not stat.S_ISREG(about.st_mode) or about.st_size > limit:
        raise ValueError(f"{path.name} is no plain file of at most {limit} bytes")
    return path.read_bytes()


def read_manifest(directory: Path) -> dict:
    """Return the manifest of a checkpoint, after checking its format and its digest."""
    manifest = json.loads(read_plain(directory / "manifest.json", 1 << 28))
    if (manifest["format"], manifest["version"]) != ("orchestrator-checkpoint", 2):
        raise ValueError("not a checkpoint that this reader knows")
    if set(manifest.get("requires", [])) - {"blake3"}:
        raise ValueError(f"needs a reader that knows {manifest['requires']}")
    body = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    if hashlib.sha256(text.encode()).hexdigest() != manifest["digest"]:
        raise ValueError("the manifest is damaged")
    return manifest


def hash_of(manifest: dict) -> Callable[[bytes], Any]:
    """Return the hash function of the checkpoint's files."""
    if "blake3" not in manifest.get("requires", []):
        return hashlib.sha256
    from blake3 import blake3

    return blake3


def read_file(directory: Path, name: str, listed: dict, new_hash: Callable[[bytes], Any]) -> bytes:
    """Return the content of a file, checked piece by piece."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}", name):
        raise ValueError(f"a name that is not allowed: {name!r}")
    content = read_plain(directory / name, listed["bytes"])
    offset = 0
    for size, expected in listed["pieces"]:
        if new_hash(content[offset : offset + size]).hexdigest() != expected:
            raise ValueError(f"{name} is damaged in bytes {offset} to {offset + size}")
        offset += size
    if not offset == listed["bytes"] == len(content):
        raise ValueError(f"{name} has {len(content)} bytes instead of {listed['bytes']}")
    return content


def read_tensors(directory: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and value of every tensor, put together from its shards."""
    manifest = read_manifest(directory)
    stored: dict[str, dict[str, dict]] = {}
    for name, listed in manifest["files"].items():
        content = read_file(directory, name, listed, hash_of(manifest))
        if name.endswith(".safetensors"):
            stored[name] = dict(deserialize(content))
    for name, tensor in manifest["tensors"].items():
        shape, dtype = tuple(tensor["shape"]), np.dtype(DTYPES[tensor["dtype"]])
        whole, times = np.empty(shape, dtype), np.zeros(shape, np.uint8)
        for shard in tensor["shards"]:
            part = stored[shard["file"]][shard["key"]]
            box = tuple(slice(a, b) for a, b in zip(shard["start"], shard["stop"], strict=True))
            size = tuple(b - a for a, b in zip(shard["start"], shard["stop"], strict=True))
            if (part["dtype"], tuple(part["shape"])) != (tensor["dtype"], size):
                raise ValueError(f"a shard of {name} is not what the manifest says")
            whole[box] = np.frombuffer(part["data"], dtype, math.prod(size)).reshape(size)
            times[box] += 1
        if not (times == 1).all():
            raise ValueError(f"the shards do not cover {name} exactly once")
        yield name, whole


if __name__ == "__main__":
    for found, value in read_tensors(Path(sys.argv[1])):
        if len(sys.argv) < 3:
            print(f"{found:60} {value.dtype} {list(value.shape)}")
        elif found == sys.argv[2]:
            print(value)
