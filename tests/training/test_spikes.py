"""Loss spikes: what is one and what is not, and a run that is taken back to before one."""

from __future__ import annotations

import json
import random
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig, SpikeConfig
from orchestrator.errors import DIVERGED
from orchestrator.report.run_data import read_run_data
from orchestrator.training.module import LanguageModule
from orchestrator.training.spikes import SpikeDetector
from tests.lab.ranks import run_ranks
from tests.lab.runs import checkpoint, resolved_run, small_config
from tests.lab.slow import cases

BATCH = 8
WORDS = ["model.dim=32", "train.seq_len=32", "train.global_batch_tokens=256", "train.eval_tokens=128"]
WORDS += ["optim.schedule.warmup_steps=2", "checkpoint.every_steps=5", "train.max_steps=26", "optim.lr=1e-3"]
WORDS += ["train.spike.window=16", "train.spike.steps=2", "checkpoint.keep_last=1"]


def _found(values, settings=SpikeConfig(), after=0):
    """Onset and step of each spike in a curve of losses; the gradient norm is always 1."""
    detector, found = SpikeDetector(settings, after), []
    for step, value in enumerate(values, 1):
        if spike := detector.see(step, {"loss": value, "grad_norm": 1.0}):
            found.append((spike.onset, spike.step))
    return found


def _curve(steps, seed=0, noise=0.1):
    draw = random.Random(seed)
    return [3.0 + 2.0 * 0.98**step + draw.gauss(0, noise) for step in range(steps)]


def test_steps_in_a_row_far_above_are_one_spike_and_a_new_level_becomes_usual():
    curve = _curve(400)
    assert _found(curve) == []
    spiked = list(curve)
    spiked[200:203] = [7.0, 7.5, 6.5]
    assert _found(spiked) == [(201, 203)]
    spiked[300:302] = [7.0, 7.5]
    assert _found(spiked) == [(201, 203)], "two in a row are none"
    assert _found(spiked, after=250) == [], "nor are those of the warm-up"
    stays = [*curve[:200], *(value + 2 for value in curve[200:])]
    assert _found(stays) == [(201, 203)], "said once"
    assert _found([2.0] * 100 + [2.2] * 20) == [(101, 103)]
    assert _found([2.0] * 100 + [2.1] * 20) == [], "a curve without noise still may rise a little"
    assert _found([*curve[:200], None, float("nan"), *curve[200:]]) == []


@pytest.mark.parametrize("seed", range(5))
def test_noise_with_a_heavy_tail_raises_no_alarm(seed):
    draw = random.Random(seed)
    values = [one * (1 + 0.1 * draw.paretovariate(5)) for one in _curve(2000, seed)]
    assert _found(values) == []


def test_a_restarted_or_rewound_detector_judges_as_one_that_went_through():
    curve = _curve(300)
    curve[200:206] = [7.0] * 6
    for cut in (100, 180, 201, 202, 250):
        first = SpikeDetector(SpikeConfig())
        for step in range(1, cut + 1):
            first.see(step, {"loss": curve[step - 1], "grad_norm": 1.0})
        second = SpikeDetector(SpikeConfig())
        second.restore(json.loads(json.dumps(first.state())))
        rest = [(step, {"loss": curve[step - 1], "grad_norm": 1.0}) for step in range(cut + 1, 301)]
        assert [first.see(*one) for one in rest] == [second.see(*one) for one in rest]
    first.forget_after(150)
    assert first.trusted_step == 149
    assert [spike.onset for step in range(151, 301) if (spike := first.see(step, {"loss": curve[step - 1]}))] == [201]


@contextmanager
def spoilt_weights(sequence):
    """Within it the update of the step that begins with this sequence makes the weights much too large."""
    training_step = LanguageModule.training_step

    def step(self, batch, index):
        training_step(self, batch, index)
        if self.trainer.train_dataloader.first(self.step - 1) == sequence:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.mul_(4.0)

    with mock.patch.object(LanguageModule, "training_step", step):
        yield


def _rank(world, data, run_dir, sequence):
    from orchestrator.launch.run import work

    with spoilt_weights(sequence):
        return work(resolved_run(from_dict(RunConfig, data), world, run_dir), world)


def _work(config, size, run_dir, sequence):
    run_dir.mkdir(parents=True)
    return run_ranks(size, _rank, to_dict(config), run_dir, sequence)


@pytest.mark.parametrize("size", cases([1, 2], quick=[2]))
def test_a_run_is_taken_back_to_before_the_update_that_made_it_spike(tmp_path, size, capfd):
    """The update of step 20 spoils the weights, and step 20 is saved; step 21 shows it, step 22 completes it."""
    words = [*WORDS, f"layout.fsdp={size}", "train.on_spike=rewind", "train.max_rewinds=1"]
    config, run_dir = small_config(tmp_path, *words), tmp_path / "run"
    assert _work(config, size, run_dir, 19 * BATCH) == [0] * size
    record = json.loads((run_dir / "run.json").read_text())["legs"][-1]
    (rewind,), (spike,) = record["rewinds"], record["spikes"]
    assert (spike["onset"], spike["step"]) == (21, 22)
    # keep_last=1, and yet the one before the spike is there.
    assert (rewind["source"], rewind["step"], rewind["to"]) == ("spike", 22, 15)
    assert rewind["skipped"] == [15 * BATCH, 22 * BATCH]
    assert "a spike: " in capfd.readouterr().out
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert "step-00000026" in names
    assert all(
        (run_dir / "checkpoints" / name / "set-aside.json").exists() for name in names if name == "step-00000020"
    )
    losses = [row["loss"] for row in read_run_data(run_dir).train]
    assert len(losses) == 26
    assert max(losses[10:]) < 6, "what was undone is in no curve"
    assert "rewind from 22" in (run_dir / "report.html").read_text()


def test_by_default_it_is_said_and_a_limit_stops_the_run(tmp_path, capfd):
    config, run_dir = small_config(tmp_path, *WORDS), tmp_path / "warned"
    assert _work(config, 1, run_dir, 19 * BATCH) == [0]
    assert "warning: a spike: " in capfd.readouterr().out
    record = json.loads((run_dir / "run.json").read_text())["legs"][-1]
    assert [spike["onset"] for spike in record["spikes"]] == [21]
    assert "rewinds" not in record
    state = json.loads((checkpoint(run_dir, 26) / "state.json").read_text())
    assert [entry[0] for entry in state["spikes"]][-1] == 26

    config, run_dir = small_config(tmp_path, *WORDS, "train.on_spike=rewind", "train.max_rewinds=0"), tmp_path / "no"
    assert _work(config, 1, run_dir, 19 * BATCH) == [DIVERGED]
    said = capfd.readouterr().err
    assert "diverged at step 22: a spike: " in said
    assert "train.max_rewinds=0" in said
    assert f"resume={checkpoint(run_dir, 15)}" in said
