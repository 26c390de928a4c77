"""The HTML page of a sweep: history, parallel coordinates, importances, the curves of its runs, and all of them."""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from orchestrator.atomic_files import write_atomically
from orchestrator.errors import printable
from orchestrator.report.page import frame
from orchestrator.report.run_data import Point, read_run_data
from orchestrator.report.run_text import clock_time
from orchestrator.report.svg import Chart, Series
from orchestrator.report.sweep_svg import Axis, bars, parallel
from orchestrator.sweeps.importances import importances
from orchestrator.sweeps.sweep_record import PAGE, SweepJob, SweepRecord, parsed_number, short_value

_MAX_CURVES = 60  # runs whose curves are drawn; of more, the last ones
_STYLE = """
.trial { fill: none; stroke: var(--soft); stroke-width: 1.2; opacity: .8; }
.trial:hover { stroke-width: 3; opacity: 1; }
.trial.shade0 { stroke: #2166ac; } .trial.shade1 { stroke: #4393c3; } .trial.shade2 { stroke: #92979c; }
.trial.shade3 { stroke: #e08a5a; } .trial.shade4 { stroke: #b2182b; opacity: .55; }
.trial.best { stroke: var(--green); stroke-width: 3.2; opacity: 1; }
.share { fill: var(--blue); } .best-so-far { --tone: var(--green); } .each { --tone: var(--soft); }
.each.curve { stroke: none; } .ended { --tone: var(--orange); } .whole { --tone: var(--blue); }
tr.best th, tr.best td { color: var(--green); font-weight: 600; }
"""


def keep_sweep(folder: Path, record: SweepRecord) -> None:
    """Write record and page of a sweep anew; one that cannot be written ends no sweep.

    Args:
        folder: of the sweep; it is made.
        record: the sweep so far.
    """
    from orchestrator.output import tell

    try:
        record.write(folder)
        write_atomically(folder / PAGE, render_sweep(record, folder), shared=True)
    except OSError as error:
        tell(f"warning: the page of the sweep cannot be written: {error}")


def render_sweep(record: SweepRecord, folder: Path) -> str:
    """Return the page as HTML.

    Args:
        record: the sweep so far.
        folder: where the page stands, from which it leads to the runs.
    """
    counts = {status: sum(job.status == status for job in record.jobs) for status in _statuses(record)}
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    wanted = f" of {record.wanted}" if record.wanted else ""
    command = shlex.join(["python", "-m", "orchestrator", "train", *record.command])
    return frame(
        printable(record.name),
        [
            f"<h1>{escape(printable(record.name))}</h1>",
            f'<p class="lead">{len(record.jobs)}{wanted} runs ({said}), {clock_time(time.time())}. '
            f"{escape(record.objective)}: {'less' if record.lower_is_better else 'more'} is better.</p>",
            _best(record),
            f'<section class="charts" aria-label="Charts">{_history(record)}{_importances(record)}'
            f"{_parallel(record)}{_curves(record)}</section>",
            "<h2>Runs</h2>",
            _table(record, folder),
            "<h2>Command</h2>",
            f"<details open><summary>{'Goes on with the sweep' if record.space else 'Of the sweep'}</summary>"
            f"<pre>{escape(printable(command))}</pre></details>",
        ],
        _STYLE,
    )


def _statuses(record: SweepRecord) -> list[str]:
    return list(dict.fromkeys(job.status for job in record.jobs))


def _best(record: SweepRecord) -> str:
    best = record.best
    if best is None or best.objective is None:
        return '<p class="notice">No run has finished with a result yet.</p>'
    cards = [("Best", f"{best.objective:.6g}", f"run {best.number}")]
    cards += [(key, short_value(best.values.get(key, "")), "") for key in record.keys]
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(printable(value))}<small>{note}</small></dd></div>"
        for name, value, note in cards
    )
    return f'<dl class="cards">{items}</dl>'


def _history(record: SweepRecord) -> str:
    done = [(float(job.number), job.objective) for job in record.jobs if job.status == "finished" and _finite(job)]
    points: list[Point] = [(number, value) for number, value in done if value is not None]
    pruned: list[Point] = [
        (float(job.number), job.objective)
        for job in record.jobs
        if job.status == "pruned" and job.objective is not None and _finite(job)
    ]
    best: list[Point] = []
    for number, value in points:
        reached = [value, *(before for _, before in best[-1:])]
        best.append((number, min(reached) if record.lower_is_better else max(reached)))
    series = [Series("best so far", best, "best-so-far"), Series("finished", points, "each", dots=True)]
    if pruned:
        series.append(Series("pruned, at its last evaluation", pruned, "ended each", dots=True))
    return Chart("history", f"History of {record.objective}", series, axis="run").render()


def _importances(record: SweepRecord) -> str:
    title, found = "Importance of the keys (PED-ANOVA)", importances(record)
    if isinstance(found, str):
        caption = f"<figcaption>{title}</figcaption>"
        return f'<figure class="chart">{caption}<p class="empty">{escape(found)}</p></figure>'
    return bars(title, found)


def _parallel(record: SweepRecord) -> str:
    jobs = [job for job in record.jobs if job.objective is not None and _finite(job) and job.status != "running"]
    keys = record.keys
    if len(jobs) < 2 or not keys:
        return ""
    axes = []
    for key in keys:
        texts = [job.values.get(key) for job in jobs]
        numbers = [parsed_number(text) for text in texts if text is not None]
        numeric = all(number is not None for number in numbers)
        sizes = [number for number in numbers if number is not None]
        log = record.space.get(key, {}).get("log", numeric and min(sizes) > 0 and max(sizes) >= 10 * min(sizes))
        axes.append(Axis(key, texts, numeric, bool(log)))
    axes.append(Axis(record.objective, [repr(job.objective) for job in jobs], numeric=True))
    ranked = sorted(jobs, key=lambda job: (job.objective or 0.0) * (1 if record.lower_is_better else -1))
    tones = [ranked.index(job) / max(1, len(jobs) - 1) for job in jobs]
    titles = [_title(job, keys) for job in jobs]
    best = next(
        (at for at, job in enumerate(jobs) if record.best is not None and job.number == record.best.number), None
    )
    return parallel(axes, tones, titles, best)


def _curves(record: SweepRecord) -> str:
    series = []
    for job in [job for job in record.jobs if job.run_dir is not None][-_MAX_CURVES:]:
        data = read_run_data(Path(str(job.run_dir)))
        points = data.series("val_loss", data.evals)
        chosen = record.best is not None and job.number == record.best.number
        style = "best-so-far" if chosen else "ended" if job.status == "pruned" else "whole"
        series.append(
            Series(f"run {job.number}{', the best' if chosen else ''}", points, style, dots=True, hidden=not chosen)
        )
    if not any(one.points for one in series):
        return ""
    title = "Validation loss of the runs (nats per token); orange: pruned"
    return f'<div class="wide">{Chart("curves", title, series, 1000.0, 360.0).render()}</div>'


def _table(record: SweepRecord, folder: Path) -> str:
    head = "".join(
        f'<th scope="col">{escape(printable(name))}</th>' for name in ("Run", *record.keys, record.objective, "Status")
    )
    rows = []
    for job in record.jobs:
        objective = "" if job.objective is None else f"{job.objective:.6g}"
        cells = [*(short_value(job.values.get(key, "")) for key in record.keys), objective, job.status]
        chosen = ' class="best"' if record.best is not None and job.number == record.best.number else ""
        body = "".join(f"<td>{escape(printable(cell))}</td>" for cell in cells)
        rows.append(f'<tr{chosen}><th scope="row">{_link(job, folder)}</th>{body}</tr>')
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _link(job: SweepJob, folder: Path) -> str:
    report = None if job.run_dir is None else Path(job.run_dir) / "report.html"
    if report is None or not report.is_file():
        return str(job.number)
    return f'<a href="{escape(os.path.relpath(report, folder), quote=True)}">{job.number}</a>'


def _title(job: SweepJob, keys: Sequence[str]) -> str:
    values = ", ".join(f"{key}={short_value(job.values.get(key, ''))}" for key in keys)
    return f"run {job.number}: {values}: {job.objective:.6g} ({job.status})"


def _finite(job: SweepJob) -> bool:
    return job.objective is not None and math.isfinite(job.objective)
