"""Tasks on virtual devices: what lm-eval's own model gives for the same texts, by a bounded number of programs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from orchestrator.config.compose import compose
from tests.lab.harness import LONGEST, RELATIVE
from tests.lab.ranks import run_ranks
from tests.lab.run_server import ROOT
from tests.lab.slow import cases
from tests.xla.test_conformance import NATIVE, XLA


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A folder with a checkpoint and lm-eval's scores by kind of tokenizer, made where lm-eval is installed."""
    done: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in done:
            done[kind] = tmp_path_factory.mktemp(kind)
            command = [NATIVE, "-m", "tests.lab.harness", str(done[kind]), kind]
            made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
            assert made.returncode == 0, made.stderr
        return done[kind]

    return get


@pytest.mark.parametrize(
    ("layout", "kind"),
    cases(
        [("fsdp2_tensor2", "llama3"), ("fsdp2_tensor2", "qwen"), ("context2_fsdp2", "qwen"), ("1", "llama3")],
        quick=[("fsdp2_tensor2", "llama3")],
    ),
)
def test_scores_are_those_of_lm_evals_own_model(scored, layout, kind):
    folder = scored(kind)
    rows = json.loads((folder / "scored.json").read_text())
    ((found, programs, again, shapes),) = run_ranks(1, _score, str(folder / "imported"), XLA[layout], rows)
    np.testing.assert_allclose([value for value, _ in found], [row[2] for row in rows], rtol=RELATIVE)
    assert [greedy for _, greedy in found] == [row[3] for row in rows]
    assert shapes == 1, "texts of up to 48 tokens share a shape"
    assert programs <= 2 * shapes, "a program for each shape, and one that reads it"
    assert again == 0, "a shape that was seen compiles nothing"


def _score(world, checkpoint, words, rows):
    from orchestrator.evaluation.scoring import ScoredText, Scorer
    from orchestrator.launch.model_job import open_job

    with open_job(compose(words), checkpoint).served() as served:
        scorer = Scorer(served.model, served.parallel, LONGEST, batch_tokens=128)
        texts = [ScoredText([*context, *continuation], len(context)) for context, continuation, *_ in rows]
        count = served.parallel.compilations
        before = count()
        found = [(one.log_likelihood, one.greedy) for one in scorer(texts)]
        after = count()
        scorer(list(reversed(texts))[:3])
        lengths = {batch.length for batch in scorer.shapes.batches([len(text.tokens) - 1 for text in texts])}
        return found, after - before, count() - after, len(lengths)
