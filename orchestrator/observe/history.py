"""The metrics history of a run, thinned to travel in each of its checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HISTORY, METRICS = "history.json", "metrics.jsonl"
LIMIT = 2000
"""Rows of each kind that are kept: as many as the report draws."""

TASKS = "tasks"
"""Key of a row of what tasks gave: their number."""
_KINDS = ("loss", "val_loss", TASKS)  # keys that rows of training, of evaluations and of tasks have


class History:
    """Legs and rows of a run so far.

    With more than `LIMIT` training rows only every second step is kept, then every fourth, and so on; the same for
    evaluations. Rows are kept as text: putting them together at a save must cost nothing.

    Args:
        rows: of the legs before, by rising step, as `finite_row` makes them.

    Attributes:
        legs: of the run, the one that is under way last.
        times: gives the entries of its time book.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()):
        self.legs: Sequence[Mapping[str, Any]] = ()
        self.times: Callable[[], list[dict[str, Any]]] = list
        self._kept = {key: _Thinned() for key in _KINDS}
        self.write(rows)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows; others than those of training and evaluation are not kept.

        Args:
            rows: by rising step.
        """
        for row in rows:
            for key, kept in self._kept.items():
                if key in row:
                    kept.add(json.dumps(row, allow_nan=False).encode())

    def forget_after(self, step: int) -> None:
        """Drop the rows of later steps: a rewind has undone them.

        Args:
            step: optimizer steps completed.
        """
        for kept in self._kept.values():
            kept.forget_after(step)

    def replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take `rows`, by rising step, for all that was so far."""
        self._kept = {key: _Thinned() for key in self._kept}
        self.write(rows)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows that are kept, by rising step."""
        found = [json.loads(text) for kept in self._kept.values() for text in kept.rows]
        return sorted(found, key=lambda row: int(row["step"]))

    def content(self, step: int) -> bytes:
        """JSON of what a checkpoint of `step` carries: `legs`, the last of them up to this step, `rows` and `times`."""
        legs = [dict(leg) for leg in self.legs]
        if legs:
            legs[-1]["end_step"] = step
        rows = b",\n".join(text for kept in self._kept.values() for text in kept.rows)
        times = ",\n".join(json.dumps(entry) for entry in self.times()).encode()
        return b'{"legs": %b,\n"times": [\n%b\n],\n"rows": [\n%b\n]}' % (json.dumps(legs).encode(), times, rows)


_TAIL_BYTES = 4 << 20


def row_key(row: Mapping[str, Any]) -> tuple[Any, Any, str]:
    """Return what a row of `metrics.jsonl` is known by: leg, step, and the key that says what it is of.

    Args:
        row: figures by name.
    """
    return row.get("leg"), row.get("step"), next((key for key in _KINDS if key in row), "")


def last_rows(path: Path, most_bytes: int = _TAIL_BYTES) -> list[dict[str, Any]]:
    """Return the last rows in a file of metrics; those that are cut, at either end, are left out.

    Args:
        path: of the file; nothing is in one that is not there.
        most_bytes: of its end, that are read.
    """
    try:
        if not path.is_file():  # a pipe in its place has no end
            return []
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - most_bytes))
            lines = file.read(most_bytes).splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            if isinstance(row := json.loads(line), dict):
                found.append(row)
    return found


def written_rows(path: Path) -> set[tuple[Any, Any, str]]:
    """Return the keys of the last rows in a file of metrics, which another process has written.

    Args:
        path: of the file; nothing is in one that is not there.
    """
    return {row_key(row) for row in last_rows(path)}


NONFINITE = "nonfinite"
REWOUND = "rewound_from"
"""Key of a row that says: the run was taken back to the row's `step` from this one; rows before it of later steps are
of what was undone."""


def finite_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as JSON has it: a number that is not finite is null, and `nonfinite` says what it was.

    `{"loss": nan}` becomes `{"loss": null, "nonfinite": {"loss": "nan"}}`.

    Args:
        row: figures by name.
    """
    wrong = {key: str(value) for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    if not wrong:
        return dict(row)
    return {**row, **dict.fromkeys(wrong), NONFINITE: {**(row.get(NONFINITE) or {}), **wrong}}


def read_content(data: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return legs, and rows by rising step, of a checkpoint's JSON; what is no such thing is left out.

    Args:
        data: parsed JSON.
    """
    legs, rows = (data.get(key) if isinstance(data, dict) else None for key in ("legs", "rows"))
    good_legs = [leg for leg in legs if isinstance(leg, dict)] if isinstance(legs, list) else []
    found = rows if isinstance(rows, list) else []
    # Earlier versions wrote NaN as it is.
    good_rows = [finite_row(row) for row in found if isinstance(row, dict) and _step(row)]
    return good_legs, sorted(good_rows, key=lambda row: row["step"])


def _step(row: Mapping[str, Any]) -> bool:
    step = row.get("step")
    return isinstance(step, int) and not isinstance(step, bool)


class _Thinned:
    """Rows whose number is a multiple of a stride that grows with them."""

    def __init__(self) -> None:
        self.rows: list[bytes] = []
        self._stride, self._count = 1, 0

    def add(self, row: bytes) -> None:
        if self._count % self._stride == 0:
            self.rows.append(row)
        self._count += 1
        if len(self.rows) > LIMIT:
            self.rows, self._stride = self.rows[::2], 2 * self._stride

    def forget_after(self, step: int) -> None:
        self.rows = [row for row in self.rows if json.loads(row)["step"] <= step]
        self._count = len(self.rows) * self._stride
