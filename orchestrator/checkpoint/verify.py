"""Opening a checkpoint means checking it. No torch: the launcher decides where to resume before it starts anyone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from orchestrator.checkpoint.format import CONFIG, STATE, Manifest
from orchestrator.errors import CheckpointError

_READ_BYTES = 1 << 22


class Checkpoint:
    """A committed checkpoint.

    Raises:
        CheckpointError: not a checkpoint, or its manifest and files contradict each other.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.manifest = Manifest.read(directory)
        for name, file in self.manifest.files.items():
            path = directory / name
            size = path.stat().st_size if path.is_file() else None
            if size != file.bytes:
                got = "missing" if size is None else f"{size} bytes"
                raise CheckpointError(
                    f"file '{name}' of the checkpoint is damaged",
                    got=f"{got} in {directory}",
                    allowed=f"{file.bytes} bytes",
                )

    @property
    def step(self) -> int:
        return self.manifest.step

    def state(self) -> dict[str, Any]:
        """What travelled along: step, data position, provenance."""
        return self._mapping(STATE, json.loads)

    def config(self) -> dict[str, Any]:
        """The configuration of the run that wrote it, as plain data."""
        return self._mapping(CONFIG, yaml.safe_load)

    def _mapping(self, name: str, parse: Callable[[bytes], Any]) -> dict[str, Any]:
        path = self.directory / name
        try:
            data = parse(path.read_bytes())
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise CheckpointError(f"file '{name}' of the checkpoint is damaged: {error!r}", got=path) from None
        if not isinstance(data, dict):
            raise CheckpointError(f"file '{name}' of the checkpoint is damaged: not a mapping", got=path)
        return data

    def verify(self, progress: Callable[[int], object] = lambda done: None) -> None:
        """Hash every file, in parallel.

        Args:
            progress: told the number of bytes of each piece that was read.

        Raises:
            CheckpointError: a file does not have the content that was written.
        """

        def check(name: str) -> str | None:
            digest = hashlib.sha256()
            try:
                with open(self.directory / name, "rb") as file:
                    while piece := file.read(_READ_BYTES):
                        digest.update(piece)
                        progress(len(piece))
            except OSError:
                return name
            return None if digest.hexdigest() == self.manifest.files[name].sha256 else name

        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            damaged = [name for name in pool.map(check, self.manifest.files) if name]
        if damaged:
            raise CheckpointError(
                "the checkpoint is damaged: a file cannot be read or does not match its hash",
                got=f"{', '.join(damaged)} in {self.directory}",
            )
