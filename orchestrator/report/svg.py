"""Line charts as inline SVG: no library, no network; colours come from the page's style sheet."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from orchestrator.report.run_data import Point, downsample

_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 14.0, 12.0, 34.0
_TICK_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_MAX_DECIMALS = 5
_MAX_DOTS = 60  # beyond it the dots of a curve run together


@dataclass(frozen=True)
class Series:
    """One curve. `style` is its CSS class; `hidden` curves are drawn faintly and left out of legend and tooltip.

    Attributes:
        label: in the legend.
        points: (x, y), by rising x.
        dots: points are drawn, too.
    """

    label: str
    points: Sequence[Point]
    style: str
    dots: bool = False
    hidden: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart over steps, or over what else is counted.

    Attributes:
        key: unique on the page.
        title: above it.
        series: the curves.
        width: in pixels.
        height: in pixels.
        rules: horizontal lines, (y, label, style).
        marks: vertical lines, (x, label); an empty label is not written.
        unit: behind the values of the tooltip.
        include: y values that the axis must reach.
        axis: what is counted on the x axis.
    """

    key: str
    title: str
    series: Sequence[Series]
    width: float = 460.0
    height: float = 230.0
    rules: Sequence[tuple[float, str, str]] = ()
    marks: Sequence[tuple[float, str]] = ()
    unit: str = ""
    include: Sequence[float] = field(default=())
    axis: str = "step"

    def render(self) -> str:
        """Return the figure's HTML; a line of text where there is nothing to draw."""
        drawn = [series for series in self.series if series.points]
        title = escape(self.title)
        if not drawn:
            return f'<figure class="chart"><figcaption>{title}</figcaption><p class="empty">No data.</p></figure>'
        frame = _Frame(self, drawn)
        shown = [(series, downsample(series.points)) for series in drawn]
        body = [*frame.grid(), *frame.rules(), *frame.marks()]
        body += [_curve(series, points, frame) for series, points in shown]
        label = f"{self.title}: {'; '.join(_in_words(series, self.axis) for series in drawn if not series.hidden)}"
        svg = (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{escape(label)}" tabindex="0">'
            f'{"".join(body)}<line class="cursor" y1="{_TOP:g}" y2="{self.height - _BOTTOM:g}" hidden></line></svg>'
        )
        return (
            f'<figure class="chart" id="chart-{self.key}"><figcaption>{title}{self._legend(drawn)}</figcaption>'
            f'<div class="plot">{svg}<div class="tip" hidden></div></div>{self._data(shown, frame)}</figure>'
        )

    def _legend(self, drawn: Sequence[Series]) -> str:
        entries = [(series.label, series.style) for series in drawn if not series.hidden]
        entries += [(label, style) for _, label, style in self.rules]
        if len(entries) < 2:
            return ""
        items = "".join(f'<li><i class="key {style}"></i>{escape(label)}</li>' for label, style in entries)
        return f'<ul class="legend">{items}</ul>'

    def _data(self, shown: Sequence[tuple[Series, Sequence[Point]]], frame: _Frame) -> str:
        """Return what the tooltip needs: the values, and the scale of x."""
        data = {
            "x": [frame.x_low, frame.x_high, _LEFT, self.width - _RIGHT],
            "unit": self.unit,
            "axis": self.axis,
            "series": [
                {"label": series.label, "style": series.style, "points": [[x, float(f"{y:.5g}")] for x, y in points]}
                for series, points in shown
                if not series.hidden
            ],
        }
        text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
        return f'<script type="application/json">{text}</script>'


class _Frame:
    """The scales of a chart, and what is drawn of them."""

    def __init__(self, chart: Chart, drawn: Sequence[Series]):
        self.chart = chart
        xs = [x for series in drawn for x, _ in series.points]
        ys = [y for series in drawn for _, y in series.points]
        ys += [y for y, _, _ in chart.rules] + list(chart.include)
        self.x_low, self.x_high = _spread(min(xs), max(xs))
        low, high = _spread(min(ys), max(ys))
        margin = (high - low) * 0.04
        self.y_low = low if low in chart.include else low - margin
        # Labels of marks stand above the curves.
        self.y_high = high + margin * (2.5 if any(label for _, label in chart.marks) else 1)

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (self.chart.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _TOP + (self.y_high - value) / (self.y_high - self.y_low) * (self.chart.height - _TOP - _BOTTOM)

    def grid(self) -> list[str]:
        chart, bottom, right = self.chart, self.chart.height - _BOTTOM, self.chart.width - _RIGHT
        parts = []
        ticks, texts = ticks_between(self.y_low, self.y_high, max(3, int(chart.height / 55)))
        for tick, text in zip(ticks, texts, strict=True):
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{_LEFT:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{_LEFT - 8:g}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
        ticks, texts = ticks_between(self.x_low, self.x_high, max(3, int(chart.width / 110)), whole=True)
        under = f'y="{bottom + 17:g}" text-anchor'
        for tick, text in zip(ticks, texts, strict=True):
            parts.append(f'<text class="tick" x="{self.x(tick):.1f}" {under}="middle">{text}</text>')
        parts.append(f'<line class="axis" x1="{_LEFT:g}" x2="{right:g}" y1="{bottom:g}" y2="{bottom:g}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8:g}" {under}="end">{escape(chart.axis)}</text>')
        return parts

    def rules(self) -> list[str]:
        return [
            f'<line class="rule {style}" x1="{_LEFT:g}" x2="{self.chart.width - _RIGHT:g}" y1="{self.y(value):.1f}" '
            f'y2="{self.y(value):.1f}"><title>{escape(label)}</title></line>'
            for value, label, style in self.chart.rules
        ]

    def marks(self) -> list[str]:
        parts = []
        top, bottom = _TOP, self.chart.height - _BOTTOM
        for value, label in self.chart.marks:
            if not self.x_low <= value <= self.x_high:
                continue
            x = self.x(value)
            # The label stands on the side that has room.
            anchor, shift = ("start", 5) if x < self.chart.width * 0.75 else ("end", -5)
            place = f'x="{x + shift:.1f}" y="{top + 9:g}" text-anchor="{anchor}"'
            parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top:g}" y2="{bottom:g}"/>')
            if label:
                parts.append(f'<text class="mark-label" {place}>{escape(label)}</text>')
        return parts


def ticks_between(low: float, high: float, count: int, *, whole: bool = False) -> tuple[list[float], list[str]]:
    """Return about `count` round values from `low` to `high`, and how they are written.

    Args:
        low: end of the interval.
        high: other end of it.
        count: of values, about.
        whole: integers only.
    """
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in _TICK_STEPS if power * factor >= rough * 0.8)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = [index * step for index in range(first, last + 1)]
    # All ticks share the suffix of the largest, so that 5k stands below 10k.
    divisor, suffix = _scale(max((abs(tick) for tick in ticks), default=0.0))
    decimals = _decimals(step / divisor)
    if decimals > _MAX_DECIMALS:
        return ticks, [format_number(tick) for tick in ticks]
    return ticks, ["0" if tick == 0 else f"{tick / divisor:,.{decimals}f}{suffix}" for tick in ticks]


def format_number(value: float) -> str:
    """Format a number with up to four digits: 1.2M, 34k, 0.0012, 3e-5, 6e23.

    Args:
        value: the number.
    """
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e15:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    divisor, suffix = _scale(abs(value))
    return f"{value / divisor:,.4g}{suffix}" if suffix or abs(value) < 1000 else f"{value:,.0f}"


def _scale(size: float) -> tuple[float, str]:
    for limit, divisor, suffix in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit:
            return divisor, suffix
    return 1.0, ""


def _decimals(step: float) -> int:
    """Decimals that `step` itself needs: 2.5 one, 0.25 two."""
    for count in range(_MAX_DECIMALS + 1):
        scaled = step * 10**count
        if abs(scaled - round(scaled)) < 1e-6 * max(1.0, scaled) and round(scaled) > 0:
            return count
    return _MAX_DECIMALS + 1


def _curve(series: Series, points: Sequence[Point], frame: _Frame) -> str:
    style = f"{series.style} faint" if series.hidden else series.style
    places = [(frame.x(x), frame.y(y)) for x, y in points]
    parts = []
    if len(places) > 1:
        path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<path class="curve {style}" d="{path}"/>')
    if (series.dots and len(places) <= _MAX_DOTS) or len(places) == 1:
        parts += [f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
    return "".join(parts)


def _in_words(series: Series, axis: str) -> str:
    first, last = series.points[0], series.points[-1]
    if len(series.points) == 1:
        return f"{series.label} {first[1]:.4g} at {axis} {first[0]:g}"
    return f"{series.label} from {first[1]:.4g} at {axis} {first[0]:g} to {last[1]:.4g} at {axis} {last[0]:g}"


def _spread(low: float, high: float) -> tuple[float, float]:
    """Return the interval, widened where it is a single point."""
    if high > low:
        return low, high
    around = abs(low) * 0.1 or 1.0
    return low - around, high + around
