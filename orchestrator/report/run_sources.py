"""The part of a run's page that is about its sources and validation sets: a curve for each, tokens and epochs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from orchestrator.report.run_data import Row, RunData, number
from orchestrator.report.run_text import fixed, whole
from orchestrator.report.svg import Chart, Series

TONES = 6
"""Colours of the style sheet, `part0` and so on, that curves take in turn."""
_CHARTS = {
    "loss": "Training loss by source (nats per token)",
    "val_loss": "Validation loss by set (nats per token)",
}


def source_charts(data: RunData, lines: Sequence[tuple[float, str]]) -> str:
    """Draw the losses of each source and of each validation set; nothing where there is one of them.

    Args:
        data: of the run.
        lines: vertical marks.
    """
    charts = []
    for beginning, title in _CHARTS.items():
        rows = data.train if beginning == "loss" else data.evals
        series = [
            Series(name, data.series(f"{beginning}/{name}", rows), f"part{at % TONES}", dots=beginning == "val_loss")
            for at, name in enumerate(_names(rows, beginning))
        ]
        if series:
            charts.append(Chart(f"{beginning}-parts", title, series, marks=lines).render())
    return "".join(charts)


def sources_section(data: RunData) -> str:
    """Say of each source what was taken of it, and its losses; nothing where metrics do not say it.

    Args:
        data: of the run.
    """
    names = _names(data.train, "epochs")
    if not names:
        return ""
    rows = "".join(_line(data, name) for name in names)
    titles = "".join(f'<th scope="col">{title}</th>' for title in ("Source", "Tokens", "Epochs", "Loss", "Validation"))
    inner = f"<table><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<h2>Sources</h2><div class="scroll">{inner}</div>'


def _line(data: RunData, name: str) -> str:
    cells = (
        whole(_last(data.train, f"tokens/{name}")),
        fixed(_last(data.train, f"epochs/{name}")),
        fixed(_last(data.train, f"loss/{name}")),
        fixed(_last(data.evals, f"val_loss/{name}")),
    )
    body = "".join(f"<td>{cell or ''}</td>" for cell in cells)
    return f'<tr><th scope="row">{escape(name)}</th>{body}</tr>'


def _last(rows: Sequence[Row], key: str) -> float | None:
    return next((value for row in reversed(rows) if (value := number(row.get(key))) is not None), None)


def _names(rows: Sequence[Row], beginning: str) -> list[str]:
    """Return the names behind `beginning/` in the keys of the rows, in the order in which they first come."""
    found: dict[str, None] = {}
    for row in rows:
        found |= dict.fromkeys(key.partition("/")[2] for key in row if key.startswith(f"{beginning}/"))
    return list(found)
