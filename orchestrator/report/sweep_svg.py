"""Charts of a sweep as inline SVG: parallel coordinates, and shares as bars. No script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from orchestrator.report.svg import format_number

_WIDTH, _TOP, _BOTTOM, _SIDE = 1000.0, 34.0, 22.0, 70.0
_HEIGHT = 330.0


@dataclass(frozen=True)
class Axis:
    """One vertical axis of a chart of parallel coordinates.

    Attributes:
        title: above it.
        texts: of each line's value; None where it has none.
        numeric: by size; else each text has a place of its own.
        log: by the logarithm of the size.
    """

    title: str
    texts: Sequence[str | None]
    numeric: bool
    log: bool = False

    def places(self) -> tuple[list[float | None], list[tuple[float, str]]]:
        """Return where each line crosses, from 0 at the foot to 1, and the labels of the axis."""
        if not self.numeric:
            known = sorted({text for text in self.texts if text is not None})
            place = {text: (at + 0.5) / len(known) for at, text in enumerate(known)}
            return [None if text is None else place[text] for text in self.texts], [(place[one], one) for one in known]
        numbers = [None if text is None else float(text) for text in self.texts]
        finite = [number for number in numbers if number is not None and math.isfinite(number)]
        low, high = min(finite, default=0.0), max(finite, default=1.0)

        def at(number: float) -> float:
            if high == low:
                return 0.5
            if not math.isfinite(number):
                return 1.0
            if self.log:
                return math.log(number / low) / math.log(high / low)
            return (number - low) / (high - low)

        ends = [low, high] if high > low else [low]
        middle = [math.sqrt(low * high) if self.log else (low + high) / 2] if high > low else []
        labels = [(at(number), format_number(number)) for number in (*ends, *middle)]
        return [None if number is None else at(number) for number in numbers], labels


def parallel(axes: Sequence[Axis], tones: Sequence[float], titles: Sequence[str], best: int | None) -> str:
    """Return a chart of parallel coordinates.

    Args:
        axes: from the left to the right, with a value per line each.
        tones: of each line, from 0 (good) to 1.
        titles: of each line, shown when it is pointed at.
        best: the line that is drawn above the others.
    """
    step = (_WIDTH - 2 * _SIDE) / max(1, len(axes) - 1)
    xs = [_SIDE + step * number for number in range(len(axes))]
    height = _HEIGHT - _TOP - _BOTTOM
    parts, columns = [], []
    for x, axis in zip(xs, axes, strict=True):
        places, labels = axis.places()
        columns.append(places)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP:g}" y2="{_TOP + height:.1f}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="16" text-anchor="middle">{escape(axis.title)}</text>')
        parts += [
            f'<text class="tick" x="{x + 6:.1f}" y="{_TOP + height * (1 - place) + 4:.1f}">{escape(label)}</text>'
            for place, label in labels
        ]
    order = [*(line for line in range(len(tones)) if line != best), *([] if best is None else [best])]
    for line in order:
        crossed = [(x, column[line]) for x, column in zip(xs, columns, strict=True)]
        points = [(x, _TOP + height * (1 - place)) for x, place in crossed if place is not None]
        path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
        style = "best" if line == best else f"shade{min(4, int(tones[line] * 5))}"
        parts.append(f'<path class="trial {style}" d="{path}"><title>{escape(titles[line])}</title></path>')
    words = f"Parallel coordinates: {len(tones)} runs over {', '.join(axis.title for axis in axes)}"
    return (
        f'<figure class="chart wide"><figcaption>Parallel coordinates</figcaption><svg viewBox="0 0 {_WIDTH:g} '
        f'{_HEIGHT:g}" role="img" aria-label="{escape(words)}">{"".join(parts)}</svg></figure>'
    )


def bars(title: str, shares: Mapping[str, float]) -> str:
    """Return shares as horizontal bars.

    Args:
        title: above them.
        shares: of 1, by name.
    """
    rows, longest = [], max(shares.values(), default=0.0) or 1.0
    for number, (name, share) in enumerate(sorted(shares.items(), key=lambda item: -item[1])):
        y = 12 + 34 * number
        rows.append(
            f'<text class="tick" x="4" y="{y + 4:g}">{escape(name)}</text>'
            f'<rect class="share" x="4" y="{y + 8:g}" width="{max(1.0, 380 * share / longest):.1f}" height="10"/>'
            f'<text class="tick" x="{10 + 380 * share / longest:.1f}" y="{y + 17:g}">{share:.1%}</text>'
        )
    words = f"{title}: {', '.join(f'{name} {share:.1%}' for name, share in shares.items())}"
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 460 {34 * len(shares) + 12}" '
        f'role="img" aria-label="{escape(words)}">{"".join(rows)}</svg></figure>'
    )
