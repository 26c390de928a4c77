"""Ranges of a training stream that a run leaves out: part of what its batches are a function of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Ranges = tuple[tuple[int, int], ...]
"""First sequence, and the one behind the last, of each range: by rising number, none touching another."""


def merged(ranges: Iterable[Sequence[int]]) -> Ranges:
    """Return the same sequences as few ranges, in order; empty ones are dropped.

    Args:
        ranges: pairs of the first sequence and the one behind the last, in any order.
    """
    result: list[tuple[int, int]] = []
    for first, stop in sorted((int(first), int(stop)) for first, stop in ranges):
        if stop <= first:
            continue
        if result and first <= result[-1][1]:
            first, stop = result[-1][0], max(stop, result.pop()[1])
        result.append((first, stop))
    return tuple(result)


def behind(ranges: Ranges, start: int, count: int) -> int:
    """Return the first sequence that is not left out behind `count` such ones from `start` on.

    Args:
        ranges: what is left out, `merged`.
        start: number of a sequence.
        count: of sequences, 0 or more.
    """
    for first, stop in ranges:
        if stop <= start:
            continue
        if start + count < first:
            break
        count -= max(0, first - start)
        start = stop
    return start + count


def kept(ranges: Ranges, start: int, count: int) -> list[int]:
    """Return the numbers of `count` sequences from `start` on, without those that are left out.

    Args:
        ranges: what is left out, `merged`.
        start: number of a sequence.
        count: of sequences.
    """
    start = behind(ranges, start, 0)
    result: list[int] = []
    for first, stop in ranges:
        if stop <= start:
            continue
        result.extend(range(start, min(first, start + count - len(result))))
        if len(result) == count:
            return result
        start = stop
    result.extend(range(start, start + count - len(result)))
    return result


def covered(ranges: Ranges, first: int, stop: int) -> bool:
    """Return whether all of the sequences from `first` to before `stop` are left out.

    Args:
        ranges: what is left out, `merged`.
        first: number of a sequence.
        stop: number of the sequence behind the last.
    """
    return any(begin <= first and stop <= end for begin, end in ranges)
