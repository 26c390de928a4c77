"""Whether tensors are finite: found in all dtypes, refused when written, named when read."""

from __future__ import annotations

import pytest
import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.deep_check import element_count, nonfinite_tensors
from orchestrator.checkpoint.diff import compare
from orchestrator.checkpoint.finite import finite_flags
from orchestrator.checkpoint.run_checkpoints import committed
from orchestrator.cli import main
from orchestrator.errors import NonFiniteError
from orchestrator.sharding.layout import Layout
from tests.lab.checkpoints import forge, shards_of, small_model, write, write_whole

NAN, INF = float("nan"), float("inf")
BAD = [[NAN], [INF], [-INF], [INF, -INF], [1.0, NAN, INF]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_one_element_is_found_among_many(dtype):
    good = torch.randn(1000, dtype=dtype)
    spoilt = [good.index_put((torch.tensor([500]),), torch.tensor(value, dtype=dtype)) for value in (NAN, INF, -INF)]
    assert finite_flags([good, *spoilt, good]) == [True, False, False, False, True]
    assert finite_flags([torch.tensor(values, dtype=dtype) for values in BAD]) == [False] * len(BAD)


def test_a_sum_that_overflows_is_no_infinity():
    largest = torch.finfo(torch.float32).max
    assert finite_flags([torch.full((10,), largest), torch.full((10,), -1e38, dtype=torch.bfloat16)]) == [True, True]
    assert finite_flags([torch.tensor([7]), torch.zeros(0), torch.zeros(0, 3, dtype=torch.bfloat16)]) == [True] * 3
    assert finite_flags([]) == []


@pytest.mark.parametrize("name", ["model.a", "optimizer.exp_avg.a"])
def test_no_save_holds_what_is_not_finite_and_all_ranks_hear_why(tmp_path, name):
    good = {"model.a": torch.ones(8, 2), "optimizer.exp_avg.a": torch.zeros(8, 2)}
    layout, first = Layout(fsdp=2), write_whole(tmp_path, good, step=1)
    bad = {key: value.clone() for key, value in good.items()}
    bad[name][7, 1] = NAN  # of rank 1
    results = write(tmp_path, lambda rank: shards_of(bad, layout, rank), size=2, step=2)
    for error in results:
        assert isinstance(error, NonFiniteError)
        assert f"'{name}' holds 1 NaN of 8 elements (rank 1)" in str(error)
    assert committed(tmp_path) == [first]
    assert not (tmp_path / "step-00000002").exists()


@pytest.fixture
def poisoned(tmp_path):
    """A checkpoint as an earlier version wrote it, and the same without the NaN."""
    tensors = {"model.a": torch.ones(40, 3), "model.b": torch.arange(6.0)}
    whole, bad = (write_whole(tmp_path, tensors, step=step) for step in (1, 2))
    forge(bad, "model.a", lambda part: part.view(-1)[3:5].copy_(torch.tensor([NAN, INF])))
    return whole, bad


def test_the_tensors_are_read_and_those_that_are_not_finite_named(poisoned):
    whole, bad = poisoned
    assert nonfinite_tensors(Checkpoint(whole)) == []
    seen = []
    (found,) = nonfinite_tensors(Checkpoint(bad), seen.append)
    assert (found.name, found.nan, found.infinite, found.elements) == ("model.a", 1, 1, 120)
    assert sum(seen) == element_count(Checkpoint(bad)) == 126


def test_the_verb_looks_when_it_is_asked(tmp_path, capsys):
    tensors, config = small_model()
    whole, bad = (write_whole(tmp_path, tensors, step=step, config=config) for step in (1, 2))
    forge(bad, "model.norm.weight", lambda part: part.view(-1)[1:3].copy_(torch.tensor([NAN, INF])))
    assert main(["checkpoint", "verify", str(bad)]) == 0, "its bytes are whole"
    assert main(["checkpoint", "verify", str(bad), "deep=true", "progress=false"]) == 1
    assert "not finite: model.norm.weight: 1 NaN, 1 infinite of 4 elements" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(whole), "deep=true", "progress=false"]) == 0


def test_diff_says_which_side_is_not_finite(poisoned, capsys):
    whole, bad = poisoned
    found = compare(Checkpoint(whole), Checkpoint(bad))
    assert (found.nonfinite_first, found.nonfinite_second) == ((), ("model.a",))
    assert main(["checkpoint", "diff", str(bad), str(bad), "progress=false"]) == 0
    out = capsys.readouterr().out
    assert "warning: a holds NaN or infinity in model.a" in out
    assert "warning: b holds" in out
    assert "bitwise equal" in out
