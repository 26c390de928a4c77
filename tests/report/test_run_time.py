"""The time of a run in its report and its last lines, on made-up books."""

from __future__ import annotations

import json
import re
from pathlib import Path

from orchestrator.observe.time_spans import BOOK, Book, TimeEntry, make_book
from orchestrator.report.run_report import summarise
from orchestrator.report.run_time import goodput_line, time_section
from tests.report.test_run_report import FACTS, leg, page, row, write

ENTRIES = [
    *(TimeEntry(0, "starting"), TimeEntry(10, "loading", None, 0), TimeEntry(20, "training", 0, 0)),
    *(TimeEntry(80, "saving", 60, 0), TimeEntry(85, "training", 60, 0), TimeEntry(100, "waiting", 75, stepped=99.8)),
    *(TimeEntry(120, "starting"), TimeEntry(130, "training", 60, 1), TimeEntry(160, "stopped", 90)),
    *(TimeEntry(7360, "starting"), TimeEntry(7370, "training", 90, 2), TimeEntry(7400, "stopped", 120)),
]


def test_the_last_line_names_what_the_rest_went_into():
    line = goodput_line(make_book(ENTRIES))
    assert line.startswith("60.0% of 3 min 20 s; ")
    assert line.index("starting 15.0%") < line.index("waiting 10.0%") < line.index("lost 7.5%") < line.index("saving")
    assert "stopped" not in line
    assert goodput_line(Book()) == ""


def test_the_report_draws_the_time_of_a_run(tmp_path: Path):
    write(tmp_path, [row(step) for step in range(1, 5)], FACTS | {"legs": [leg(0, 0, 4)]})
    assert "What the run did" not in page(tmp_path), "no book was kept"
    (tmp_path / BOOK).write_text("".join(json.dumps(entry.to_dict()) + "\n" for entry in ENTRIES))
    text = page(tmp_path)
    assert "Goodput 60.0% of 3 min 20 s" in text
    assert "stopped on purpose for 2 h 00 min more" in text
    for state in ("training", "starting", "loading", "saving", "lost", "waiting"):
        assert f'<rect class="state {state}"' in text, state
    assert '<rect class="state stopped"' not in text
    for number in range(3):
        assert f">leg {number}</text>" in text
    assert summarise(tmp_path)["goodput"] == 0.6


def test_the_bands_columns_fill_it(tmp_path: Path):
    section = time_section(make_book(ENTRIES))
    rects = [
        tuple(float(value) for value in re.findall(r'(?:x|width|height)="([\d.]+)"', place))
        for place in re.findall(r'<rect class="state [a-z]+" ([^>]+)>', section)
        if "x=" in place
    ]
    assert max(x + width for x, width, _ in rects) > 999
    training = sum(width * height for _, width, height in rects)
    assert abs(training - 1000 * 72) / 72_000 < 0.02
