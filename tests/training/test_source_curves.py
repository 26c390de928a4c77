"""Sources and validation sets have curves of their own, the same on every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.report.run_data import read_run_data
from orchestrator.report.run_report import render
from tests.lab.runs import TINY, small_config, train, write_corpus
from tests.lab.slow import cases

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


def of_sources(rows: list[dict]) -> list[tuple]:
    return [tuple(row.get(f"loss/{name}") for name in ("code", "words")) for row in rows if "loss" in row]


LAYOUTS = {
    "fsdp": ("layout.fsdp=2",),
    "tensor": ("layout.tensor=2",),
    "context": ("layout.context=2",),
    "ring": ("layout.context=2", "layout.context_kind=ring"),
    "pipeline": ("layout.pipeline=2", "model.layers=2"),
}


@pytest.mark.parametrize("layout", cases(LAYOUTS, quick=["context"]))
def test_each_source_has_a_loss_of_training_on_every_layout(tmp_path: Path, layout: str) -> None:
    words = (*BOTH, sources(tmp_path), "train.eval_every=null", "train.micro_batch_size=1", "train.z_loss=1e-3")
    shape = [word for word in LAYOUTS[layout] if word.startswith("model.")]
    one = train(small_config(tmp_path, *words, *shape), 1, tmp_path / "one")
    two = train(small_config(tmp_path, *words, *LAYOUTS[layout]), 2, tmp_path / "two")
    found = of_sources(one)
    for row, (code, word) in zip((row for row in one if "loss" in row), found, strict=True):
        assert row["loss"] == pytest.approx((3 * code + word) / 4, rel=2e-2), "3 sequences of 4"
    for ours, theirs in zip(of_sources(two), found, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_step_without_a_sequence_of_a_source_has_no_loss_of_it(tmp_path: Path) -> None:
    words = (*BOTH, sources(tmp_path), "train.eval_every=null", "train.global_batch_tokens=64", "train.max_steps=4")
    rows = [row for row in train(small_config(tmp_path, *words), 1, tmp_path / "one") if "loss" in row]
    assert sum("loss/words" in row for row in rows) == 2
    assert all("nonfinite" not in row for row in rows)
    alone = next(row for row in rows if "loss/words" not in row)
    assert alone["loss/code"] == pytest.approx(alone["loss"], rel=1e-6)


@pytest.mark.parametrize("name", cases(["fsdp", "tensor", "pipeline"], quick=["fsdp"]))
def test_every_layout_says_the_same_of_sets_by_name(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
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
