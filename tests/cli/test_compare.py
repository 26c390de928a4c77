"""`compare`: runs side by side on made-up runs."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from orchestrator.cli import main
from tests.report.test_run_report import HOSTILE, evaluation, leg, row, write


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs below runs/, the second the newer, which diverged; in the folder that they are in."""
    monkeypatch.chdir(tmp_path)
    for number, (name, lr) in enumerate([("tiny", "0.001"), (f"wide<{number_of(HOSTILE)}", "0.0003")]):
        folder = tmp_path / "runs" / name / "20260101-000000"
        folder.mkdir(parents=True)
        facts = {"name": name, "status": ["finished", "diverged"][number], "legs": [leg(0, 0, 3)]}
        write(folder, [row(1), row(2, loss=3.0 - number), row(3), evaluation(2, 3.5), evaluation(3, 4.5)], facts)
        (folder / "config.yaml").write_text(f"name: run\noptim: {{lr: {lr}, betas: [0.9, 0.95]}}\nresume: {number}\n")
    return tmp_path


def number_of(text: str) -> str:
    return text.replace("/", "|")


def test_the_tables_and_the_page(runs, capsys):
    assert main(["compare", "tiny", "latest"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:4] == ["run", "status", "steps", "loss"]
    assert out[1].split()[:7] == ["tiny/20260101-000000", "finished", "3", "2.6667", "2.6667", "4.5000", "3.5000"]
    assert "diverged" in out[2]
    assert "2.0000" in out[2]
    changed = out[out.index("") + 1 :]
    assert changed[1].split() == ["optim.lr", "0.001", "0.0003"]
    assert changed[2] == ""
    assert changed[3] == "page       compare.html"
    page = (runs / "compare.html").read_text()
    assert page.count("<script>alert") == 0
    assert page.count('<path class="curve run0"') == page.count('<path class="curve run1"') == 3
    assert "http" not in page.replace("http-equiv", "")
    parser = HTMLParser()
    parser.feed(page)
    parser.close()


def test_nothing_is_overwritten(runs, capsys):
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    (runs / "compare.html").write_text("mine")
    assert main(["compare", "tiny", "latest"]) == 0
    assert "page       compare-2.html" in capsys.readouterr().out
    assert (runs / "compare.html").read_text() == "mine"
    assert main(["compare", "tiny", "latest", "html=compare.html"]) == 2
    assert "there is a file of that name" in capsys.readouterr().err
    assert (runs / "compare.html").read_text() == "mine"
    assert {path: path.read_bytes() for path in before} == before


def test_json_and_a_run_named_by_its_directory(runs, capsys):
    assert main(["compare", str(runs / "runs/tiny/20260101-000000"), "tiny", "html=none", "json=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["best_val_loss"] for run in found["runs"]] == [3.5, 3.5]
    assert len({run["run"] for run in found["runs"]}) == 2
    assert found["differences"] == {}
    assert found["page"] is None
    assert not list(runs.glob("*.html"))


@pytest.mark.parametrize(
    ("words", "said"),
    [([], "two runs or more"), (["tiny"], "two runs or more"), (["tiny", "tinny"], "there is no such run")],
)
def test_what_is_wrong_is_said(runs, words, said, capsys):
    assert main(["compare", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_run_without_anything_is_compared_too(runs, capsys):
    folder = runs / "runs/new/20270101-000000"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("- no mapping")
    assert main(["compare", "tiny", "new"]) == 0
    assert "unknown" in capsys.readouterr().out
