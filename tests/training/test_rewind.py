"""A run that is taken back goes on with other data, and is to the bit a run that was told to leave that data out."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from orchestrator.config.batch_sizes import BatchSizes
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.data.skipping import behind, covered, kept, merged
from orchestrator.data.stream import Position
from orchestrator.errors import DIVERGED
from orchestrator.launch.rewinding import _skipped
from orchestrator.report.run_data import read_run_data
from tests.lab.poison import poisoned
from tests.lab.ranks import run_ranks
from tests.lab.runs import checkpoint, resolved_run, small_config, train
from tests.lab.slow import cases
from tests.lab.tensors import read_all
from tests.training.test_source_curves import sources

LAYOUTS = {
    "1": (1, []),
    "fsdp2_tensor2": (4, ["layout.fsdp=2", "layout.tensor=2"]),
    "pipeline2": (2, ["layout.pipeline=2"]),
    "replicate2": (2, ["layout.replicate=2", "layout.fsdp=1"]),
}
WORDS = ["train.on_nonfinite=rewind", "checkpoint.every_steps=3", "train.max_steps=9", "model.dropout=0.1"]
WORDS += ["model.dim=32", "train.seq_len=32", "train.global_batch_tokens=256", "train.eval_tokens=128"]
WORDS += ["train.z_loss=1e-3"]  # that of the bad step must not reach the next one
BATCH = 8  # sequences


def test_ranges_that_are_left_out_are_merged_and_passed_over():
    ranges = merged([(10, 12), (4, 6), (6, 8), (5, 7), (3, 3)])
    assert ranges == ((4, 8), (10, 12))
    assert kept(ranges, 0, 10) == [0, 1, 2, 3, 8, 9, 12, 13, 14, 15]
    assert kept(ranges, 5, 3) == [8, 9, 12]
    assert kept((), 2, 3) == [2, 3, 4]
    for start in range(14):
        for count in range(9):
            numbers = kept(ranges, start, count + 1)
            assert behind(ranges, start, count) == numbers[count]
    assert covered(ranges, 5, 8)
    assert not covered(ranges, 5, 9)


def test_the_least_batches_that_are_left_out_are_those_of_their_steps():
    train = SimpleNamespace(rewind_skip_steps=3)
    loader = SimpleNamespace(skipped=(), sizes=BatchSizes(((2, 1), (4, 2)), 8), stream=SimpleNamespace(fingerprint="a"))
    job = SimpleNamespace(loader=loader, resolved=SimpleNamespace(config=SimpleNamespace(train=train)))
    # Of steps 2, 3 and 4: 2 + 2 + 8 sequences from number 2 on.
    assert _skipped(job, None, Position(2, 2), 4) == (((2, 14),), 14)


def _work(config, size, run_dir, poison):
    """Exit codes of the ranks. `poison`: arguments of `poisoned` behind the phase, by rank; None: none."""
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_ranks(size, _rank, to_dict(config), run_dir, poison)


def _rank(world, data, run_dir, poison):
    from orchestrator.launch.run import work

    with ExitStack() as faults:
        for steps, rank, first in poison:
            faults.enter_context(poisoned(steps, 1, "forward", rank in (None, world.rank), first))
        return work(resolved_run(from_dict(RunConfig, data), world, run_dir), world)


def _same_tensors(ours: Path, theirs: Path) -> None:
    mine, other = read_all(ours), read_all(theirs)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def _rewinds(run_dir: Path) -> list[dict]:
    return [one for leg in json.loads((run_dir / "run.json").read_text())["legs"] for one in leg.get("rewinds", [])]


@pytest.mark.parametrize("layout", cases(list(LAYOUTS), quick=["fsdp2_tensor2"]))
def test_a_rewound_run_is_one_that_left_the_data_out_and_resumes_on_other_layouts(tmp_path, layout, capfd):
    """Bad data in the fifth step; step 3 was saved."""
    size, degrees = LAYOUTS[layout]
    config, run_dir = small_config(tmp_path, *degrees, *WORDS, "train.max_steps=7"), tmp_path / "run"
    assert _work(config, size, run_dir, [([5], size - 1, 4 * BATCH)]) == [0] * size
    (rewind,) = _rewinds(run_dir)
    assert (rewind["step"], rewind["to"], rewind["skipped"]) == (5, 3, [3 * BATCH, 5 * BATCH])
    assert Path(rewind["checkpoint"]) == checkpoint(run_dir, 3)
    assert rewind["diagnosis"]["layer"] == "layers.1"
    assert "back to step 3" in capfd.readouterr().out
    state = json.loads((checkpoint(run_dir, 7) / "state.json").read_text())
    assert state["data"]["skipped"] == [[3 * BATCH, 5 * BATCH]]
    assert state["data"]["next_sequence"] == 9 * BATCH

    told = small_config(tmp_path, *degrees, *WORDS, "train.max_steps=7", f"data.skip=[[{3 * BATCH},{5 * BATCH}]]")
    other = tmp_path / "told"
    assert _work(told, size, other, []) == [0] * size
    _same_tensors(checkpoint(run_dir, 7), checkpoint(other, 7))
    rows = [(row["step"], row["loss"]) for row in read_run_data(run_dir).train]
    assert rows == [(row["step"], row["loss"]) for row in read_run_data(other).train]

    longer = small_config(tmp_path, *WORDS, "resume_allow=[schedule]", f"resume={run_dir}")
    ours = train(longer, 1, run_dir, checkpoint(run_dir, 7))
    theirs = train(longer, 1, other, checkpoint(other, 7))
    _same_tensors(checkpoint(run_dir, 9), checkpoint(other, 9))
    assert [row["loss"] for row in ours if row["step"] > 7 and "loss" in row] == [
        row["loss"] for row in theirs if row["step"] > 7 and "loss" in row
    ]


def test_before_the_first_checkpoint_it_begins_anew_and_twice_is_twice(tmp_path):
    """With figures of experts and of sources, which a bad step leaves nothing in either."""
    words = [*WORDS, "model=tiny_moe", "model.vocab_size=auto", "model.layers=2", sources(tmp_path)]
    config, run_dir = small_config(tmp_path, *words), tmp_path / "run"
    # The second is met behind the checkpoint of step 6, which was written after the first.
    assert _work(config, 1, run_dir, [([2], None, BATCH), ([8], None, 9 * BATCH)]) == [0]
    first, second = _rewinds(run_dir)
    assert (first["to"], first["checkpoint"], first["skipped"]) == (0, None, [0, 2 * BATCH])
    assert (second["step"], second["to"], second["skipped"]) == (8, 6, [8 * BATCH, 10 * BATCH])
    told = small_config(tmp_path, *words, f"data.skip=[[0,{2 * BATCH}],[{8 * BATCH},{10 * BATCH}]]")
    assert _work(told, 1, tmp_path / "told", []) == [0]
    assert _figures(run_dir) == _figures(tmp_path / "told")
    assert {"loss/code", "loss/words", "router_loss", "z_loss"} <= _figures(run_dir)[-1].keys()
    _same_tensors(checkpoint(run_dir, 9), checkpoint(tmp_path / "told", 9))
    assert (run_dir / "checkpoints" / "step-00000006.2").is_dir() or (
        run_dir / "checkpoints" / "step-00000009"
    ).is_dir()


def _figures(run_dir: Path) -> list[dict]:
    named = ("loss", "grad_norm", "router", "z_loss")
    return [{key: row[key] for key in row if key.startswith(named)} for row in read_run_data(run_dir).train]


def test_snapshots_in_memory_of_what_was_undone_are_gone(tmp_path, capfd):
    """The snapshot of step 4 is newer than the checkpoint of step 3, and no way from it leads around bad data."""
    words = ["checkpoint.memory.enabled=true", "checkpoint.memory.every_steps=1", f"checkpoint.memory.dir={tmp_path}"]
    config, run_dir = small_config(tmp_path, *WORDS, *words, "layout.fsdp=2"), tmp_path / "run"
    assert _work(config, 2, run_dir, [([5], 1, 4 * BATCH)]) == [0, 0]
    (rewind,) = _rewinds(run_dir)
    assert (rewind["to"], rewind["skipped"]) == (3, [3 * BATCH, 5 * BATCH])
    assert json.loads((checkpoint(run_dir, 9) / "state.json").read_text())["data"]["next_sequence"] == 11 * BATCH
    assert "no snapshots" not in "".join(capfd.readouterr())


def test_the_same_place_with_other_data_and_too_many_rewinds_stop_the_run(tmp_path, capfd):
    config, run_dir = small_config(tmp_path, *WORDS), tmp_path / "run"
    assert _work(config, 1, run_dir, [([5], None, None)]) == [DIVERGED]
    assert len(_rewinds(run_dir)) == 1
    said = capfd.readouterr().err
    assert "diverged at step 5" in said
    assert "has not come further with other data: the data is not the cause" in said
    assert read_all(checkpoint(run_dir, 3))

    none = small_config(tmp_path, *WORDS, "train.max_rewinds=0")
    assert _work(none, 1, tmp_path / "none", [([5], None, None)]) == [DIVERGED]
    assert "taken back 0 times already (train.max_rewinds=0)" in capfd.readouterr().err
