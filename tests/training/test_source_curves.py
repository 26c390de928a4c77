"""Sources and validation sets have curves of their own, the same on every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.report.run_data import read_run_data
from orchestrator.report.run_report import render
from tests.lab.runs import TINY, small_config, train, write_corpus

BOTH = (*TINY, "train.max_steps=6", "train.eval_every=3", "train.eval_tokens=256", "checkpoint.handover.enabled=false")


def sources(tmp_path: Path) -> str:
    code = write_corpus(tmp_path / "code")
    (tmp_path / "words").mkdir(exist_ok=True)
    for number in range(30):
        (tmp_path / "words" / f"{number}.txt").write_text(f"the word {number} is not the word {number + 1}. " * 20)
    words = f"{{path: '{tmp_path}/words/*.txt', weight: 1, name: words}}"
    return f"data.sources=[{{path: '{code}', weight: 3}}, {words}]"


def test_each_source_has_figures_of_its_own(tmp_path: Path) -> None:
    given = (sources(tmp_path), "data.validation_fraction=0.2")
    rows = train(small_config(tmp_path, *BOTH, *given), 1, tmp_path / "one")
    row = next(row for row in rows if "val_loss" in row)
    assert row["step"] == 3
    counts = {"code": 6, "words": 2}
    mean = sum(row[f"val_loss/{name}"] * count for name, count in counts.items()) / 8
    assert row["val_loss"] == pytest.approx(mean, rel=2e-2), "but for targets at the ends of documents"
    last = [row for row in rows if "loss" in row][-1]
    assert last["tokens/code"] + last["tokens/words"] == last["tokens"] == 6 * 128
    assert last["tokens/code"] == 3 * last["tokens/words"]
    facts = json.loads((tmp_path / "one" / "run.json").read_text())
    assert [one["name"] for one in facts["legs"][0]["sources"]] == ["code", "words"]
    assert facts["legs"][0]["sources"][0]["epochs"] == last["epochs/code"]
    page = render(read_run_data(tmp_path / "one"))
    assert "Validation loss by set" in page
    assert "<h2>Sources</h2>" in page


@pytest.mark.parametrize("layout", [("layout.fsdp=2",), ("layout.tensor=2",), ("layout.pipeline=2", "model.layers=2")])
def test_every_layout_says_the_same_of_sets_by_name(tmp_path: Path, layout: tuple[str, ...]) -> None:
    code = write_corpus(tmp_path / "code")
    sets = f"data.validation={{a: '{code}', b: '{tmp_path}/corpus/0*.txt'}}"
    shape = [word for word in layout if word.startswith("model.")]
    one = train(small_config(tmp_path, *BOTH, sets, *shape), 1, tmp_path / "one")
    two = train(small_config(tmp_path, *BOTH, sets, *layout), 2, tmp_path / "two")
    keys = ("val_loss", "val_loss/a", "val_loss/b")
    evaluated = [[[row[key] for key in keys] for row in rows if "val_loss" in row] for rows in (one, two)]
    assert len(evaluated[0]) == 2
    for ours, theirs in zip(*evaluated, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert ours[1] != ours[2]
