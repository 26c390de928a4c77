"""Texts that are written on a layout, many at a time, are those of one process, one after the other."""

from __future__ import annotations

import pytest

from orchestrator.config.compose import compose
from orchestrator.config.convert import to_dict
from tests.lab import texts
from tests.lab.ranks import run_ranks
from tests.lab.runs import SMALL
from tests.lab.slow import cases
from tests.strategies.test_conformance import FEATURES
from tests.strategies.test_token_scores import size_of

WORDS = [*SMALL, "train.seq_len=48", f"model.max_seq_len={texts.WINDOW}", "train.micro_batch_size=1"]
WORDS += ["train.global_batch_tokens=384", "model.init_std=0.3"]
CASES = {
    "1": [],
    "fsdp2": ["layout.fsdp=2"],
    "tensor2": ["layout.tensor=2"],
    "fsdp2_tensor2": ["layout.fsdp=2", "layout.tensor=2"],
    "replicate2_fsdp2": ["layout.replicate=2", "layout.fsdp=2"],
    "context2": ["layout.context=2"],
    "ring2_tensor2": ["layout.context=2", "layout.context_kind=ring", "layout.tensor=2"],
    "pipeline2": ["layout.pipeline=2"],
    "pipeline2_tensor2": ["layout.pipeline=2", "layout.tensor=2"],
    "expert2": ["layout.expert=2"],
    "expert2_tensor2": ["layout.expert=2", "layout.tensor=2"],
}
EXPERTS = ["model.moe.experts=4", "model.moe.mlp_dim=32", "model.moe.shared_mlp_dim=32"]
MODELS = {name: FEATURES[name] for name in ("gpt2", "latent", "variety", "olmo", "gemma")} | {"plain": []}
MODELS |= {"experts": EXPERTS}
QUICK = [("context2", "plain"), ("pipeline2", "gpt2"), ("expert2", "experts")]
FURTHER = [("tensor2", "variety")] + [(name, "experts" if "expert" in name else "plain") for name in CASES]
FURTHER += [("fsdp2_tensor2", model) for model in MODELS]


@pytest.mark.parametrize(("name", "model"), cases(dict.fromkeys(QUICK + FURTHER), quick=QUICK))
def test_texts_are_those_of_one_process(name, model):
    words = [*WORDS, *MODELS[model], *CASES[name]]
    found = run_ranks(size_of(CASES[name]), texts.write, to_dict(compose(words).config), 2)
    one = [word for word in words if not word.startswith("layout.")]
    (wanted,) = run_ranks(1, texts.alone, to_dict(compose(one).config))
    for rank in found:
        assert rank.texts == wanted
        assert rank.cached == ("context" not in " ".join(CASES[name]))
    assert [len(text) for text in wanted] == [14, 13, 12, 11, 10, 9, 1]
    assert len({token for text in wanted for token in text}) > 5
