"""An average of the weights beside them: exact, in checkpoints, on every layout, without a trace in the training."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.checkpoint.averaged import averaged
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.reader import Reader
from orchestrator.cli import checkpoint as verb
from orchestrator.config.convert import to_dict
from orchestrator.errors import CheckpointError, ConfigErrors
from tests.lab.poison import poisoned
from tests.lab.ranks import run_ranks
from tests.lab.runs import _work, checkpoint, losses, read_rows, small_config, train
from tests.lab.slow import cases, slow
from tests.lab.tensors import read_all
from tests.strategies.test_conformance import _load_and_save

SHORT = ("train.max_steps=6", "train.eval_every=2", "train.eval_tokens=256", "train.sample.tokens=1")
SHORT += ("checkpoint.every_steps=1", "checkpoint.keep_last=9", "optim.lr=0.01")
EMA = "train.ema.decay=0.75"
LAYOUTS = {
    "one": ([], 1),
    "fsdp2": (["layout.fsdp=2"], 2),
    "tensor2": (["layout.tensor=2"], 2),
    "fsdp2_tensor2": (["layout.fsdp=2", "layout.tensor=2"], 4),
    "pipeline2": (["layout.pipeline=2"], 2),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    """Run directories by layout and further words, each trained once."""
    tmp: Path = tmp_path_factory.mktemp("averages")
    done: dict[tuple[str, ...], Path] = {}

    def run(layout: str, *words: str) -> Path:
        shape, size = LAYOUTS[layout]
        key = (layout, *words)
        if key not in done:
            done[key] = tmp / f"run{len(done)}"
            train(small_config(tmp, *SHORT, *shape, *words), size, done[key])
        return done[key]

    run.tmp = tmp
    return run


def test_it_is_the_average(runs):
    states = [read_all(checkpoint(runs("one", EMA), step)) for step in range(1, 7)]
    names = [name for name in states[0] if name.startswith("model.")]
    for before, after in itertools.pairwise(states):
        for name in names:
            average = name.replace("model.", "optimizer.ema.", 1)
            wanted = torch.lerp(after[name], before[average], 0.75)
            assert torch.equal(after[average], wanted), name
            assert not torch.equal(after[average], after[name])


@pytest.mark.parametrize("layout", cases(["one", "fsdp2", "tensor2", "pipeline2"], quick=["fsdp2"]))
def test_training_does_not_notice_it(runs, layout):
    """Though evaluations put the averages in the place of the weights, and these stay gathered otherwise."""
    plain, averaging = read_rows(runs(layout)), read_rows(runs(layout, EMA))
    assert losses(plain) == losses(averaging)
    evaluated = [[row["val_loss"] for row in rows if "val_loss" in row] for rows in (plain, averaging)]
    assert evaluated[0] == evaluated[1]
    assert all(row["val_loss_ema"] > row["val_loss"] for row in averaging if "val_loss" in row), "it lags behind"


@slow
def test_of_no_memory_it_is_the_weights(runs):
    rows = [row for row in read_rows(runs("fsdp2", "train.ema.decay=0.0")) if "val_loss" in row]
    assert [row["val_loss_ema"] for row in rows] == [row["val_loss"] for row in rows]


@pytest.mark.parametrize("layout", cases(["tensor2", "fsdp2_tensor2", "pipeline2"], quick=["tensor2"]))
def test_it_moves_between_layouts_to_the_bit(runs, layout):
    source = checkpoint(runs("fsdp2", EMA), 4)
    words, size = LAYOUTS[layout]
    config = small_config(runs.tmp, *SHORT, EMA, *words)
    moved = run_ranks(size, _load_and_save, to_dict(config), source, runs.tmp / f"moved-{layout}")
    before, after = read_all(source), read_all(Path(moved[0]["path"]))
    assert before.keys() == after.keys()
    assert "optimizer.ema.embed.weight" in before
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_resumed_run_ends_to_the_bit_as_one_that_was_not_stopped(runs, tmp_path):
    whole = runs("fsdp2", EMA)
    config = small_config(runs.tmp, *SHORT, EMA, *LAYOUTS["fsdp2"][0])
    rows = train(config, 2, tmp_path / "resumed", checkpoint(whole, 3))
    assert losses(rows) == losses(read_rows(whole))[3:]
    before, after = (read_all(checkpoint(run_dir, 6)) for run_dir in (whole, tmp_path / "resumed"))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_it_is_turned_on_and_off_on_the_way(runs, tmp_path):
    on = small_config(runs.tmp, *SHORT, EMA)
    rows = train(on, 1, tmp_path / "on", checkpoint(runs("one"), 4))
    assert losses(rows) == losses(read_rows(runs("one")))[4:]
    states = [read_all(checkpoint(run_dir, step)) for run_dir, step in ((runs("one"), 4), (tmp_path / "on", 5))]
    begun = torch.lerp(states[1]["model.norm.weight"], states[0]["model.norm.weight"], 0.75)
    assert torch.equal(states[1]["optimizer.ema.norm.weight"], begun), "it begins with the weights of then"
    train(small_config(runs.tmp, *SHORT), 1, tmp_path / "off", checkpoint(runs("one", EMA), 4))
    left = read_all(checkpoint(tmp_path / "off", 6))
    assert left.keys() == read_all(checkpoint(runs("one"), 6)).keys()


def test_it_is_read_and_exported_in_place_of_the_weights(runs, tmp_path, capsys):
    found = Checkpoint(checkpoint(runs("fsdp2", EMA), 6))
    stored, view = Reader(found), Reader(averaged(found))
    for name in (name for name in found.manifest.tensors if name.startswith("model.")):
        average = name.replace("model.", "optimizer.ema.", 1)
        assert torch.equal(view.tensor(name), stored.tensor(average))
        assert torch.equal(view.tensor(average), stored.tensor(name))
    where = str(found.directory)
    assert verb.main(["export", f"path={where}", f"output={tmp_path / 'out'}", "weights=ema", "progress=false"]) == 0
    assert "averaged weights" in capsys.readouterr().out
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(exported["model.embed_tokens.weight"], stored.tensor("optimizer.ema.embed.weight"))
    with pytest.raises(CheckpointError, match=r"keeps no average[\s\S]*train\.ema\.decay"):
        averaged(Checkpoint(checkpoint(runs("one"), 6)))


def _skip_third(world, data, run_dir):
    with poisoned([3], 0, "backward"):
        return _work(world, data, run_dir, None)


def test_a_step_that_is_left_out_leaves_it_as_it_is(runs, tmp_path):
    config = small_config(runs.tmp, *SHORT, EMA, "train.on_nonfinite=skip")
    (tmp_path / "skipped").mkdir()
    run_ranks(1, _skip_third, to_dict(config), tmp_path / "skipped")
    assert next(row["step"] for row in read_rows(tmp_path / "skipped") if row.get("skipped")) == 3
    before, after = (read_all(checkpoint(tmp_path / "skipped", step)) for step in (2, 3))
    for name in (name for name in before if name.startswith(("model.", "optimizer.ema."))):
        assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize(
    ("word", "said"),
    [("optim._target_=torch.optim.RAdam", "begins itself"), ("train.lora.rank=4", "adapters are not averaged")],
)
def test_what_it_cannot_be_with_is_refused(tmp_path, word, said):
    with pytest.raises(ConfigErrors, match=said):
        small_config(tmp_path, EMA, word)
