"""Read the files of a run directory for a report: all of them optional, none trusted."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.observe.time_spans import Book, read_book

_REWOUND = "rewound_from"  # of a row that says: the run was taken back to this step, and what came after is undone
Point = tuple[float, float]
Row = dict[str, Any]

MEAN_STEPS = 20
"""Steps at the end whose losses are averaged for the headline."""


@dataclass(frozen=True)
class RunData:
    """The content of a run's files.

    Attributes:
        run_dir: the run's directory.
        facts: `run.json`; empty where it is missing or cut.
        train: training rows of `metrics.jsonl` by rising step, without those that a later leg replaced.
        evals: evaluation rows, likewise.
        samples: rows of `samples.jsonl`.
        config_text: `config.yaml` as it is.
        skipped: lines that could not be read.
        non_finite: training rows whose loss or gradient norm is not a finite number.
        handovers: entries of `handover.json`.
        book: of its time.
        tasks: rows of what tasks of lm-eval gave, as those of `evals`.
    """

    run_dir: Path
    facts: Mapping[str, Any]
    train: Sequence[Row]
    evals: Sequence[Row]
    samples: Sequence[Row]
    config_text: str
    skipped: int
    non_finite: int
    handovers: Sequence[Row] = ()
    book: Book = Book()
    tasks: Sequence[Row] = ()

    @property
    def legs(self) -> list[Mapping[str, Any]]:
        """What is recorded of each start of the run, in order."""
        legs = self.facts.get("legs")
        return [leg for leg in legs if isinstance(leg, Mapping)] if isinstance(legs, list) else []

    def series(self, key: str, rows: Sequence[Row] | None = None) -> list[Point]:
        """Return the finite values of `key` over the steps.

        Args:
            key: of the figure in a row.
            rows: where they are; None: the training rows.
        """
        values = ((row["step"], number(row.get(key))) for row in (self.train if rows is None else rows))
        return [(float(step), value) for step, value in values if value is not None]

    def leg_rows(self) -> list[Row]:
        """Training rows of the last leg that has any."""
        last = max((leg_of(row) for row in self.train), default=0)
        return [row for row in self.train if leg_of(row) == last]


def read_run_data(run_dir: Path) -> RunData:
    """Read the files of a run; lines that a crash has cut are counted and left out.

    Args:
        run_dir: the run's directory.
    """
    facts = _read_json(run_dir / "run.json")
    metrics, bad_metrics = read_lines(run_dir / "metrics.jsonl")
    samples, bad_samples = read_lines(run_dir / "samples.jsonl")
    numbered = [row for row in metrics if number(row.get("step")) is not None]
    steps = [row for row in _in_effect(numbered, numbered) if _REWOUND not in row]
    starts = _leg_starts(facts, steps)
    train = _current([row for row in steps if "loss" in row], starts)
    return RunData(
        run_dir=run_dir,
        facts=facts,
        train=train,
        evals=_current([row for row in steps if "val_loss" in row], starts),
        tasks=_current([row for row in steps if "tasks" in row], starts),
        samples=_in_effect([row for row in samples if isinstance(row.get("text"), str)], numbered),
        config_text=_read_text(run_dir / "config.yaml"),
        skipped=bad_metrics + bad_samples + len(metrics) - len(numbered),
        non_finite=sum(any(number(row.get(key, 0)) is None for key in ("loss", "grad_norm")) for row in train),
        handovers=_read_list(run_dir / "handover.json"),
        book=read_book(run_dir),
    )


def summarise(run_dir: Path) -> dict[str, Any]:
    """Return the run's headline numbers; None where one is unknown.

    `tokens_per_second` and `mfu` are medians over the last leg, `loss_mean` is over the last `MEAN_STEPS` steps,
    `seconds` are those of all legs, without the time between them; `goodput` is the share of the run's time, also
    between legs, that went into steps that were kept.

    Args:
        run_dir: the run's directory.
    """
    return headline(read_run_data(run_dir))


def headline(data: RunData) -> dict[str, Any]:
    """Return `summarise` of data that has been read.

    Args:
        data: of the run.
    """
    losses, evals = data.series("loss"), data.series("val_loss", data.evals)
    last_leg = data.legs[-1] if data.legs else {}
    perplexities = data.series("val_perplexity", data.evals)
    val_loss = evals[-1][1] if evals else None
    perplexity = perplexities[-1][1] if perplexities else _exp(val_loss)
    names = last_leg.get("device_names") or []
    return {
        "name": data.facts.get("name") or data.run_dir.name,
        "status": _status(data),
        "step": data.train[-1]["step"] if data.train else None,
        "loss": losses[-1][1] if losses else None,
        "loss_mean": statistics.fmean(value for _, value in losses[-MEAN_STEPS:]) if losses else None,
        "val_loss": val_loss,
        "val_perplexity": perplexity,
        "val_step": int(evals[-1][0]) if evals else None,
        "unigram_entropy_nats": number(data.facts.get("unigram_entropy_nats")),
        "tokens": max((value for _, value in data.series("tokens")), default=None),
        "tokens_per_second": _median(data, "tokens_per_second"),
        "step_seconds": _median(data, "step_seconds"),
        "mfu": _median(data, "mfu"),
        "peak_memory_bytes": max((value for _, value in data.series("memory_bytes")), default=None),
        "seconds": _seconds(data),
        "goodput": data.book.fraction,
        "target": last_leg.get("target"),
        "devices": last_leg.get("devices"),
        "hosts": last_leg.get("hosts"),
        "device": str(names[0]) if names else None,
        "legs": max(len(data.legs), 1),
        "skipped_lines": data.skipped,
        "non_finite_losses": data.non_finite,
        "diverged": _diverged(data),
        "loss_step": int(losses[-1][0]) if losses else None,
    }


def _status(data: RunData) -> str:
    """Return what `run.json` says; `diverged` of an older run that ended with numbers that are not finite."""
    status = str(data.facts.get("status") or "unknown")
    ended_so = bool(data.train) and number(data.train[-1].get("loss")) is None and not data.train[-1].get("skipped")
    return "diverged" if status == "finished" and ended_so else status


def _diverged(data: RunData) -> Mapping[str, Any]:
    """Return what the last leg says of how it diverged; empty where it did not."""
    said = data.legs[-1].get("diverged") if data.legs else None
    if isinstance(said, Mapping) and number(said.get("step")) is not None:
        return said
    bad = [row["step"] for row in data.train if number(row.get("loss")) is None]
    return {"step": bad[0]} if _status(data) == "diverged" and bad else {}


def number(value: Any) -> float | None:
    """Return a finite number, or None for anything else.

    Args:
        value: of JSON.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def leg_of(row: Mapping[str, Any]) -> int:
    """Return the leg that wrote a row; 0 where it does not say.

    Args:
        row: of `metrics.jsonl`.
    """
    return int(number(row.get("leg")) or 0)


def read_lines(path: Path) -> tuple[list[Row], int]:
    """Return the JSON objects of a `.jsonl` file, and how many lines are none.

    Args:
        path: of the file.
    """
    rows: list[Row] = []
    bad = 0
    for line in _read_text(path).split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    return rows, bad


def downsample(points: Sequence[Point], limit: int = 2000) -> list[Point]:
    """Return at most `limit` points, in order: of each stretch its lowest and its highest, so that spikes stay.

    Args:
        points: (x, y), by rising x.
        limit: number of points to keep at most.
    """
    if len(points) <= limit:
        return list(points)
    stretches = (limit - 2) // 2
    inner = points[1:-1]
    kept = [points[0]]
    for index in range(stretches):
        stretch = inner[index * len(inner) // stretches : (index + 1) * len(inner) // stretches]
        low, high = min(stretch, key=_y), max(stretch, key=_y)
        kept += sorted({low, high})
    return [*kept, points[-1]]


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Return the mean over `window` points around each point, fewer near the ends, as many on either side.

    Args:
        points: (x, y), by rising x.
        window: number of points.
    """
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    result = []
    for index, (x, _) in enumerate(points):
        reach = min(window // 2, index, len(points) - 1 - index)
        result.append((x, (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)))
    return result


def _y(point: Point) -> float:
    return point[1]


def _leg_starts(facts: Mapping[str, Any], rows: Iterable[Row]) -> dict[int, float]:
    """Return the step that each leg started after: as `run.json` says, else from its first training row."""
    starts: dict[int, float] = {}
    for row in rows:
        if "loss" in row:
            leg = leg_of(row)
            starts[leg] = min(starts.get(leg, math.inf), row["step"] - 1)
    legs = facts.get("legs")
    for index, leg in enumerate(legs if isinstance(legs, list) else []):
        start = number(leg.get("start_step")) if isinstance(leg, Mapping) else None
        if start is not None:
            starts[int(number(leg.get("leg")) or index)] = start
    return starts


def _in_effect(rows: Sequence[Row], written: Iterable[Row]) -> list[Row]:
    """Return those of `rows` that no rewind has undone; `written` says when the run was taken back, and where to."""
    rewinds = [(row["step"], number(row.get("time")) or 0.0) for row in written if _REWOUND in row]

    def undone(row: Row) -> bool:
        step, time = number(row.get("step")) or 0.0, number(row.get("time")) or 0.0
        return any(step > to and time < at for to, at in rewinds)

    return [row for row in rows if not undone(row)] if rewinds else list(rows)


def _current(rows: Iterable[Row], starts: Mapping[int, float]) -> list[Row]:
    """Return the rows that count: a leg replaces the steps of earlier legs after its start, a later row its like."""

    def taken_back(row: Row) -> bool:
        leg = leg_of(row)
        return any(row["step"] > start for other, start in starts.items() if other > leg)

    by_step = {row["step"]: row for row in sorted(rows, key=leg_of) if not taken_back(row)}
    return [by_step[step] for step in sorted(by_step)]


def _median(data: RunData, key: str) -> float | None:
    values = [value for _, value in data.series(key, data.leg_rows())]
    return statistics.median(values) if values else None


def _seconds(data: RunData) -> float | None:
    """Time spent in the legs; a leg that was cut off ends with its last row."""
    times = [value for row in (*data.train, *data.evals) if (value := number(row.get("time"))) is not None]
    spans: list[float] = []
    for index, leg in enumerate(data.legs):
        started = number(leg.get("started"))
        own = [row for row in data.train if leg_of(row) == int(number(leg.get("leg")) or index)]
        ended = number(leg.get("ended")) or max((number(row.get("time")) or 0.0 for row in own), default=None)
        if started is not None and ended:
            spans.append(max(0.0, ended - started))
    if spans:
        return sum(spans)
    return max(times) - min(times) if len(times) > 1 else None


def _exp(value: float | None) -> float | None:
    return math.exp(value) if value is not None and value < 700 else None


def _read_text(path: Path) -> str:
    try:
        # A pipe or a device in its place may have no end.
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError:
        return ""


def _read_list(path: Path) -> list[Row]:
    """Return the mappings of a JSON list; none where the file is missing or cut."""
    try:
        value = json.loads(_read_text(path))
    except ValueError:
        return []
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
