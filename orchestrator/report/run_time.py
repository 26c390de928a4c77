"""The section of a report on the run's time: a band of what it did when, and what its legs spent on it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from html import escape

from orchestrator.observe.time_spans import STATES, Book, Span
from orchestrator.report.run_text import duration
from orchestrator.report.svg import ticks_between

_WIDTH, _HEIGHT, _TOP, _BOTTOM = 1000.0, 118.0, 20.0, 26.0
_COLUMNS = 400
_UNITS = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))
ABOUT = {
    "training": "steps that were kept",
    "starting": "processes start and meet",
    "loading": "data, model, checkpoint and its check",
    "compiling": "until the first step is done",
    "evaluating": "held-out loss and samples",
    "saving": "steps wait for a save",
    "lost": "training that a later leg did again",
    "waiting": "from a failure to the next start",
    "stopped": "asked to stop; no part of the run's time",
    "unknown": "the book could not be written, or stayed elsewhere",
}
"""What the states are, in a few words."""


def goodput_line(book: Book) -> str:
    """Return goodput and where the rest of the time went, in a line; nothing for an empty book.

    Args:
        book: of the run.
    """
    if book.fraction is None:
        return ""
    rest = {state: value for state, value in book.seconds.items() if state not in ("training", "stopped")}
    shares = [f"{state} {value / book.counted:.1%}" for state, value in sorted(rest.items(), key=_largest)]
    return f"{book.fraction:.1%} of {duration(book.counted)}" + (f"; {', '.join(shares)}" if shares else "")


def time_section(book: Book) -> str:
    """Return the band, its legend, and a table of the legs; nothing for an empty book.

    Args:
        book: of the run.
    """
    if book.fraction is None:
        return ""
    stopped = book.seconds.get("stopped")
    pause = f" It was stopped on purpose for {duration(stopped)} more, which is cut out." if stopped else ""
    lead = f'<p class="lead">Goodput {book.fraction:.1%} of {duration(book.counted)}.{pause}</p>'
    return f"<h2>Time</h2>{lead}{_band(book)}{_table(book)}"


def _largest(item: tuple[str, float]) -> float:
    return -item[1]


def _band(book: Book) -> str:
    spans = _without_stops(book.spans)
    total = spans[-1].end
    body = [*_rects(spans, total), *_axis(total), *_legs(spans, total)]
    words = "; ".join(f"{state} {duration(value)}" for state, value in book.seconds.items() if state != "stopped")
    svg = (
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(f"Time of the run: {words}")}">'
        f"{_HATCH}{''.join(body)}</svg>"
    )
    return f'<figure class="chart band"><figcaption>What the run did{_legend(book)}</figcaption>{svg}</figure>'


# Colours can be told apart by everybody; what was lost is hatched as well, for prints without colours.
_HATCH = (
    '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="6" height="6" class="state lost"/><line y2="6" class="hatch"/></pattern></defs>'
)


def _legend(book: Book) -> str:
    items = "".join(
        f'<li title="{escape(ABOUT[state])}"><i class="patch {state}"></i>{state} {value / book.counted:.1%}</li>'
        for state, value in book.seconds.items()
        if state != "stopped"
    )
    return f'<ul class="legend">{items}</ul>'


def _without_stops(spans: Sequence[Span]) -> list[Span]:
    """Return spans from zero on; those in which the run was stopped take no time."""
    found, at = list[Span](), 0.0
    for span in spans:
        length = 0.0 if span.state == "stopped" else span.end - span.begin
        found.append(Span(span.state, at, at + length, span.leg, span.within))
        at += length
    return found


def _rects(spans: Sequence[Span], total: float) -> list[str]:
    """Return columns of the shares of the states; columns side by side that are alike are one."""
    columns = [_shares(spans, number * total / _COLUMNS, (number + 1) * total / _COLUMNS) for number in _indices(spans)]
    parts, x, bottom = list[str](), 0.0, _HEIGHT - _BOTTOM
    for shares, group in itertools.groupby(columns):
        width, y = len(list(group)) * _WIDTH / _COLUMNS, bottom
        for state, share in shares:
            height = share * (bottom - _TOP)
            y -= height
            place = f'x="{x:.1f}" y="{y:.1f}" width="{width + 0.3:.1f}" height="{height:.1f}"'
            parts.append(f'<rect class="state {state}" {place}><title>{state}: {escape(ABOUT[state])}</title></rect>')
            if state == "lost":
                parts.append(f'<rect fill="url(#hatch)" {place}/>')
        x += width
    return parts


def _indices(spans: Sequence[Span]) -> range:
    return range(_COLUMNS) if spans[-1].end > 0 else range(0)


def _shares(spans: Sequence[Span], begin: float, end: float) -> tuple[tuple[str, float], ...]:
    sums: dict[str, float] = {}
    for span in spans:
        length = span.end - span.begin
        share = min(end, span.end) - max(begin, span.begin)
        if length <= 0 or share <= 0:
            continue
        for state, seconds in span.seconds.items():
            sums[state] = sums.get(state, 0.0) + seconds * share / length
    whole = sum(sums.values())
    return tuple((state, round(sums[state] / whole, 2)) for state in STATES if sums.get(state, 0.0) >= 0.005 * whole)


def _axis(total: float) -> list[str]:
    size, unit = next(((size, unit) for size, unit in _UNITS if total >= 2 * size), (1.0, "s"))
    ticks, texts = ticks_between(0.0, total / size, 8)
    bottom = _HEIGHT - _BOTTOM
    return [
        f'<text class="tick" x="{tick * size / total * _WIDTH:.1f}" y="{bottom + 16:g}" '
        f'text-anchor="{"start" if tick == 0 else "middle" if tick * size < 0.97 * total else "end"}">'
        f"{text if tick else f'0 {unit}'}</text>"
        for tick, text in zip(ticks, texts, strict=True)
    ]


def _legs(spans: Sequence[Span], total: float) -> list[str]:
    """Return a mark where the processes of a leg begin to start; the first leg's is the left edge."""
    parts, free = list[str](), 0.0
    for leg, group in itertools.groupby(spans, key=lambda span: span.leg):
        starting = [span.begin for span in group if span.state not in ("waiting", "stopped")]
        if not starting:
            continue
        x = starting[0] / total * _WIDTH
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6:g}" y2="{_HEIGHT - _BOTTOM:g}"/>')
        if x >= free and x < _WIDTH - 40:
            parts.append(f'<text class="mark-label" x="{x + 3:.1f}" y="{_TOP - 7:g}">leg {leg}</text>')
            free = x + 44
    return parts


def _table(book: Book) -> str:
    states = [state for state in STATES if state in book.seconds]
    head = ("Leg", "Time", "Goodput", *(state.capitalize() for state in states))
    rows = [_row(str(leg), seconds, states) for leg, seconds in book.legs.items()]
    rows += [_row("all", book.seconds, states)] if len(rows) > 1 else []
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    titles = "".join(f'<th scope="col">{name}</th>' for name in head)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(name: str, seconds: Mapping[str, float], states: Sequence[str]) -> list[str]:
    counted = sum(value for state, value in seconds.items() if state != "stopped")
    goodput = f"{seconds.get('training', 0.0) / counted:.1%}" if counted else ""
    return [name, duration(counted) or "", goodput, *(duration(seconds.get(state)) or "" for state in states)]
