"""Runs that learn from preferences: from rows of pairs over the reference's scores to checkpoints and resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.config.compose import compose
from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigErrors, DataError
from orchestrator.runs import init_from
from tests.lab.runs import TINY, checkpoint, losses, read_rows, small_config, small_overrides, train, work_ranks
from tests.lab.slow import cases, slow
from tests.lab.tensors import read_all
from tests.strategies.test_token_scores import size_of

STEPS = 8


def write_pairs(path: Path) -> str:
    """Pairs in three of the forms that data sets have: texts, messages behind a prompt, whole conversations."""
    rows = []
    for number in range(48):
        question, good, bad = (
            f"what is {number} + {number % 7}?",
            f"it is {number + number % 7}.",
            f"who knows {number}",
        )
        user, chosen, rejected = (
            {"role": role, "content": text}
            for role, text in (("user", question), ("assistant", good), ("assistant", bad))
        )
        forms = (
            {"prompt": question, "chosen": good, "rejected": bad},
            {"prompt": [user], "chosen": [chosen], "rejected": [rejected]},
            {"prompt": question, "chosen": [user, chosen], "rejected": [user, rejected]},
        )
        rows.append(forms[number % 3])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(tmp: Path, *more: str) -> list[str]:
    path = write_pairs(tmp / "pairs.jsonl")
    return [
        *TINY,
        f"data.sources=[{{path:'{path}'}}]",
        *("data.messages=preference", "data.chat.template=simple", "data.validation_fraction=0.2"),
        *("train.preference.loss=sigmoid", "train.preference.beta=0.5", "optim.lr=0.01"),
        *(
            f"train.max_steps={STEPS}",
            "train.seq_len=192",
            "train.global_batch_tokens=1536",
            "train.micro_batch_size=2",
        ),
        *("checkpoint.every_steps=4", "train.eval_every=4", "train.eval_tokens=1536", "optim.schedule.warmup_steps=1"),
        *more,
    ]


def config_of(tmp: Path, *more: str) -> RunConfig:
    """The configuration of a run, with the model of the checkpoint that it starts from."""
    found = small_overrides(tmp, *words(tmp, *more))
    if not any(word.startswith("train.init_from") for word in more):
        return compose(found).config
    return init_from.settle(compose([word for word in found if not word.startswith("model.")]), False, print)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trains on the pairs, each configuration once."""
    tmp, done = tmp_path_factory.mktemp("pairs"), {}

    def run(*more: str) -> Path:
        if more not in done:
            done[more] = tmp / f"run{len(done)}"
            train(config_of(tmp, *more), size_of(list(more)), done[more])
        return done[more]

    run.tmp = tmp
    return run


def test_it_learns_which_response_was_preferred(runs):
    rows = read_rows(runs())
    found = losses(rows)
    assert found[0] == pytest.approx(math.log(2), rel=1e-5), "it begins as the reference"
    assert found[-1] < 0.5
    steps = [row for row in rows if "loss" in row]
    assert steps[0]["reward_margin"] == pytest.approx(0.0, abs=1e-4)
    assert steps[-1]["reward_margin"] > 0.5
    assert steps[-1]["reward_accuracy"] > 0.8
    evaluations = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in evaluations] == [4, STEPS]
    assert evaluations[-1]["val_loss"] < math.log(2)
    assert evaluations[-1]["val_reward_accuracy"] > 0.8
    assert "val_perplexity" not in evaluations[-1]


LAYOUTS = {
    "fsdp2_tensor2": ["layout.fsdp=2", "layout.tensor=2"],
    "context2": ["layout.context=2"],
    "pipeline2": ["layout.pipeline=2", "model.layers=2"],
}


@pytest.mark.parametrize("layout", cases(LAYOUTS, quick=["fsdp2_tensor2"]))
def test_every_layout_trains_alike(runs, layout):
    one = [word for word in LAYOUTS[layout] if not word.startswith("layout.")]
    ours, theirs = read_rows(runs(*LAYOUTS[layout])), read_rows(runs(*one))
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=1e-4)
    names = ("val_loss", "val_reward_accuracy")
    values = [[row[name] for row in rows for name in names if name in row] for rows in (ours, theirs)]
    np.testing.assert_allclose(*values, rtol=1e-4)


@pytest.mark.parametrize("layout", cases(["one", "fsdp=2", "context=2", "pipeline=2"], quick=["one"]))
def test_each_source_has_the_loss_of_its_pairs(runs, layout):
    other = runs.tmp / "other"
    other.mkdir(exist_ok=True)
    pairs = [write_pairs(folder / "pairs.jsonl") for folder in (runs.tmp, other)]
    both = ", ".join(f"{{path: '{path}', weight: 1, name: {name}}}" for path, name in zip(pairs, "ab", strict=True))
    more = [f"data.sources=[{both}]", "train.max_steps=3", "train.eval_every=null", "model.layers=2"]
    shape = [] if layout == "one" else [f"layout.{layout}"]
    rows = [row for row in read_rows(runs(*more, *shape)) if "loss" in row]
    assert rows[0]["loss/a"] == rows[0]["loss/b"] == pytest.approx(math.log(2), rel=1e-5)
    for row, alone in zip(rows, [row for row in read_rows(runs(*more)) if "loss" in row], strict=True):
        assert row["loss/a"] == pytest.approx(alone["loss/a"], rel=1e-4)
        # Half of the sequences are of each, with nearly as many pairs.
        assert row["loss"] == pytest.approx((row["loss/a"] + row["loss/b"]) / 2, rel=2e-2)


def test_a_resumed_run_has_the_same_bits_and_needs_no_cache(runs, tmp_path):
    whole = runs()
    assert (checkpoint(whole, 4) / "preference-reference.bin").stat().st_size % 32 == 0
    config = small_config(runs.tmp, *words(runs.tmp, f"data.cache_dir={tmp_path / 'cache'}"))
    rows = train(config, 1, tmp_path / "resumed", checkpoint(whole, 4))
    assert losses(rows) == losses(read_rows(whole))[4:]
    before, after = read_all(checkpoint(whole, STEPS)), read_all(checkpoint(tmp_path / "resumed", STEPS))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not list((tmp_path / "cache" / "references").glob("*")), "nothing was scored again"


LIVE = {
    "second model": ["train.preference.reference=live"],
    "adapters off": ["train.preference.reference=live", "train.lora.rank=4", "train.lora.alpha=16"],
}


@pytest.mark.parametrize(
    ("kind", "layout"), cases([(a, b) for a in LIVE for b in ("1", "fsdp2")], quick=[("adapters off", "fsdp2")])
)
def test_a_live_reference_says_what_the_scores_do_and_over_a_stop_too(runs, tmp_path, kind, layout):
    live, *lora = LIVE[kind]
    more = [*lora, f"train.init_from={checkpoint(runs(), 4)}", *(["layout.fsdp=2"] if layout == "fsdp2" else [])]
    ours, theirs = runs(*more, live), runs(*more)
    for name in ("loss", "val_loss", "reward_margin"):
        found = [[row[name] for row in read_rows(of) if name in row] for of in (ours, theirs)]
        np.testing.assert_allclose(*found, rtol=0, atol=1e-6 if "loss" in name else 1e-5, err_msg=name)
    assert losses(read_rows(ours))[-1] < math.log(2) - 0.05
    assert not (checkpoint(ours, STEPS) / "preference-reference.bin").exists()
    rows = train(config_of(runs.tmp, *more, live), size_of(more), tmp_path / "resumed", checkpoint(ours, 4))
    assert losses(rows) == losses(read_rows(ours))[4:]


@slow
def test_a_live_reference_is_the_model_of_the_beginning_or_an_error(runs, tmp_path):
    start = f"train.init_from={checkpoint(runs(), 4)}"
    adapters = runs(*LIVE["adapters off"], start)
    # Of adapters that were there at the beginning nothing can be switched off; the scores know them.
    again = [f"train.init_from={checkpoint(adapters, STEPS)}", *LIVE["adapters off"]]
    with pytest.raises(AssertionError, match="CheckpointError: the run began with adapters"):
        work_ranks(config_of(runs.tmp, *again), 1, tmp_path / "again")
    whole = runs(start, *LIVE["second model"])
    other = config_of(runs.tmp, f"train.init_from={checkpoint(runs(), STEPS)}", *LIVE["second model"])
    with pytest.raises(AssertionError, match="CheckpointError: the model that the run began with is another one now"):
        work_ranks(other, 1, tmp_path / "other", checkpoint(whole, 4))


def test_more_steps_score_what_is_missing_by_the_model_of_the_beginning(runs, tmp_path):
    # Of the first three steps alone the reference is known; the others' pairs are scored when the run goes on.
    short = small_config(runs.tmp, *words(runs.tmp, f"data.cache_dir={tmp_path / 'a'}", "train.max_steps=1"))
    train(short, 1, tmp_path / "short")
    go_on = ["'resume_allow=[schedule]'", f"data.cache_dir={tmp_path / 'b'}", "train.max_steps=3"]
    longer = small_config(runs.tmp, *words(runs.tmp, *[word.strip("'") for word in go_on]))
    rows = train(longer, 1, tmp_path / "longer", checkpoint(tmp_path / "short", 1))
    sizes = [(checkpoint(tmp_path / name, at) / "preference-reference.bin").stat().st_size for name, at in
             (("short", 1), ("longer", 3))]  # fmt: skip
    assert sizes[0] < sizes[1]
    assert len(losses(rows)) == 2
    assert list((tmp_path / "b" / "references").glob("*.bin"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["train.z_loss=0.1"], "train.z_loss=0.1"),
        (["data.document_mask=false"], "data.document_mask=False"),
        (["train.on_nonfinite=rewind"], "train.on_nonfinite=rewind"),
        (["train.preference.beta=0"], "train.preference.beta"),
        (
            ["train.lora.rank=4", "train.lora.dropout=0.1", "layout.pipeline=2", "layout.schedule=interleaved"],
            "train.lora.dropout=0.1",
        ),
        (["train.preference.loss=ipo", "train.preference.label_smoothing=0.1"], "label_smoothing"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, more, message):
    with pytest.raises(ConfigErrors) as found:
        compose(words(tmp_path, *more))
    assert message in str(found.value)


def test_rows_that_are_no_pairs_are_refused(tmp_path):
    from orchestrator.data.pairs import pair_of

    message = {"role": "user", "content": "hello"}
    for row, got in (
        ({"prompt": "a", "chosen": "b"}, "columns prompt, chosen"),
        ({"chosen": "b", "rejected": "c"}, "no prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "do not differ"),
        ({"prompt": "a", "chosen": [message], "rejected": [{**message, "content": "x"}]}, "no prompt"),
    ):
        with pytest.raises(DataError) as found:
            pair_of(row, "rows.jsonl, line 3")
        assert "rows.jsonl, line 3" in str(found.value)
        assert got in str(found.value)
    assert pair_of({"prompt": "a", "chosen": None, "rejected": "c"}, "here") is None
