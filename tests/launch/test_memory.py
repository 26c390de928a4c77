"""Runs that were killed go on from the memory of their hosts, bitwise, and from storage where that is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from orchestrator.checkpoint.run_checkpoints import committed, newest_valid
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.launch.run import work
from orchestrator.training.callbacks.snapshots import Snapshots
from tests.lab.ranks import run_ranks
from tests.lab.runs import TINY, resolved_run, small_config
from tests.lab.tensors import read_all

STEPS = 8
SHORT = (
    *TINY,
    f"train.max_steps={STEPS}",
    "checkpoint.every_steps=4",
    "checkpoint.handover.enabled=true",
    "checkpoint.memory.enabled=true",
    "checkpoint.memory.every_steps=1",
)


def _rank(world, data, run_dir, resume_from, roots, die_after):
    """Train as one rank, whose host has a memory of its own, and die at once after a step and its snapshot."""
    config = from_dict(RunConfig, data)
    memory = replace(config.checkpoint.memory, dir=str(roots[world.rank]))
    config = replace(config, resume=str(run_dir), checkpoint=replace(config.checkpoint, memory=memory))
    real = Snapshots.on_train_batch_end

    def step_and_die(self, trainer, module, *rest):
        self._saver.join()  # every step has its snapshot
        real(self, trainer, module, *rest)
        if module.step == die_after:
            self._saver.join()
            os.kill(os.getpid(), signal.SIGKILL)

    if die_after:
        Snapshots.on_train_batch_end = step_and_die
    return work(resolved_run(config, world, run_dir, resume_from), world)


def _train(config, roots, run_dir, die_after=None):
    """Train to the end, or until every rank was killed after a step."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for root in roots:
        root.mkdir(exist_ok=True)
    newest = newest_valid(run_dir / "checkpoints", True, print)
    arguments = (len(roots), _rank, to_dict(config), run_dir, newest, roots, die_after)
    if die_after:
        with pytest.raises(AssertionError, match="died without an answer"):
            run_ranks(*arguments)
    else:
        assert run_ranks(*arguments) == [0] * len(roots)


def _last_leg(run_dir):
    return json.loads((run_dir / "run.json").read_text())["legs"][-1]


def _assert_same_end(run_dir, other):
    ours, theirs = (committed(folder / "checkpoints")[0] for folder in (run_dir, other))
    assert (ours.name, theirs.name) == (f"step-{STEPS:08d}",) * 2
    found, wanted = read_all(ours), read_all(theirs)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def _snapshots(root):
    return sorted(root.glob("orchestrator-*/*/step-*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two ranks that nobody disturbs, without snapshots."""
    tmp = tmp_path_factory.mktemp("whole")
    config = small_config(tmp, *SHORT, "layout.fsdp=2")
    _train(
        replace(config, checkpoint=replace(config.checkpoint, memory=RunConfig().checkpoint.memory)),
        [tmp / "memory"] * 2,
        tmp / "run",
    )
    assert not (tmp / "memory").exists() or _snapshots(tmp / "memory") == []
    return tmp, config


def test_killed_between_saves_it_goes_on_bitwise_from_memory(tmp_path, whole):
    tmp, config = whole
    root = tmp_path / "memory"
    _train(config, [root] * 2, tmp_path / "run", die_after=6)
    assert [path.name for path in _snapshots(root)] == ["step-00000006"]
    assert committed(tmp_path / "run" / "checkpoints")[0].name == "step-00000004"
    _train(config, [root] * 2, tmp_path / "run")
    leg = _last_leg(tmp_path / "run")
    assert (leg["start_step"], leg["restored_from"]) == (6, "memory")
    assert leg["handover"]["verdict"] == "agrees"
    _assert_same_end(tmp_path / "run", tmp / "run")
    assert list(root.glob("orchestrator-*/*")) == [], "nothing stays of a run that has ended"


def _flip(path, at=-1):
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def _wipe(root):
    shutil.rmtree(root)


def _damage(root):
    (directory,) = _snapshots(root)
    for path in directory.glob("rank-*.safetensors"):
        _flip(path)


def _tear(root):
    """As if it had been killed while it was written: no manifest yet."""
    (directory,) = _snapshots(root)
    (directory / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("faults", "start"),
    [
        ({0: _wipe}, 6),
        ({1: _wipe}, 6),
        ({0: _wipe, 1: _wipe}, 4),
        ({0: _damage, 1: _wipe}, 4),
        ({0: _tear, 1: _wipe}, 4),
        ({0: _tear}, 6),
    ],
    ids=["first host lost", "second host lost", "both lost", "damaged and lost", "torn and lost", "torn on one"],
)
def test_two_hosts(tmp_path, whole, killed_on_two_hosts, capfd, faults, start):
    tmp, config = whole
    shutil.copytree(killed_on_two_hosts, tmp_path, dirs_exist_ok=True)
    roots = [tmp_path / "host0", tmp_path / "host1"]
    for host, fault in faults.items():
        fault(roots[host])
    _train(config, roots, tmp_path / "run")
    leg = _last_leg(tmp_path / "run")
    assert (leg["start_step"], leg["restored_from"]) == (start, "memory" if start == 6 else "storage")
    _assert_same_end(tmp_path / "run", tmp / "run")
    said = capfd.readouterr().err
    if _damage in faults.values():
        assert re.search(r"skipping .*step-00000006: .*rank-00000.safetensors", said), said
    if _tear in faults.values() and start == 4:
        assert "the process ended while it was written" in said


@pytest.fixture(scope="module")
def killed_on_two_hosts(tmp_path_factory, whole):
    """A run of two ranks on hosts of their own, killed after step 6."""
    tmp, config = tmp_path_factory.mktemp("killed"), whole[1]
    _train(config, [tmp / "host0", tmp / "host1"], tmp / "run", die_after=6)
    for root in (tmp / "host0", tmp / "host1"):
        (directory,) = _snapshots(root)
        assert {path.name for path in directory.glob("*.safetensors")} == {
            "rank-00000.safetensors",
            "rank-00001.safetensors",
        }, "its own and a copy"
    return tmp
