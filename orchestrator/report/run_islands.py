"""The part of a run's page that is about its islands: who has trained what, what went over the wire, who waited."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from orchestrator.observe.history import last_rows
from orchestrator.report.run_data import Point, Row, RunData, number
from orchestrator.report.run_sources import TONES
from orchestrator.report.run_text import duration, known
from orchestrator.report.svg import Chart, Series, format_number

EXCHANGES = Path("islands") / "exchanges.jsonl"
"""The record of the hub, in the run's directory."""
_MINUTE = 60.0
_ADDED = ("received_bytes", "sent_bytes", "waited_seconds", "seconds")  # of each leg


def islands_of(legs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what is recorded of each island: sums over the legs of a run, and else what the last one says.

    Args:
        legs: of run.json.
    """
    found: dict[str, dict[str, Any]] = {}
    for leg in legs:
        islands = leg.get("islands")
        for name, about in islands.items() if isinstance(islands, Mapping) else ():
            if isinstance(about, Mapping):
                before = found.get(str(name), {})
                sums = {key: (number(before.get(key)) or 0.0) + (number(about.get(key)) or 0.0) for key in _ADDED}
                found[str(name)] = {**before, **about, **sums}
    return found


def waited_share(about: Mapping[str, Any]) -> float | None:
    """Return the share of its time that an island has waited for exchanges; None where it is not known.

    Args:
        about: the island, as `islands_of` has it.
    """
    seconds, waited = number(about.get("seconds")), number(about.get("waited_seconds"))
    return waited / seconds if seconds and waited is not None else None


def islands_section(data: RunData) -> str:
    """Return the islands of a run as a table and charts; nothing where it has none.

    Args:
        data: of the run.
    """
    islands = islands_of(data.legs)
    if not islands:
        return ""
    leg = data.legs[-1]
    moved = sum(one["received_bytes"] + one["sent_bytes"] for one in islands.values())
    merges = sum(number(one.get("exchanges")) or 0 for one in data.legs)
    words = [str(leg.get("exchange") or ""), f"{merges:,.0f} exchanges", f"{format_number(moved)}B over the wire"]
    rows = last_rows(data.run_dir / EXCHANGES)
    charts = f'<section class="charts" aria-label="Islands">{_charts(rows, sorted(islands))}</section>'
    return (
        f'<section><h2>Islands</h2><p class="lead">{escape("; ".join(filter(None, words)))}</p>'
        f'<div class="scroll"><table>{_head()}<tbody>{"".join(map(_row, islands.items()))}</tbody></table></div>'
        f"{_events(rows)}</section>{charts}"
    )


def _head() -> str:
    titles = ("Island", "Place", "State", "Sequences", "Share", "Per second", "Waited", "Sent", "Received")
    return f"<thead><tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr></thead>"


def _row(item: tuple[str, Mapping[str, Any]]) -> str:
    name, one = item
    share, speed, waited = number(one.get("share")), number(one.get("speed")), waited_share(one)
    sequences = number(one.get("sequences"))
    time = duration(number(one.get("waited_seconds")))
    cells = [
        known(one.get("place")),
        known(one.get("state")),
        "unknown" if sequences is None else f"{sequences:,.0f}",
        "unknown" if share is None else f"{share:.1%}",
        f"{speed:.3g}" if speed else "unknown",
        "unknown" if waited is None else f"{waited:.1%}, {time}",
        *(f"{format_number(one[key])}B" for key in ("sent_bytes", "received_bytes")),
    ]
    return f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'


_TOLD = {"welcome": "comes", "away": "is away", "back": "is back", "gone": "is gone", "set aside": "is set aside"}
_SHOWN = 12


def _events(rows: Sequence[Row]) -> str:
    """Return who came and went, the last ones."""
    texts = []
    for row in rows:
        if row.get("kind") in _TOLD:
            why = row.get("because") or row.get("start") or ""
            after = duration(number(row.get("after"))) or "unknown"
            texts.append(f"after {after} {known(row.get('island'))} {_TOLD[row['kind']]}{f' ({why})' if why else ''}")
    items = "".join(f"<li>{escape(text)}</li>" for text in texts[-_SHOWN:])
    return f"<ul>{items}</ul>" if items else ""


def _charts(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Draw the record; of a long one its last part."""
    times = [time for row in rows if (time := number(row.get("time"))) is not None]
    first = min(times, default=0.0)
    reports = [row for row in rows if row.get("kind") == "report"]
    given = [
        {**one, "time": row.get("time")}
        for row in rows
        if row.get("kind") == "exchange" and isinstance(row.get("given"), list)
        for one in row["given"]
        if isinstance(one, Mapping)
    ]

    charts = [
        ("islands-trained", "Sequences trained", reports, _sequences, True, ""),
        ("islands-waited", "Waiting (% of a lease's time)", reports, _waited, False, "%"),
        ("islands-sent", "Sent to the hub (MB)", given, _megabytes, True, " MB"),
        ("islands-missed", "Exchanges missed by what was sent", given, _missed, False, ""),
    ]
    return "".join(
        Chart(
            key,
            title,
            [
                Series(name, _points(entries, name, figure, first, summed), f"part{at % TONES}")
                for at, name in enumerate(names)
            ],
            unit=unit,
            include=(0.0,),
            axis="minute",
        ).render()
        for key, title, entries, figure, summed, unit in charts
    )


def _sequences(row: Mapping[str, Any]) -> float:
    counts = row.get("sequences")
    return sum(number(one) or 0.0 for one in counts) if isinstance(counts, list) else 0.0


def _waited(row: Mapping[str, Any]) -> float:
    return 100 * (number(row.get("waited")) or 0.0) / max(number(row.get("seconds")) or 0.0, 1e-9)


def _megabytes(row: Mapping[str, Any]) -> float:
    return (number(row.get("bytes")) or 0.0) / 1e6


def _missed(row: Mapping[str, Any]) -> float:
    return number(row.get("missed")) or 0.0


def _points(
    rows: Sequence[Mapping[str, Any]],
    name: str,
    figure: Callable[[Mapping[str, Any]], float],
    first: float,
    summed: bool,
) -> list[Point]:
    points, total = list[Point](), 0.0
    for row in rows:
        time = number(row.get("time"))
        if row.get("island") == name and time is not None:
            total += figure(row)
            points.append(((time - first) / _MINUTE, total if summed else figure(row)))
    return points
