"""Choose the documents that are held out for validation, by their content alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from orchestrator.errors import ConfigError

MIN_HELD_OUT_TOKENS = 4096  # of small data, though at most a tenth of it: a fraction of it would be too little to judge
_SMALL_DATA_SHARE = 10
_TOLERANCE = 2  # between what the hashes choose and what is wanted, before tokens are counted instead


@dataclass(frozen=True)
class Extents:
    """Locations of documents in the spool, each field of shape [documents].

    Attributes:
        starts: first token in the spool.
        lengths: in tokens.
        hashes: of the content, uint64.
        text_bytes: of the text as UTF-8.
    """

    starts: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    text_bytes: np.ndarray

    def take(self, which: np.ndarray) -> Extents:
        """Return the documents that an index array or a mask chooses.

        Args:
            which: indices, or a mask.
        """
        return Extents(self.starts[which], self.lengths[which], self.hashes[which], self.text_bytes[which])


def hold_out(extents: Extents, fraction: float, divide: bool = True) -> tuple[Extents, Extents]:
    """Divide documents into those to train on and those held out; copies of a document stay together.

    Each document is chosen by the hash of its content alone, so that data that grows keeps what it held out. Where
    that does not come near the wanted number of tokens (few or very unequal documents), documents are taken in the
    order of their hashes while they fit, and what is missing is the tail of the longest of the others, if such may be
    divided.

    Args:
        extents: the documents.
        fraction: of the tokens; `MIN_HELD_OUT_TOKENS` of small data, but at most a tenth of that. 0: nothing.
        divide: a document may be held out in part; of conversations the tail alone means nothing.

    Raises:
        ConfigError: nothing would be left to train on.
    """
    nothing = np.zeros(extents.lengths.size, dtype=bool)
    tokens = int(extents.lengths.sum())
    if fraction <= 0.0 or not tokens:
        return extents, extents.take(nothing)
    wanted = max(1, round(fraction * tokens), min(MIN_HELD_OUT_TOKENS, tokens // _SMALL_DATA_SHARE))
    chosen = extents.hashes < np.uint64(min(math.ceil(fraction * 2.0**64), 2**64 - 1))
    held = int(extents.lengths[chosen].sum())
    if wanted <= held * _TOLERANCE and held <= wanted * _TOLERANCE and held < tokens:
        return extents.take(~chosen), extents.take(chosen)
    chosen = _fitting(extents, wanted)
    train, validation = extents.take(~chosen), extents.take(chosen)
    missing = wanted - int(validation.lengths.sum())
    if divide and missing > 0 and train.lengths.size:
        train, tails = _cut_tail(train, missing)
        validation = Extents(
            *(np.concatenate([getattr(part, name) for part in (validation, tails)]) for name in Extents.__annotations__)
        )
    if not train.lengths.any():
        raise nothing_left(f"data.validation_fraction={fraction} of {tokens} tokens")
    return train, validation


def nothing_left(got: str) -> ConfigError:
    """Make the error for a fraction that would hold out everything.

    Args:
        got: the fraction and the data, in words.
    """
    return ConfigError(
        "the held-out fraction leaves nothing to train on",
        got=got,
        allowed="a validation_fraction from 0 to below 1 that leaves tokens to train on",
        fix="lower it; for data that is only evaluated on, prepare a store with validation_fraction=0 and name it,"
        " or its files, as data.validation=...",
    )


def _fitting(extents: Extents, wanted: int) -> np.ndarray:
    """Return a mask of the documents with the smallest hashes that together have at most `wanted` tokens."""
    order = np.argsort(extents.hashes, kind="stable")
    hashes, total = extents.hashes[order], np.cumsum(extents.lengths[order])
    fits = int(np.searchsorted(total, wanted, side="right"))
    # A document and its copies go one way.
    while 0 < fits < hashes.size and hashes[fits - 1] == hashes[fits]:
        fits -= 1
    chosen = np.zeros(hashes.size, dtype=bool)
    chosen[order[:fits]] = True
    return chosen


def _cut_tail(extents: Extents, wanted: int) -> tuple[Extents, Extents]:
    """Hold out the tail of the longest document, and of its copies: a single text file has a validation split too."""
    longest = extents.lengths == extents.lengths.max()
    which = np.flatnonzero(extents.hashes == extents.hashes[longest].min())
    length = int(extents.lengths[which[0]])
    tail = min(-(-wanted // which.size), length - 1)
    if tail < 1:
        return extents, extents.take(which[:0])
    text_bytes = extents.text_bytes[which] * tail // length
    tails = Extents(
        extents.starts[which] + length - tail,
        np.full(which.size, tail),
        extents.hashes[which],
        text_bytes,
    )
    lengths, sizes = extents.lengths.copy(), extents.text_bytes.copy()
    lengths[which] -= tail
    sizes[which] -= text_bytes
    return Extents(extents.starts, lengths, extents.hashes, sizes), tails
