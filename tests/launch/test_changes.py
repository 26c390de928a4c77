"""What a resumed run does otherwise than one that was never stopped is said, and is only done if it is allowed."""

from __future__ import annotations

import pytest

from orchestrator.config.compose import compose
from orchestrator.errors import ConfigErrors
from orchestrator.launch.changes import changes, check, precision_change

SAVED = compose(["model=tiny", "train.max_steps=300", "optim.lr=3e-3"]).config


def _changes(*words: str, step: int = 250):
    return changes(SAVED, compose(["model=tiny", "train.max_steps=300", "optim.lr=3e-3", *words]).config, step)


def test_nothing_is_said_of_what_changes_no_number():
    assert _changes("name=other", "checkpoint.keep_last=9", "logger.every_steps=1", "hardware.devices=4") == []


def test_a_decay_may_begin_where_a_stable_run_is():
    words = ("optim.schedule.kind=wsd", "optim.schedule.decay_fraction=0.0", "train.max_steps=100000")
    stable = compose(["model=tiny", *words]).config
    branch = compose(["model=tiny", *words, "train.max_steps=300", "optim.schedule.decay_steps=50"]).config
    found = changes(stable, branch, 250)
    assert {change.key for change in found} == {"train.max_steps", "optim.schedule.decay_steps"}
    assert all(change.needs is None for change in found), "nothing jumps"
    assert any(change.needs == "schedule" for change in changes(stable, branch, 280)), "the rate would jump"


def test_a_longer_run_bends_the_schedule_and_has_to_be_allowed():
    (change,) = _changes("train.max_steps=600")
    assert (change.key, change.needs) == ("train.max_steps", "schedule")
    assert "learning rate of step 251" in change.effect
    with pytest.raises(ConfigErrors, match=r"resume_allow=\[schedule\]"):
        check([change], ())
    check([change], ("schedule",))


LONGER = {
    "constant": ("optim.schedule.kind=constant", 250),
    "before the decay of wsd": ("optim.schedule.kind=wsd", 100),
    "within the warm-up": ("optim.schedule.kind=cosine", 5),
}


@pytest.mark.parametrize("case", LONGER)
def test_a_longer_run_that_leaves_the_rate_as_it_was_is_only_told(case):
    word, step = LONGER[case]
    before, after = (compose(["model=tiny", word, f"train.max_steps={steps}"]).config for steps in (300, 600))
    (change,) = changes(before, after, step)
    assert change.needs is None


def test_another_rate_is_meant_and_told_with_its_numbers():
    (change,) = _changes("optim.lr=1e-3")
    assert (change.needs, change.was, change.now) == (None, 3e-3, 1e-3)
    assert "->" in change.effect


def test_another_schedule_has_to_be_allowed():
    assert {change.needs for change in _changes("optim.schedule.kind=constant")} == {"schedule"}


def test_another_batch_has_to_be_allowed():
    (change,) = _changes("train.global_batch_tokens=8192")
    assert change.needs == "batch"
    assert "8,192 tokens per step" in change.effect


def test_all_that_is_not_allowed_is_said_at_once():
    with pytest.raises(ConfigErrors) as caught:
        check(_changes("train.global_batch_tokens=8192", "train.max_steps=600"), ())
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("word", "effect"),
    [
        ("seed=1", "other batches"),
        ("model.dropout=0.1", "another model"),
        ("optim.weight_decay=0", "from step 251 on"),
        ("train.z_loss=1e-4", "from step 251 on"),
        ("train.preference.beta=0.5", "from step 251 on"),
        ("data.document_mask=false", "other batches"),
    ],
)
def test_what_else_changes_the_numbers_is_told(word, effect):
    (change,) = _changes(word)
    assert effect in change.effect
    assert change.needs is None


def test_the_precision_that_is_really_computed_in_is_told():
    assert precision_change("fp32", "fp32") is None
    assert precision_change(None, "fp32") is None, "a checkpoint that does not say"
    assert str(precision_change("fp32", "bf16")).startswith("precision fp32 -> bf16")
