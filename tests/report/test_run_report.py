"""The report on made-up runs: whole ones, cut ones, hostile ones, and hardly any at all."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from orchestrator.report.run_data import downsample, read_run_data, smooth
from orchestrator.report.run_report import summarise, write_report
from orchestrator.report.svg import Chart, Series, format_number, ticks_between

HOSTILE = "</pre></script><script>alert(1)</script>\"'&"


def row(step: int, leg: int = 0, **other: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 8.0 / step,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens": step * 100,
        "tokens_per_second": 1000.0 * (leg + 1),
        "step_seconds": 0.1,
        "mfu": 0.4,
        "memory_bytes": 2**30,
        "time": 1000.0 + step,
        "leg": leg,
    } | other


def evaluation(step: int, value: float, leg: int = 0) -> dict[str, Any]:
    return {"step": step, "val_loss": value, "val_perplexity": math.exp(value), "time": 1000.0 + step, "leg": leg}


def leg(number: int, start: int, end: int | None, **other: Any) -> dict[str, Any]:
    return {
        "leg": number,
        "started": 1000.0 + start,
        "ended": None if end is None else 1000.0 + end,
        "start_step": start,
        "end_step": end,
        "target": "cpu",
        "device_names": ["Some CPU"],
        "devices": 2,
        "hosts": 1,
        "layout": {"fsdp": 2, "tensor": 1},
        "precision": "fp32",
        "software": {"torch": "2.13.0"},
        "resumed_from": None,
    } | other


def write(folder: Path, rows: list[Any], facts: dict[str, Any] | None = None, samples: list[Any] | None = None) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (folder / "config.yaml").write_text("name: test\ntrain:\n  max_steps: 10\n")
    if facts is not None:
        (folder / "run.json").write_text(json.dumps(facts))
    if samples is not None:
        (folder / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in samples))
    return folder


class _Structure(HTMLParser):
    """Checks that tags close in order, and collects what could reach out of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts = 0
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(folder: Path) -> str:
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    structure = _Structure()
    structure.feed(text)
    assert structure.open == []
    assert structure.addresses == ["data:,"], "the page reaches for nothing outside"
    assert structure.scripts == text.count('<script type="application/json">') + 1
    assert "NaN" not in text
    return text


FACTS = {
    "name": "tiny",
    "status": "finished",
    "parameters": 1_443_072,
    "vocab_size": 4096,
    "flops_per_token": 1e7,
    "peak_flops_per_device": 9.1e10,
    "peak_source": "measured",
    "unigram_entropy_nats": 6.4,
    "data": {"name": "builtin", "inputs": ["a", "b"]},
    "legs": [leg(0, 0, 10)],
}


def test_whole_run(tmp_path: Path):
    rows = [row(step) for step in range(1, 11)] + [evaluation(10, 2.5)]
    text = page(write(tmp_path, rows, FACTS, [{"step": 10, "prompt": "def ", "text": "def main():"}]))
    for words in (
        "tiny",
        "finished",
        "0.8000",
        "2.5000",
        "perplexity 12.18",
        "40.0%",
        "unigram entropy",
        "2 × Some CPU",
    ):
        assert words in text, words
    for words in ("1.443M parameters", "91 GFLOP/s", "fsdp 2", "max_steps: 10", "<b>def </b>main():", "2.13.0"):
        assert words in text, words
    assert "could not be read" not in text


def test_summary(tmp_path: Path):
    rows = [row(step) for step in range(1, 11)] + [evaluation(5, 3.0), evaluation(10, 2.5)]
    summary = summarise(write(tmp_path, rows, FACTS))
    assert summary["loss"] == pytest.approx(0.8)
    assert summary["val_loss"] == 2.5
    assert summary["val_step"] == 10
    assert summary["tokens"] == 1000
    assert summary["tokens_per_second"] == 1000
    assert summary["mfu"] == pytest.approx(0.4)
    assert summary["seconds"] == 10
    assert (summary["name"], summary["status"], summary["step"]) == ("tiny", "finished", 10)
    assert json.dumps(summary)


def test_everything_is_escaped(tmp_path: Path):
    hostile_leg = leg(0, 0, 1, target=HOSTILE, device_names=[HOSTILE], software={HOSTILE: HOSTILE}, layout={HOSTILE: 2})
    second = leg(1, 1, 2, target=HOSTILE)
    facts = {
        **FACTS,
        "name": HOSTILE,
        "status": HOSTILE,
        "peak_source": HOSTILE,
        "legs": [hostile_leg, second],
        "data": {HOSTILE: 1},
    }
    samples = [{"step": HOSTILE, "prompt": HOSTILE, "text": HOSTILE + HOSTILE}]
    folder = write(tmp_path, [row(1), row(2, leg=1)], facts, samples)
    (folder / "config.yaml").write_text(HOSTILE)
    assert "<script>alert" not in page(folder)


def test_unknown_stays_unknown(tmp_path: Path):
    rows = [row(step, mfu=None, memory_bytes=None) for step in (1, 2)]
    facts = {"name": "x", "status": "finished", "legs": [leg(0, 0, 2)], "peak_flops_per_device": None}
    folder = write(tmp_path, rows, facts)
    text = page(folder)
    assert re.search(r"<dt>MFU</dt><dd class=\"unknown\">unknown", text)
    assert re.search(r"<dt>Validation loss</dt><dd class=\"unknown\">unknown", text)
    assert "Memory in use" not in text
    assert summarise(folder)["mfu"] is None


def test_cut_and_foreign_lines_are_counted(tmp_path: Path):
    folder = write(tmp_path, [row(1), row(2)], FACTS)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'[1]\n\xff\xfe\n{"loss": 1}\n\n{"step": 3, "lo')
    (folder / "run.json").write_text('{"name": "cut')
    assert "4 line(s)" in page(folder)
    assert summarise(folder)["skipped_lines"] == 4
    assert summarise(folder)["name"] == folder.name


def test_losses_that_are_no_numbers(tmp_path: Path):
    folder = write(tmp_path, [row(1), row(2, loss=math.nan), row(3, loss=math.inf)], FACTS)
    assert "2 step(s)" in page(folder)
    assert summarise(folder)["loss"] == 8.0
    assert summarise(folder)["step"] == 3


@pytest.mark.parametrize("rows", [[], [row(1)], [evaluation(1, 2.0)], [row(1), row(1)]])
def test_hardly_any_rows(tmp_path: Path, rows: list[Any]):
    page(write(tmp_path, rows))


def test_an_empty_folder(tmp_path: Path):
    text = page(tmp_path)
    assert "nothing was recorded yet" in text
    assert summarise(tmp_path)["seconds"] is None


@pytest.mark.parametrize("facts", [{"legs": 3}, {"legs": [3, None]}, {"legs": [{}]}, {"parameters": "many", "data": 3}])
def test_facts_of_another_shape(tmp_path: Path, facts: dict[str, Any]):
    page(write(tmp_path, [row(1), row(2)], facts))


def test_a_later_leg_takes_back_the_steps_after_its_start(tmp_path: Path):
    rows = [row(step) for step in range(1, 9)] + [evaluation(8, 9.0)] + [row(step, leg=1) for step in (5, 6)]
    facts = {**FACTS, "legs": [leg(0, 0, 8), leg(1, 4, None, target="cuda")]}
    folder = write(tmp_path, rows, facts)
    data = read_run_data(folder)
    assert [(each["step"], each["leg"]) for each in data.train] == [(1, 0), (2, 0), (3, 0), (4, 0), (5, 1), (6, 1)]
    assert data.evals == []
    assert summarise(folder)["tokens_per_second"] == 2000
    assert summarise(folder)["seconds"] == 8 + 2
    text = page(folder)
    assert "leg 1: cuda" in text
    assert "2 legs" in text


def test_legs_without_run_json(tmp_path: Path):
    folder = write(tmp_path, [row(1), row(2), row(3), row(2, leg=1), row(4)])
    assert [(each["step"], each["leg"]) for each in read_run_data(folder).train] == [(1, 0), (2, 1)]


def test_long_runs_make_small_pages(tmp_path: Path):
    rows = [row(step) for step in range(1, 20_001)]
    rows[12_345]["grad_norm"] = 777.0
    text = page(write(tmp_path, rows, FACTS))
    assert len(text) < 1_000_000
    assert "777" in text


def test_downsampling_keeps_ends_and_extremes():
    points = [(float(x), math.sin(x / 500)) for x in range(30_000)]
    points[17_001], points[9_999] = (17_001.0, 50.0), (9_999.0, -50.0)
    kept = downsample(points, 2000)
    assert len(kept) <= 2000
    assert kept == sorted(kept)
    assert {points[0], points[-1], points[17_001], points[9_999]} <= set(kept)
    assert downsample(points[:2000], 2000) == points[:2000]


def test_smoothing_is_centred_and_keeps_lines():
    line = [(float(x), 2.0 * x) for x in range(50)]
    assert [y for _, y in smooth(line, 10)] == pytest.approx([y for _, y in line])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (3e-4, "3e-4"),
        (0.00125, "0.00125"),
        (12.5, "12.5"),
        (1234.5, "1,234"),
        (34_000, "34k"),
        (2.4576e6, "2.458M"),
    ],
)
def test_numbers_are_readable(value: float, text: str):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 3e-4), (2.9, 8.3), (0, 16_300), (-3, 5), (1e-9, 3e-9), (5e12, 5.1e12)]
)
def test_ticks_are_round_distinct_and_inside(low: float, high: float):
    ticks, texts = ticks_between(low, high, 5)
    assert 3 <= len(ticks) <= 9
    assert len(set(texts)) == len(texts)
    assert all(low - 1e-9 * abs(low) <= tick <= high + 1e-9 * abs(high) for tick in ticks)


def test_a_chart_says_in_words_what_it_shows():
    chart = Chart("loss", "Loss", [Series("training", [(1.0, 8.0), (10.0, 3.0)], "train")])
    assert 'aria-label="Loss: training from 8 at step 1 to 3 at step 10"' in chart.render()
    assert "No data" in Chart("loss", "Loss", [Series("training", [], "train")]).render()


def _check(verdict: str = "agrees", **other: Any) -> dict[str, Any]:
    one = {"saved": 2.0, "measured": 2.0, "difference": 2e-7, "tolerance": 1e-5, "agrees": True}
    side = {"target": "cpu", "layout": {"fsdp": 1}, "precision": "fp32", "software": {"torch": "2.13.0"}}
    quantities = {"loss": one, "grad_norm": one, "logits": one, "tensors": {**one, "difference": 0.0}}
    entry = {"step": 5, "leg": 1, "verdict": verdict, "changed": ["backend"], "went_on": verdict != "differs"}
    return {**entry, **quantities, "from": side, "to": {**side, "target": "tpu"}} | other


def test_a_leg_shows_its_hardware_and_its_handover(tmp_path: Path):
    legs = [leg(0, 0, 5), leg(1, 5, 10, target="tpu", handover=_check()), leg(2, 10, 12, target="tpu")]
    rows = [row(step, (step > 5) + (step > 10)) for step in range(1, 13)]
    folder = write(tmp_path, rows, FACTS | {"legs": legs})
    (folder / "handover.json").write_text(json.dumps([_check(), _check("differs", step=10)]))
    text = page(folder)
    for words in ("leg 1: tpu", "torch 2.13.0", "<h2>Handovers</h2>", "2e-7 of 1e-5", "differs, stopped", "backend"):
        assert words in text
    assert "leg 2" not in text, "nothing changed there"
    assert text.count('class="mark"') >= 2


def test_checks_that_are_no_checks(tmp_path: Path):
    entries = [{}, {"loss": 1, "from": [], "changed": {}}, _check(HOSTILE, changed=[HOSTILE], step=HOSTILE), 7]
    folder = write(tmp_path, [row(1)], FACTS | {"legs": [leg(0, 0, 1, handover=HOSTILE, software=HOSTILE)]})
    (folder / "handover.json").write_text(json.dumps(entries))
    assert "alert(1)</script>" not in page(folder)
    (folder / "handover.json").write_text("[{")
    assert "<h2>Handovers</h2>" not in page(folder)


def test_routers_of_a_mixture_have_curves_and_active_parameters_a_row(tmp_path: Path) -> None:
    figures = {"router_loss": 0.01, "expert_load_max": 1.5, "router_entropy": 2.0, "dropped": 0.0}
    facts = {"parameters": 3_000_000, "active_parameters": 1_000_000}
    write(tmp_path, [row(step, **figures) for step in (1, 2)], facts)
    mixed = write_report(tmp_path).read_text()
    write(tmp_path, [row(1)], {"parameters": 3, "active_parameters": 3})
    dense = write_report(tmp_path).read_text()
    for words in ("Largest expert load", "Router entropy", "Active for a token", "(1M active)"):
        assert words in mixed, words
        assert words not in dense, words
