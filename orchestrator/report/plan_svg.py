"""Charts of a plan as inline SVG: stacked bars, and charts with logarithmic axes. No script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from orchestrator.report.svg import format_number

_LEFT, _RIGHT, _TOP, _BOTTOM = 66.0, 16.0, 18.0, 40.0
_BAR_HEIGHT = 30.0


@dataclass(frozen=True)
class Dot:
    """A point with what is said of it: `label` beside it, `title` when pointed at."""

    x: float
    y: float
    label: str = ""
    title: str = ""
    tone: int = 0
    hollow: bool = False


@dataclass(frozen=True)
class Line:
    """A curve through points."""

    label: str
    points: Sequence[tuple[float, float]]
    tone: int = 0
    dashed: bool = False


def stacked_bar(segments: Sequence[tuple[str, float, str]], whole: float, limit: float | None = None) -> str:
    """One bar with its legend.

    Args:
        segments: (name, size, size in words); those of size 0 are left out.
        whole: what the full width stands for.
        limit: a mark on the bar, where something ends.
    """
    width, x, parts, legend = 1000.0, 0.0, [], []
    for tone, (name, size, words) in enumerate(segments):
        if size <= 0:
            continue
        length = size / whole * width
        title = f"<title>{escape(name)}: {escape(words)}</title>"
        parts.append(
            f'<rect class="tone{tone}" x="{x:.1f}" width="{length:.1f}" height="{_BAR_HEIGHT:g}">{title}</rect>'
        )
        legend.append(f'<li><i class="swatch tone{tone}"></i>{escape(name)} <b>{escape(words)}</b></li>')
        x += length
    if limit is not None:
        at = min(width, limit / whole * width)
        parts.append(f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="-4" y2="{_BAR_HEIGHT + 4:g}"/>')
    label = ", ".join(f"{name} {words}" for name, size, words in segments if size > 0)
    return (
        f'<svg class="bar" viewBox="0 -6 {width:g} {_BAR_HEIGHT + 12:g}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg><ul class="parts">{"".join(legend)}</ul>'
    )


def log_chart(
    title: str, x_title: str, y_title: str, lines: Sequence[Line], dots: Sequence[Dot], height: float = 330.0
) -> str:
    """Draw curves and points over logarithmic axes; a line of text where there is nothing to draw.

    Args:
        title: above it.
        x_title: of the x axis.
        y_title: of the y axis.
        lines: the curves.
        dots: the points.
        height: in pixels.
    """
    points = [*(point for line in lines for point in line.points), *((dot.x, dot.y) for dot in dots)]
    heading = f"<figcaption>{escape(title)}{_legend(lines)}</figcaption>"
    if not points:
        return f'<figure class="chart">{heading}<p class="empty">Nothing to draw: the figures are unknown.</p></figure>'
    frame = LogFrame(1000.0, height, points)
    body = [*frame.grid(x_title, y_title)]
    body += [frame.curve(line) for line in lines if len(line.points) > 1]
    body += [frame.dot(dot) for dot in dots]
    said = "; ".join(f"{dot.label or dot.title}" for dot in dots if dot.label or dot.title)
    return (
        f'<figure class="chart">{heading}<svg viewBox="0 0 1000 {height:g}" role="img" '
        f'aria-label="{escape(f"{title}: {said}")}">{"".join(body)}</svg></figure>'
    )


class LogFrame:
    """The scales of a chart with logarithmic axes, and what is drawn on them.

    Args:
        width: in pixels.
        height: in pixels.
        points: all that are drawn.
    """

    def __init__(self, width: float, height: float, points: Sequence[tuple[float, float]]):
        self._width, self._height = width, height
        self._x_low, self._x_high = _spread([x for x, _ in points])
        self._y_low, self._y_high = _spread([y for _, y in points])

    def x(self, value: float) -> float:
        """Return a place on the horizontal axis, in pixels.

        Args:
            value: of the axis.
        """
        share = (math.log10(value) - self._x_low) / (self._x_high - self._x_low)
        return _LEFT + share * (self._width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Return a place on the vertical axis, in pixels.

        Args:
            value: of the axis.
        """
        share = (self._y_high - math.log10(value)) / (self._y_high - self._y_low)
        return _TOP + share * (self._height - _TOP - _BOTTOM)

    def grid(self, x_title: str, y_title: str) -> list[str]:
        """Draw axes, ticks and their titles.

        Args:
            x_title: of the x axis.
            y_title: of the y axis.
        """
        bottom, right = self._height - _BOTTOM, self._width - _RIGHT
        parts = []
        for tick in _ticks(self._y_low, self._y_high):
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{_LEFT:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
            text = escape(format_number(tick))
            parts.append(f'<text class="tick" x="{_LEFT - 8:g}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        for tick in _ticks(self._x_low, self._x_high):
            x, text = self.x(tick), escape(format_number(tick))
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP:g}" y2="{bottom:g}"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16:g}" text-anchor="middle">{text}</text>')
        parts.append(f'<line class="axis" x1="{_LEFT:g}" x2="{right:g}" y1="{bottom:g}" y2="{bottom:g}"/>')
        middle, under = (_LEFT + right) / 2, self._height - 6
        parts.append(f'<text class="tick" x="{middle:g}" y="{under:g}" text-anchor="middle">{escape(x_title)}</text>')
        parts.append(f'<text class="tick" x="{_LEFT:g}" y="{_TOP - 6:g}">{escape(y_title)}</text>')
        return parts

    def curve(self, line: Line) -> str:
        """Draw a curve.

        Args:
            line: through its points.
        """
        path = "M" + "L".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in line.points)
        dashed = " dashed" if line.dashed else ""
        return f'<path class="line stroke{line.tone}{dashed}" d="{path}"/>'

    def dot(self, dot: Dot) -> str:
        """Draw a point.

        Args:
            dot: with its label.
        """
        x, y = self.x(dot.x), self.y(dot.y)
        kind = f"ring stroke{dot.tone}" if dot.hollow else f"tone{dot.tone}"
        title = f"<title>{escape(dot.title or dot.label)}</title>"
        text = f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5">{title}</circle>'
        if dot.label:
            anchor, shift = ("start", 9) if x < self._width * 0.72 else ("end", -9)
            place = f'x="{x + shift:.1f}" y="{y - 7:.1f}" text-anchor="{anchor}"'
            text += f'<text class="mark-label" {place}>{escape(dot.label)}</text>'
        return text


def _legend(lines: Sequence[Line]) -> str:
    if not lines:
        return ""
    items = "".join(f'<li><i class="swatch tone{line.tone}"></i>{escape(line.label)}</li>' for line in lines)
    return f'<ul class="legend">{items}</ul>'


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Logarithms of the ends of an axis, with some room around."""
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = 0.06 * (high - low) or 0.15
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis: the fewer decades, the more of each, and at least three."""
    for steps in ((1.0,), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)):
        values = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
        found = [value for value in values if low <= math.log10(value) <= high]
        if len(found) >= 3:
            return found
    return _linear_ticks(10.0**low, 10.0**high)


def _linear_ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers, equally spaced: on so short an axis the scale is nearly linear."""
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1.0, 2.0, 5.0, 10.0) if unit * factor >= raw)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
