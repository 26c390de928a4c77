"""What the small training gave on a CPU in fp32: `recorded.json`, made by scripts/record_certificate.py. No torch."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.certify.fixture import STEPS, batch

PATH = Path(__file__).with_name("recorded.json")


@dataclass(frozen=True)
class Recorded:
    """The reference of all certificates.

    Attributes:
        losses: of the steps, in nats per token.
        norms: global L2 norms of their gradients.
        weights: SHA-256 of the bytes (fp32, row-major, little-endian) of every initial weight, by name.
        batches: SHA-256 of the tokens and targets of all steps.
        fp64: how far the reference is from the same training in fp64, as a relative difference: `losses` and `norms`.
        bf16: how far it would be, had the matrix products been rounded to bf16.
        software: that made it.
    """

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    weights: dict[str, str]
    batches: str
    fp64: dict[str, float]
    bf16: dict[str, float]
    software: dict[str, str]

    @property
    def digest(self) -> str:
        """Tells one reference from another: certificates of one digest can be compared."""
        data = {"losses": self.losses, "norms": self.norms, "weights": self.weights, "batches": self.batches}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


@functools.cache
def recorded() -> Recorded:
    """Read the reference that the package carries."""
    data: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    return Recorded(**{**data, "losses": tuple(data["losses"]), "norms": tuple(data["norms"])})


def batches_digest() -> str:
    """Return what `Recorded.batches` has to be: of the batches that are made here."""
    found = hashlib.sha256()
    for step in range(STEPS):
        rows = batch(step)
        for name in ("tokens", "targets"):
            found.update(rows[name].astype("<i8").tobytes())
    return found.hexdigest()
