"""Writing a `torch.distributed.checkpoint` directory, for tools that read nothing else. Its metadata is pickle."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner


class _OneByOne(DefaultSavePlanner):
    """Plans with tensors on the meta device, and gets each when its turn comes."""

    def __init__(self, produce: Callable[[str], torch.Tensor], progress: Callable[[int], object]):
        super().__init__(flatten_state_dict=False)
        self._produce, self._progress = produce, progress

    def lookup_object(self, index: Any) -> torch.Tensor:
        tensor = self._produce(index.fqn)
        self._progress(tensor.numel() * tensor.element_size())
        return tensor


def write_dcp(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    produce: Callable[[str], torch.Tensor],
    progress: Callable[[int], object],
) -> None:
    """Write a state dict.

    Args:
        directory: a new directory.
        tensors: on the meta device, by name.
        produce: called with each name when its turn comes; returns the tensor on the host.
        progress: told the bytes of each tensor.
    """
    with warnings.catch_warnings():
        # That there is one process, and of a deprecated storage class which torch itself uses.
        warnings.filterwarnings("ignore", message=".*(single process|TypedStorage is deprecated).*")
        dcp.save(
            dict(tensors),
            storage_writer=dcp.FileSystemWriter(directory, thread_count=1, overwrite=True),
            planner=_OneByOne(produce, progress),
            no_dist=True,
        )
