"""The HTML page that compares runs: loss curves, results, and differences of configuration."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from orchestrator.report.comparison import COLUMNS, Compared, differences, rows
from orchestrator.report.page import escaped, frame, table
from orchestrator.report.run_data import Point, smooth
from orchestrator.report.run_text import clock_time
from orchestrator.report.svg import Chart, Series

_SMOOTH_FROM = 200  # points of a curve from which it is smoothed
# Of the first eight runs, told apart by people who do not see all colours alike; further ones begin again, dashed.
_TONES = ("#1f6feb", "#c2620a", "#1a7f4b", "#7a4fd0", "#c0362c", "#0e8a8a", "#b0448c", "#76652b")


def write_compare_page(path: Path, runs: Sequence[Compared]) -> None:
    """Write the page.

    Args:
        path: of the file.
        runs: as `read_compared` gives them.

    Raises:
        FileExistsError: there is a file of that name; it stays as it is.
        OSError: it cannot be written.
    """
    content = render_compare(runs)
    with open(path, "x", encoding="utf-8") as file:
        file.write(content)


def render_compare(runs: Sequence[Compared]) -> str:
    """Return the page as HTML.

    Args:
        runs: as `read_compared` gives them.
    """
    title = " and ".join(run.label for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    changed = [[key, *texts] for key, texts in differences(runs).items()]
    same = '<p class="lead">Their configurations are the same.</p>'
    return frame(
        title,
        [
            f"<h1>{escaped(title)}</h1>",
            f'<p class="lead">{len(runs)} runs compared, {clock_time(time.time())}</p>',
            f'<section class="charts" aria-label="Curves">{_charts(runs)}</section>',
            "<h2>Results</h2>",
            table([name.capitalize() for name in COLUMNS], rows(runs)),
            "<h2>Differences of the configurations</h2>",
            table(["Key", *(run.label for run in runs)], changed) if changed else same,
        ],
        _style(len(runs)),
    )


def _charts(runs: Sequence[Compared]) -> str:
    def chart(key: str, title: str, curves: Sequence[list[Point]], wide: bool = False, dots: bool = False) -> str:
        pairs = enumerate(zip(runs, curves, strict=True))
        series = [Series(run.label, points, f"run{at}", dots) for at, (run, points) in pairs]
        size = (1000.0, 360.0) if wide else (460.0, 230.0)
        return Chart(key, title, series, *size).render()

    losses = [_readable(run.data.series("loss")) for run in runs]
    held_out = [run.data.series("val_loss", run.data.evals) for run in runs]
    speeds = [run.data.series("tokens_per_second") for run in runs]
    loss = chart("loss", "Training loss (nats per token)", losses, wide=True)
    validation = chart("validation", "Validation loss (nats per token)", held_out, dots=True)
    return f'<div class="wide">{loss}</div>{validation}{chart("speed", "Tokens per second", speeds)}'


def _readable(points: list[Point]) -> list[Point]:
    return smooth(points, 2 * (len(points) // 100) + 1) if len(points) >= _SMOOTH_FROM else points


def _style(count: int) -> str:
    lines = []
    for at in range(count):
        dashes = f" .curve.run{at} {{ stroke-dasharray: 6 3; }}" if at >= len(_TONES) else ""
        lines.append(f".run{at} {{ --tone: {_TONES[at % len(_TONES)]}; }}{dashes}")
    return "\n".join(lines) + "\n"
