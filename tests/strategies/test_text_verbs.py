"""What the verbs `generate` and `chat` have done on a layout is what one device prints."""

from __future__ import annotations

import dataclasses
import io
import json
import sys

import pytest
import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.inference.chat_task import Answering, ChatJob, ChatSession, chat
from orchestrator.inference.generate_task import GenerateJob, generate, write_texts
from orchestrator.inference.generator import Writer
from tests.lab.ranks import run_ranks
from tests.lab.slow import cases

GREEDY = {"temperature": 0.0}
GENERATE = GenerateJob(["the", "def f(x):\n", "日本"], 2, 8, {"temperature": 0.8}, ["zz"], 1, 2, json=True)
CHAT = ChatJob("Be the cat.", 8, GREEDY, [], 0, json=True)
LINES = "the cat?\nwhere?\n/reset\nwhy\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.inference.test_chat import make

    return make(tmp_path_factory.mktemp("model"), "chatml", multiple=16) / "imported"


def printed(function):
    """Run a function with `LINES` on standard input; returns what it prints."""
    out, (before_in, before_out) = io.StringIO(), (sys.stdin, sys.stdout)
    sys.stdin, sys.stdout = io.StringIO(LINES), out
    try:
        function()
    finally:
        sys.stdin, sys.stdout = before_in, before_out
    return [json.loads(line) for line in out.getvalue().splitlines()]


def on_layout(world, words, path):
    from orchestrator.config.compose import compose
    from orchestrator.launch.model_job import open_job
    from orchestrator.strategies.served_model import ServedModel
    from orchestrator.training.job import make_strategy
    from orchestrator.training.placed_model import build_placed
    from orchestrator.training.restore import restore_weights

    opened = open_job(compose(["hardware=cpu", f"hardware.devices={world.size}", *words]), path)
    parallel = make_strategy(opened.resolved, opened.target, world)
    parallel.join()
    model = build_placed(opened.resolved.config, parallel)
    restore_weights(opened.checkpoint, opened.resolved.config, parallel, model, cast=True)
    served = ServedModel(model.eval(), parallel, opened.checkpoint, opened.resolved.config)
    found = [printed(lambda: generate(served, dataclasses.asdict(GENERATE)))]
    found.append(printed(lambda: chat(served, dataclasses.asdict(CHAT))))
    parallel.leave()
    return found


@pytest.mark.parametrize(
    ("size", "words"),
    cases(
        [(2, ("layout.tensor=2",)), (2, ("layout.fsdp=2",)), (4, ("layout.fsdp=2", "layout.tensor=2"))],
        quick=[(2, ("layout.tensor=2",))],
    ),
)
def test_rank_0_prints_what_one_device_does(folder, size, words):
    writer = Writer(Checkpoint(folder), torch.device("cpu"))
    answering = Answering(writer, CHAT)
    expected = [printed(lambda: write_texts(writer, GENERATE))]
    expected.append(printed(lambda: ChatSession(answering, answering).hold(sys.stdin, sys.stdout)))
    assert [len(lines) for lines in expected] == [6, 3]
    found = run_ranks(size, on_layout, words, str(folder))
    assert found[0] == expected
    assert found[1:] == [[[], []]] * (size - 1)
