"""Format values of a report; `unknown` where one is missing."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from orchestrator.report.run_data import number
from orchestrator.report.svg import format_number


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings, and lists of them by their numbers, as dotted keys; an empty mapping keeps its key.

    Args:
        values: by name.
        prefix: of the keys.
    """
    found: dict[str, Any] = {}
    for key, item in values.items():
        if isinstance(item, list) and item and all(isinstance(part, Mapping) for part in item):
            item = {str(number): part for number, part in enumerate(item)}
        if isinstance(item, Mapping) and item:
            found |= flatten(item, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = item
    return found


def flat(values: Mapping[str, Any]) -> dict[str, str]:
    """Return nested mappings as dotted keys, with their values as people read them.

    Args:
        values: by name.
    """
    return {key: value(item) for key, item in flatten(values).items() if not isinstance(item, Mapping)}


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines whose columns are as wide as their widest cell.

    Args:
        rows: of cells.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def value(item: Any) -> str:
    """Format a plain value: grouped, shortened, lower-case, or its parts one after the other.

    Args:
        item: of JSON.
    """
    if isinstance(item, bool) or item is None:
        return "unknown" if item is None else str(item).lower()
    if isinstance(item, int):
        return grouped(item) or ""
    if isinstance(item, float):
        return format_number(item)
    if isinstance(item, Sequence) and not isinstance(item, str):
        return ", ".join(value(part) for part in item)
    return str(item)


def layout(degrees: Any) -> str:
    """Format the degrees above one: `fsdp 4 × tensor 2`.

    Args:
        degrees: by mesh axis.
    """
    if not isinstance(degrees, Mapping):
        return "unknown" if degrees is None else str(degrees)
    above = [(axis, degree) for axis, degree in degrees.items() if isinstance(degree, int) and degree > 1]
    return " × ".join(f"{axis} {degree}" for axis, degree in above) or "one device"


def known(item: Any) -> str:
    """Format as `value`, where that may be missing.

    Args:
        item: of JSON.
    """
    return value(item)


def grouped(value: Any) -> str | None:
    """Format an integer with its thousands apart.

    Args:
        value: of JSON.
    """
    size = number(value)
    return None if size is None else f"{size:,.0f}"


def fixed(value: float | None) -> str | None:
    """Format with four decimals.

    Args:
        value: None where it is unknown.
    """
    return None if value is None else f"{value:.4f}"


def short(value: float | None) -> str | None:
    """Format a number with up to four digits.

    Args:
        value: None where it is unknown.
    """
    return None if value is None else format_number(value)


def flops(value: float | None) -> str | None:
    """Format an amount of arithmetic with its SI prefix: 91.2 GFLOP.

    Args:
        value: FLOP.
    """
    if value is None:
        return None
    power = min(5, max(0, int(math.log10(value) // 3))) if value >= 1 else 0
    return f"{value / 1000.0**power:.4g} {('', 'k', 'M', 'G', 'T', 'P')[power]}FLOP"


def whole(value: float | None) -> str | None:
    """Format without decimals, its thousands apart.

    Args:
        value: None where it is unknown.
    """
    return None if value is None else f"{value:,.0f}"


def gib(value: float) -> str:
    """Format bytes in GiB.

    Args:
        value: bytes.
    """
    return f"{value / 2**30:.2f} GiB"


def step_time(seconds: float | None) -> str:
    """Format seconds per step, as seconds or milliseconds.

    Args:
        seconds: None where unknown.
    """
    if seconds is None:
        return ""
    return f"{seconds:.2f} s per step" if seconds >= 1 else f"{seconds * 1000:.0f} ms per step"


def duration(seconds: float | None) -> str | None:
    """Format hours, minutes and seconds, as far as they matter.

    Args:
        seconds: None where unknown.
    """
    if seconds is None:
        return None
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{seconds:.1f} s"


def clock_time(seconds: float) -> str:
    """Format local date and time.

    Args:
        seconds: since the epoch.
    """
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def table(title: str, rows: Mapping[str, Any]) -> str:
    """Return rows of a name and a value as HTML; nothing where there is none.

    Args:
        title: above it.
        rows: name to value.
    """
    cells = [
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(str(value))}</td></tr>'
        for key, value in rows.items()
        if value not in (None, "")
    ]
    if not cells:
        return ""
    return (
        f'<section><h2>{title}</h2><div class="scroll"><table><tbody>{"".join(cells)}</tbody></table></div></section>'
    )
