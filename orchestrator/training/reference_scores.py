"""What the reference model of a run that learns from preferences makes of the pairs: computed once, and kept.

The reference is the model that the run starts from. A pair is known by its content, so the numbers hold for any order,
packing and layout. They travel in the run's checkpoints, so that a resumed run has the same bits and needs the model
that it began with no more; and they are kept in the cache of the data, for further runs from the same model.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from orchestrator.errors import CheckpointError, DataError

FILE = "preference-reference.bin"  # of a checkpoint
MAX_BYTES = 1 << 30
_KEY_BYTES = 16
_ROW = np.dtype([("key", f"V{_KEY_BYTES}"), ("chosen", "<f8"), ("rejected", "<f8")])


class ReferenceScores:
    """Log-probabilities of the chosen and the rejected response of pairs, by the reference model.

    Args:
        known: of each pair's key.
    """

    def __init__(self, known: Mapping[bytes, tuple[float, float]] | None = None):
        self._known = dict(known or {})

    def __len__(self) -> int:
        return len(self._known)

    def missing(self, keys: Iterable[bytes]) -> bool:
        """Return whether a pair of these is not known.

        Args:
            keys: of pairs.
        """
        return any(key not in self._known for key in keys)

    def add(self, keys: Sequence[bytes], logps: np.ndarray) -> None:
        """Keep what the reference makes of pairs; of those that are known already nothing changes.

        Args:
            keys: of the pairs.
            logps: [pairs, 2].
        """
        for key, (chosen, rejected) in zip(keys, logps.tolist(), strict=True):
            self._known.setdefault(key, (chosen, rejected))

    def merge(self, other: ReferenceScores) -> None:
        """Keep what another one knows, too.

        Args:
            other: of the same reference.
        """
        self._known = {**other._known, **self._known}

    def look_up(self, keys: Sequence[bytes]) -> np.ndarray:
        """Return the log-probabilities [pairs, 2] fp64.

        Args:
            keys: of the pairs.

        Raises:
            DataError: the reference was never asked for one of them.
        """
        if self.missing(keys):
            raise DataError(
                "a pair of responses was not scored by the reference model",
                got=f"a pair that is not among the {len(self):,} of this run",
                allowed="the pairs of the steps that the run was planned for",
                fix="start again from the last checkpoint, which scores what is missing",
            )
        return np.array([self._known[key] for key in keys], dtype=np.float64).reshape(-1, 2)

    def to_bytes(self) -> bytes:
        """Return all of it, sorted by key: 16 bytes of the key and two fp64 for each pair."""
        rows = np.array([(key, *pair) for key, pair in sorted(self._known.items())], dtype=_ROW)
        return rows.tobytes()

    @classmethod
    def from_bytes(cls, content: bytes, where: object) -> ReferenceScores:
        """Take back what `to_bytes` gave.

        Args:
            content: which may come from a stranger.
            where: it is from, for a message.

        Raises:
            CheckpointError: it is nothing of the kind.
        """
        if len(content) % _ROW.itemsize or len(content) > MAX_BYTES:
            raise CheckpointError("the log-probabilities of the reference model are damaged", got=where)
        rows = np.frombuffer(content, dtype=_ROW)
        values = np.stack((rows["chosen"], rows["rejected"]), -1)
        if not (np.isfinite(values) & (values <= 0.0)).all():
            raise CheckpointError("the log-probabilities of the reference model are none", got=where)
        keys = [key.tobytes() for key in rows["key"]]
        return cls(dict(zip(keys, map(tuple, values.tolist()), strict=True)))

    def to_text(self) -> str:
        """Return all of it as text, for another process."""
        return base64.b64encode(self.to_bytes()).decode("ascii")

    @classmethod
    def from_text(cls, text: str) -> ReferenceScores:
        """Take back what `to_text` gave.

        Args:
            text: of another process of the job.
        """
        return cls.from_bytes(base64.b64decode(text), "another process")
