"""Callbacks, loggers and schedules of the user's; and that no checkpoint makes code run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.config import registry
from orchestrator.config.compose import compose
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError, ConfigErrors, PartError
from orchestrator.launch.plan import find_plan
from orchestrator.observe.trackers import tagged
from orchestrator.runs.own_parts import check_parts
from orchestrator.runs.stored_model import model_of
from tests.lab.checkpoints import small_model, write_whole
from tests.lab.runs import TINY, checkpoint, resolved_run, small_config, train

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_optimizer_and_callback"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))


def test_callbacks_loggers_and_schedules_of_the_users_work_on_every_rank(tmp_path, example):
    words = [
        f"callbacks=[{{_target_: own_parts.callbacks.CountTokens, directory: {tmp_path / 'counts'}}}]",
        f"logger.own=[{{_target_: own_parts.callbacks.Lines, path: {tmp_path / 'lines'}}},"
        f"{{_target_: own_parts.callbacks.Lines, path: {tmp_path / 'no' / 'such' / 'folder'}}}]",
        "optim.schedule._target_=own_parts.callbacks.InverseSquareRoot",
        "optim.schedule.arguments.warmup_steps=4",
        "train.max_steps=8",
        "layout.fsdp=2",
    ]
    config = small_config(tmp_path, *TINY, *words)
    check_parts(config)
    rows = train(config, 2, tmp_path / "run")
    counts = {path.name: int(path.read_text()) for path in (tmp_path / "counts").iterdir()}
    assert counts == {"rank0.txt": 8 * 64, "rank1.txt": 8 * 64}, "half of 128 tokens a step each"
    head, *lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert head == {"name": config.name}
    assert lines == [{"step": row["step"], **tagged(row)} for row in rows]
    assert {line["step"] for line in lines if "train/loss" in line} == set(range(1, 9))
    rates = [row["lr"] for row in rows if "lr" in row]
    assert rates == [config.optim.lr * min(step / 4, (4 / step) ** 0.5) for step in range(1, 9)]


def test_what_a_callback_raises_is_the_users_error_with_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "mine_failing.py").write_text(
        "import lightning.pytorch as lightning\n"
        "class Failing(lightning.Callback):\n"
        "    def on_train_batch_end(self, trainer, module, *rest):\n"
        "        if module.step == 2:\n"
        "            self.helper()\n"
        "    def helper(self):\n"
        "        raise KeyError('what I look for')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = small_config(tmp_path, *TINY, "callbacks=[{_target_: mine_failing.Failing}]")
    from orchestrator.launch.run import work

    (tmp_path / "run").mkdir()
    with pytest.raises(PartError) as caught:
        work(resolved_run(config, World(), tmp_path / "run"), World())
    said = str(caught.value)
    assert said.startswith("the callback mine_failing.Failing failed")
    assert 'mine_failing.py", line 7, in helper' in said
    assert "KeyError: 'what I look for'" in said
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_the_state_of_a_callback_is_there_again_when_a_run_is_resumed(tmp_path, monkeypatch, capfd):
    (tmp_path / "mine_counting.py").write_text(
        "import torch, lightning.pytorch as lightning\n"
        "class Counting(lightning.Callback):\n"
        "    seen, best = 0, (0.0, torch.zeros(2))\n"
        "    def on_train_batch_end(self, trainer, module, *rest):\n"
        "        self.seen, self.best = self.seen + 1, (float('inf'), torch.ones(2))\n"
        "    def state_dict(self):\n"
        "        return {'seen': self.seen, 'best': self.best, 'large': torch.zeros(1000)}\n"
        "    def load_state_dict(self, state):\n"
        "        assert state['best'][0] == float('inf') and state['best'][1].tolist() == [1.0, 1.0], state\n"
        "        self.seen = state['seen'] + 100\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = (*TINY, "callbacks=[{_target_: mine_counting.Counting}]", "checkpoint.every_steps=2")
    train(small_config(tmp_path, *words, "train.max_steps=2"), 2, tmp_path / "first")
    assert capfd.readouterr().err.count("left out: Counting.large: a Tensor") == 1
    saved = checkpoint(tmp_path / "first", 2)
    # Of one process, by the first.
    train(small_config(tmp_path, *words, "train.max_steps=4"), 1, tmp_path / "second", saved)
    states = Checkpoint(checkpoint(tmp_path / "second", 4)).state()["callbacks"]
    assert states == {
        "Counting": {"seen": 104, "best": {"$tuple": [{"$float": "inf"}, {"$tensor": ["F32", [2], [1, 1]]}]}}
    }


WRONG = {
    "model._target_=own_parts.nothing.Model": "there is no module 'own_parts.nothing'",
    "model._target_=own_parts.callbacks.Lines": "the arguments do not fit the model",
    "model._target_=torch.nn.Identity": "is no orchestrator.models.protocol.ShardableModel",
    "callbacks=[{_target_: own_parts.callbacks.Lines, path: x}]": "a class that is none of lightning",
    "callbacks=[{_target_: own_parts.callbacks.CountTokens}]": "missing a required argument: 'directory'",
    "callbacks=[{directory: x}]": "a callback is named by _target_",
    "logger.own=[{_target_: own_parts.callbacks.Lines, pth: x}]": "did you mean 'path'?",
    "optim.schedule._target_=math.sqrt": "the arguments do not fit the schedule",
    "optim.schedule._target_=own_parts.callbacks.InverseSqareRoot": "InverseSquareRoot'?",
    "model.arguments.window=3": "arguments are given to a model of one's own",
}


def test_every_mistake_is_said_before_a_device_is_touched(example):
    for word, said in WRONG.items():
        with pytest.raises(ConfigErrors) as caught:
            check_parts(compose([word]).config)
        assert len(caught.value.problems) == 1
        assert said in str(caught.value), word


@pytest.fixture
def marked(tmp_path, monkeypatch):
    """A module that leaves a marker when it is imported, which nobody has named here."""
    marker = tmp_path / "marker"
    (tmp_path / "mine_marked.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "import lightning.pytorch as lightning\n"
        "from orchestrator.models.decoder import Decoder\n"
        "class Model(Decoder): ...\n"
        "class Callback(lightning.Callback): ...\n"
        "def schedule(): return lambda step, max_steps, lr: lr\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_permitted", set())
    yield marker
    sys.modules.pop("mine_marked", None)


PLANTED = {
    "model": lambda config: config["model"].update(_target_="mine_marked.Model"),
    "callbacks": lambda config: config.update(callbacks=[{"_target_": "mine_marked.Callback"}]),
    "loggers": lambda config: config["logger"].update(own=[{"_target_": "mine_marked.Callback"}]),
    "schedule": lambda config: config["optim"]["schedule"].update(_target_="mine_marked.schedule"),
    "arguments": lambda config: config["model"].update(arguments={"x": [{"_target_": "mine_marked.Model"}]}),
    "an unknown key": lambda config: config["train"].update(_target_="mine_marked.Model"),
    "an interpolation": lambda config: config.update(name="${oc.env:HOME}"),
}


@pytest.mark.parametrize("place", PLANTED)
@pytest.mark.parametrize("given", ["resume", "train.init_from"])
def test_a_checkpoint_makes_no_code_run(tmp_path, marked, place, given):
    weights, config = small_model()
    PLANTED[place](config)
    state = {"step": 1, "data": {"fingerprint": "x", "global_batch_sequences": 1}}
    found = write_whole(tmp_path / "checkpoints", weights, config=config, state=state)
    composed = compose([f"{given}={found}", f"runs_dir={tmp_path / 'runs'}"])
    if given == "resume" or place in ("model", "arguments", "an unknown key"):
        with pytest.raises((ConfigErrors, CheckpointError)):
            find_plan(composed, main=True, alone=True)
    else:
        find_plan(composed, main=True, alone=True)  # of a run that is not gone on with the model alone is taken
    if place == "model":
        with pytest.raises(CheckpointError, match="own"):
            model_of(Checkpoint(found))
    assert not marked.exists()
    assert "mine_marked" not in sys.modules


def test_what_the_user_gives_again_is_run_and_nothing_else(tmp_path, marked):
    weights, config = small_model()
    PLANTED["model"](config)
    state = {"step": 1, "data": {"fingerprint": "x", "global_batch_sequences": 1}}
    found = write_whole(tmp_path / "checkpoints", weights, config=config, state=state)
    words = [f"resume={found}", f"runs_dir={tmp_path / 'runs'}"]
    with pytest.raises(ConfigErrors, match=r"give it again on the command line: model\._target_=mine_marked\.Model"):
        find_plan(compose(words), main=True, alone=True)
    assert not marked.exists()
    plan = find_plan(compose([*words, "model._target_=mine_marked.Model"]), main=True, alone=True)
    assert plan.config.model._target_ == "mine_marked.Model"
    assert marked.exists(), "the user's own word imports it"


def test_a_planted_run_directory_makes_no_code_run_in_a_worker(tmp_path, marked, monkeypatch):
    """A process that a launcher starts reads the run's directory; what may be imported it is told by the launcher."""
    from orchestrator.launch.run import train_worker

    planted = resolved_run(small_config(tmp_path, *TINY), World(), tmp_path / "run").to_dict()
    for part in ("config", "asked"):
        planted[part]["model"]["_target_"] = "mine_marked.Model"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "resolved.json").write_text(json.dumps(planted))
    monkeypatch.setenv("ORCHESTRATOR_RUN_DIR", str(tmp_path / "run"))
    assert train_worker() == 2
    assert not marked.exists()


def _plain(config):
    from orchestrator.config.convert import to_dict

    return to_dict(config)
