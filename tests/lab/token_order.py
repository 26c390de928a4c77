"""The tokens that a run has really trained on, step by step, written down by a callback and put together afterwards."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning

_WHOLE = 1 << 64


class TokenOrder(lightning.Callback):
    """Writes, for each step, what this process's share of the batch adds to the step's fingerprint.

    The fingerprint of a step is the sum of the hashes of its sequences: however many processes share them out.

    Args:
        file: to add lines to; a process adds its rank to the name.
    """

    def __init__(self, file: str):
        self._file = file

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Write a line: step, rank, processes, and the sum over the sequences of this process."""
        parallel, total = pl_module.parallel, 0
        for row, targets in zip(batch["tokens"], batch["targets"], strict=True):
            content = bytes(memoryview(row.numpy())) + bytes(memoryview(targets.numpy()))
            total += int.from_bytes(hashlib.sha256(content).digest()[:8], "little")
        with open(f"{self._file}-{parallel.rank}", "a") as file:
            file.write(f"{pl_module.step + 1} {parallel.rank} {parallel.size} {total % _WHOLE}\n")


def fingerprints(files: Iterable[Path], last: int) -> list[int]:
    """Return the fingerprint of each step from 1 to `last`, of the lines in `files`, however often it was trained.

    Raises:
        AssertionError: a step was left out, or trained on other tokens another time.
    """
    parts: dict[int, dict[int, dict[int, set[int]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(set)))
    for file in files:
        for line in file.read_text().splitlines():
            step, rank, size, total = map(int, line.split())
            parts[step][size][rank].add(total)
    found = []
    for step in range(1, last + 1):
        totals = set()
        for size, ranks in parts[step].items():
            assert all(len(seen) == 1 for seen in ranks.values()), f"step {step} was trained on other tokens later"
            if len(ranks) == size:  # else it was ended before all had begun it
                totals.add(sum(next(iter(seen)) for seen in ranks.values()) % _WHOLE)
        assert len(totals) == 1, f"step {step} was trained on {len(totals)} kinds of tokens: {dict(parts[step])}"
        found += totals
    return found
