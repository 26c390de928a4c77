"""Charts side by side as one SVG file that needs no page around it, over logarithmic axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from orchestrator.report.plan_svg import Dot, Line, LogFrame

_TITLE, _LEGEND, _MARGIN = 24.0, 30.0, 8.0
_COLOURS = ("#1f77b4", "#d95f02", "#2a8a4a", "#7b4fa3", "#b5332e", "#5f6b73")
_STYLE = (
    "text{font-family:sans-serif;font-size:12px;fill:#333}.tick{font-size:11px;fill:#555}"
    ".grid{stroke:#e2e2e2}.axis{stroke:#888}.line{fill:none;stroke-width:1.8}.dashed{stroke-dasharray:5 4}"
    ".ring{fill:#fff;stroke-width:1.8}"
) + "".join(f".stroke{i}{{stroke:{colour}}}.tone{i}{{fill:{colour}}}" for i, colour in enumerate(_COLOURS))


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: above it.
        x_title: of the x axis.
        y_title: of the y axis.
        lines: the curves, whose points are marked; `tone` counts colours from 0.
    """

    title: str
    x_title: str
    y_title: str
    lines: Sequence[Line]


def draw_panels(panels: Sequence[Panel], width: float = 420.0, height: float = 300.0) -> str:
    """Draw charts side by side, all to the same scale, with one legend.

    Args:
        panels: the charts; each has points.
        width: of one, in pixels.
        height: of one, in pixels.
    """
    points = [point for panel in panels for line in panel.lines for point in line.points]
    total, whole = width * len(panels), height + _TITLE + _LEGEND
    parts = [f'<rect width="{total:g}" height="{whole:g}" fill="#fff"/>']
    for number, panel in enumerate(panels):
        frame = LogFrame(width, height, points)
        body = [*frame.grid(panel.x_title, panel.y_title), *(frame.curve(line) for line in panel.lines)]
        body += [
            frame.dot(Dot(x, y, title=f"{line.label}: {x:g}, {y:.4g}", tone=line.tone, hollow=line.dashed)).replace(
                'r="5"', 'r="3"'
            )
            for line in panel.lines
            for x, y in line.points
        ]
        title = f'<text x="{width / 2:g}" y="{_TITLE - 8:g}" text-anchor="middle">{escape(panel.title)}</text>'
        place = f"translate({number * width:g} 0)"
        parts.append(f'<g transform="{place}">{title}<g transform="translate(0 {_TITLE:g})">{"".join(body)}</g></g>')
    parts.append(_keys(panels, total, whole))
    label = escape("; ".join(panel.title for panel in panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total:g} {whole:g}" width="{total:g}" '
        f'height="{whole:g}" role="img" aria-label="{label}"><style>{_STYLE}</style>{"".join(parts)}</svg>\n'
    )


def _keys(panels: Sequence[Panel], total: float, whole: float) -> str:
    lines = list({line.label: line for panel in panels for line in panel.lines}.values())
    step = (total - 2 * _MARGIN) / max(1, len(lines))
    text = []
    for number, line in enumerate(lines):
        x, y = _MARGIN + number * step, whole - _LEGEND / 2
        dashed = " dashed" if line.dashed else ""
        text.append(f'<path class="line stroke{line.tone}{dashed}" d="M{x:.0f},{y:.0f}h22"/>')
        text.append(f'<text x="{x + 28:.0f}" y="{y + 4:.0f}">{escape(line.label)}</text>')
    return "".join(text)
