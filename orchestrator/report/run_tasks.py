"""The part of a run's page that is about tasks: a chart for each metric, a curve for each task."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.report.run_data import RunData
from orchestrator.report.run_sources import TONES
from orchestrator.report.svg import Chart, Series

_KEY = "task/"


def task_charts(data: RunData, lines: Sequence[tuple[float, str]]) -> str:
    """Draw what tasks gave during the run; nothing where none were asked.

    Args:
        data: of the run.
        lines: vertical marks.
    """
    metrics: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for row in data.tasks for key in row if key.startswith(_KEY)):
        name, _, metric = key.removeprefix(_KEY).partition("/")
        metrics.setdefault(metric, []).append(name)
    charts = []
    for metric, names in metrics.items():
        series = [
            Series(name, data.series(f"{_KEY}{name}/{metric}", data.tasks), f"part{at % TONES}", dots=True)
            for at, name in enumerate(names)
        ]
        charts.append(Chart(f"task-{metric.replace('/', '-')}", f"Tasks: {metric}", series, marks=lines).render())
    return "".join(charts)
