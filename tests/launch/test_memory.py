"""Runs that were killed go on from the memory of their hosts, bitwise, and from storage where that is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from orchestrator.checkpoint.memory_folder import MemoryFolder
from orchestrator.checkpoint.run_checkpoints import committed, newest_valid
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.launch.run import work
from orchestrator.training.callbacks.snapshots import Snapshots
from orchestrator.training.host_snapshots import _other_keys, _was_left
from tests.lab.ranks import run_ranks
from tests.lab.runs import TINY, losses, read_rows, resolved_run, small_config
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


def test_one_host_that_is_left_goes_on_alone_on_another_layout(tmp_path, whole, killed_on_two_hosts):
    tmp, config = whole
    shutil.copytree(killed_on_two_hosts, tmp_path, dirs_exist_ok=True)
    alone = replace(config, layout=replace(config.layout, fsdp=1))
    _train(alone, [tmp_path / "host1"], tmp_path / "run")
    leg = _last_leg(tmp_path / "run")
    assert (leg["start_step"], leg["restored_from"], leg["handover"]["verdict"]) == (6, "memory", "agrees")
    assert leg["handover"]["changed"] == ["layout"]
    np.testing.assert_allclose(losses(read_rows(tmp_path / "run")), losses(read_rows(tmp / "run")), rtol=1e-5)


@pytest.mark.parametrize(
    "lost", [(1,), pytest.param((), marks=pytest.mark.slow), pytest.param((1, 2), marks=pytest.mark.slow)]
)
def test_four_hosts_bring_together_what_each_lacks(tmp_path, whole, lost):
    config = replace(whole[1], layout=replace(whole[1].layout, fsdp=4))
    roots = [tmp_path / f"host{number}" for number in range(4)]
    _train(config, roots, tmp_path / "run", die_after=6)
    for number, root in enumerate(roots):
        (directory,) = _snapshots(root)
        held = {f"rank-{rank:05d}.safetensors" for rank in (number, (number - 1) % 4)}
        assert {path.name for path in directory.glob("*.safetensors")} == held
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    for number in lost:
        _wipe(roots[number])
    _train(config, roots, tmp_path / "run")
    leg = _last_leg(tmp_path / "run")
    assert (leg["start_step"], leg["restored_from"]) == ((6, "memory") if len(lost) < 2 else (4, "storage"))
    if len(lost) == 1:
        off = replace(config, checkpoint=replace(config.checkpoint, memory=RunConfig().checkpoint.memory))
        _train(off, roots, tmp_path / "other")
        _assert_same_end(tmp_path / "run", tmp_path / "other")


def test_too_little_memory_turns_it_off_with_a_warning(tmp_path, whole, monkeypatch, capfd):
    tmp, config = whole
    monkeypatch.setattr(MemoryFolder, "free_bytes", lambda self: 1 << 18)
    _train(config, [tmp_path / "memory"] * 2, tmp_path / "run")
    said = capfd.readouterr().out
    assert re.search(
        r"warning: there are no snapshots in memory: they need 0\.\d+ GiB more in .*, which has 0\.000 GiB", said
    )
    _assert_same_end(tmp_path / "run", tmp / "run")


def test_a_memory_of_others_turns_it_off_with_a_warning(tmp_path, whole, capfd):
    config = whole[1]
    (tmp_path / "memory" / f"orchestrator-{os.geteuid()}").mkdir(parents=True, mode=0o755)
    _train(config, [tmp_path / "memory"] * 2, tmp_path / "run")
    assert (
        "there are no snapshots in memory: the folder for snapshots in memory is not this user's alone"
        in capfd.readouterr().err
    )
    assert committed(tmp_path / "run" / "checkpoints")[0].name == f"step-{STEPS:08d}"


@pytest.mark.parametrize(
    ("leg", "step", "left"),
    [(0, 4, False), (0, 5, True), (1, 7, False), (1, 8, True), (2, 9, False), (None, 9, False)],
)
def test_what_the_run_has_turned_away_from_is_not_taken(leg, step, left):
    """A host that was away keeps the snapshot of a leg; meanwhile another leg began from an earlier step."""
    legs = [{"leg": 0, "start_step": 0}, {"leg": 1, "start_step": 4}, {"leg": 2, "start_step": 7}]
    assert _was_left(leg, step, legs) is left


def test_only_what_the_steps_depend_on_has_to_be_the_same():
    def other(**changes):
        return _other_keys(to_dict(replace(RunConfig(), **changes)), RunConfig())

    run = RunConfig()
    assert other(layout=replace(run.layout, fsdp=4), runs_dir="/elsewhere", resume="auto") == []
    assert other(data=replace(run.data, workers=3), checkpoint=replace(run.checkpoint, keep_last=9)) == []
    assert other(optim=replace(run.optim, lr=1.0), seed=3) == ["optim.lr", "seed"]
    assert other(train=replace(run.train, max_steps=3)) == ["train.max_steps"]
