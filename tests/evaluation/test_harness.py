"""lm-eval on our devices gives what its own model gives on the exported checkpoint, request by request."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.lab import harness as lab
from tests.lab.ranks import run_ranks
from tests.lab.slow import cases

pytest.importorskip("lm_eval")
SCORED = ["lab_choices", "lab_texts"]
ALL = [*SCORED, "lab_answers"]
LAYOUTS: dict[str, list[str]] = {
    "1": [],
    "fsdp2": ["layout.fsdp=2"],
    "tensor2": ["layout.tensor=2"],
    "fsdp2_tensor2": ["layout.fsdp=2", "layout.tensor=2"],
    "context2": ["layout.context=2"],
    "ring2": ["layout.context=2", "layout.context_kind=ring"],
    "ulysses2": ["layout.context=2", "layout.context_kind=ulysses"],
    "pipeline2": ["layout.pipeline=2"],
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    return lab.write_tasks(tmp_path_factory.mktemp("tasks") / "lab")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoint and lm-eval's own results by kind of tokenizer, each made once."""
    lab.preload()
    done: dict[str, Any] = {}

    def get(kind: str, tasks: Path) -> tuple[Path, dict[str, Any]]:
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind)
            found = lab.make_checkpoint(folder, kind)
            done[kind] = found, lab.reference(lab.export(found, folder / "export"), tasks, ALL)
        return done[kind]

    return get


def evaluated(
    world, checkpoint: str, words: list[str], request: dict[str, Any], options: dict[str, Any], longest=lab.LONGEST
):
    """Evaluate tasks on this rank of a job, as the verb does."""
    from orchestrator.config.compose import compose
    from orchestrator.evaluation.evaluate_tasks import Evaluated
    from orchestrator.evaluation.harness_tasks import HarnessTasks, TaskRequest
    from orchestrator.launch.model_job import open_job
    from orchestrator.runs.stored_model import tokenizer_of

    if world.size > 1:
        os.environ.update(world.environment())
    job = open_job(compose(["hardware=cpu", f"hardware.devices={world.size}", *words]), checkpoint)
    with job.served() as served:
        given = Evaluated(served.model, served.parallel, tokenizer_of(served.checkpoint), longest, **options)
        return given.lead_harness(lambda model: HarnessTasks(TaskRequest.from_dict(request)).run(model))


@pytest.mark.parametrize("kind", cases(["llama3", "qwen"], quick=["llama3"]))
def test_chat_templates_and_examples_are_those_of_lm_evals_own_model(models, tasks, kind, tmp_path):
    checkpoint, _ = models(kind, tasks)
    asked = {"apply_chat_template": True, "fewshot_as_multiturn": True, "num_fewshot": 1, "system_instruction": "sat"}
    exported = lab.export(checkpoint, tmp_path / "export")
    wanted = lab.reference(exported, tasks, ["lab_choices"], **asked)
    (found,) = run_ranks(1, evaluated, str(checkpoint), [], _requested(tasks, ["lab_choices"], **asked), {})
    _assert_same(found, wanted)


def _requested(tasks: Path, names: list[str], **more: Any) -> dict[str, Any]:
    return {"names": names, "include": [str(tasks)], "bootstrap": 0, "samples": True, **more}


def _values(replies: list[Any]) -> list[float]:
    return [reply[0] if isinstance(reply, tuple) else reply for reply in replies]


def _greedy(replies: list[Any]) -> list[bool]:
    return [reply[1] for reply in replies if isinstance(reply, tuple)]


def _assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    ours, theirs = lab.responses(found), lab.responses(wanted)
    assert set(ours) == set(theirs)
    for name in theirs:
        if isinstance(theirs[name][0], str):
            assert ours[name] == theirs[name]
            continue
        np.testing.assert_allclose(*(_values(replies[name]) for replies in (ours, theirs)), lab.RELATIVE, err_msg=name)
        assert _greedy(ours[name]) == _greedy(theirs[name])
    assert found["results"].keys() == wanted["results"].keys()


@pytest.mark.parametrize(
    ("layout", "kind"),
    cases(
        [(layout, kind) for layout in LAYOUTS for kind in ("llama3", "qwen")],
        quick=[("1", "qwen"), ("fsdp2_tensor2", "llama3"), ("context2", "qwen")],
    ),
)
def test_answers_are_those_of_lm_evals_own_model(models, tasks, layout, kind):
    checkpoint, wanted = models(kind, tasks)
    words = LAYOUTS[layout]
    size = int(np.prod([int(word[-1]) for word in words if word[-1].isdigit()]))
    options = {"batch_tokens": 200}
    found, *others = run_ranks(size, evaluated, str(checkpoint), words, _requested(tasks, ALL), options)
    assert others == [None] * (size - 1)
    _assert_same(found, wanted)
