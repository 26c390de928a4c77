"""Losses of single targets, and losses weighted by target, on every layout: what full logits give in one process."""

from __future__ import annotations

import pytest

from orchestrator.config.compose import compose
from orchestrator.config.convert import to_dict
from tests.lab import scores
from tests.lab.ranks import run_ranks
from tests.lab.runs import SMALL
from tests.lab.slow import cases

RELATIVE = 1e-5
WORDS = [*SMALL, f"train.seq_len={scores.LENGTH}", "train.loss_chunk_tokens=24", "train.micro_batch_size=1"]
WORDS += [f"train.global_batch_tokens={scores.ROWS * scores.LENGTH}", "model.init_std=0.3"]
CASES = {
    "1": [],
    "fsdp2": ["layout.fsdp=2"],
    "tensor2": ["layout.tensor=2"],
    "fsdp2_tensor2": ["layout.fsdp=2", "layout.tensor=2"],
    "replicate2_fsdp2": ["layout.replicate=2", "layout.fsdp=2"],
    "context2": ["layout.context=2"],
    "context2_tensor2": ["layout.context=2", "layout.tensor=2"],
    "ring2": ["layout.context=2", "layout.context_kind=ring"],
    "ulysses2": ["layout.context=2", "layout.context_kind=ulysses"],
    "pipeline2": ["layout.pipeline=2"],
    "pipeline2_context2": ["layout.pipeline=2", "layout.context=2", "layout.context_kind=ring"],
    "dualpipe_v": ["layout.pipeline=2", "layout.schedule=dualpipe_v", "model.layers=4"],
}
MODELS = {
    "plain": ["train.z_loss=0.01"],
    "capped": ["model.logit_softcap=3.0", "model.logit_scale=0.5", "model.tied_embeddings=true", "train.z_loss=0.1"],
}
QUICK = [("1", "plain"), ("fsdp2_tensor2", "capped"), ("ulysses2", "plain")]
QUICK += [("context2_tensor2", "plain"), ("pipeline2_context2", "plain")]


def size_of(words: list[str]) -> int:
    size = 1
    for word in words:
        degree = word.partition("=")[2]
        size *= int(degree) if word.startswith("layout.") and degree.isdigit() else 1
    return size


@pytest.mark.parametrize(("name", "model"), cases([(name, model) for name in CASES for model in MODELS], quick=QUICK))
def test_scores_and_weighted_gradients_are_those_of_full_logits(name, model):
    words = [*WORDS, *MODELS[model], *CASES[name]]
    parts = run_ranks(size_of(CASES[name]), scores.score, to_dict(compose(words).config))
    one = [word for word in words if not word.startswith("layout.")]
    (wanted,) = run_ranks(1, _expected, to_dict(compose(one).config))
    scores.assert_agrees(parts, wanted, RELATIVE)
    assert wanted.greedy.any()


def _expected(world, data):
    from orchestrator.config.convert import from_dict
    from orchestrator.config.schema import RunConfig

    return scores.expected(from_dict(RunConfig, data))


def test_the_rows_of_a_run_have_the_z_loss_apart(tmp_path):
    from tests.lab.runs import losses, read_rows, small_config, train

    short = ["train.max_steps=3", "train.sample.tokens=0", "checkpoint.handover.enabled=false"]
    runs = {
        "plain": (1, []),
        "one": (1, ["train.z_loss=0.01"]),
        "split": (4, ["train.z_loss=0.01", "layout.pipeline=2", "layout.tensor=2", "train.micro_batch_size=2"]),
    }
    rows = {}
    for name, (size, words) in runs.items():
        train(small_config(tmp_path, *short, *words), size, tmp_path / name)
        rows[name] = [row for row in read_rows(tmp_path / name) if "loss" in row]
    assert losses(rows["one"])[0] == pytest.approx(losses(rows["plain"])[0], rel=1e-6), "it is no part of the loss"
    assert losses(rows["one"])[2] != losses(rows["plain"])[2], "and yet it is minimised"
    z_losses = {name: [row.get("z_loss") for row in found] for name, found in rows.items()}
    assert z_losses["plain"] == [None] * 3
    assert z_losses["split"] == pytest.approx(z_losses["one"], rel=RELATIVE)
    assert losses(rows["split"]) == pytest.approx(losses(rows["one"]), rel=RELATIVE)
