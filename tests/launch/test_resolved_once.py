"""A run is found, opened and decided once: what one start does is counted, in its launcher and in each process."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint import signing
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import Manifest
from orchestrator.checkpoint.run_checkpoints import committed
from orchestrator.config.compose import compose
from orchestrator.data.prepare import prepare
from orchestrator.distributed.local_processes import Ended
from orchestrator.errors import UserError
from orchestrator.hardware import target_table
from orchestrator.launch import start
from orchestrator.launch.start import launch
from orchestrator.sharding.axes import MESH_AXES
from orchestrator.training import layout_choice, resolved
from tests.lab.keys import make_key
from tests.lab.ranks import run_ranks
from tests.lab.runs import TINY, read_rows, small_overrides

# What is counted -> the function.
COUNTED = {
    "layouts planned": layout_choice.settle_layout,
    "runs decided": resolved.resolve_run,
    "targets chosen": target_table.resolve,
    "data opened": prepare,
    "trust built": signing.trust,
    "keys read": signing._public,
}
ONCE = dict.fromkeys((*COUNTED, "manifests parsed", "checkpoints opened"), 1)
# A process that the launcher starts finds the run decided.
OF_A_WORKER = {name: ONCE[name] for name in ("data opened", "trust built", "keys read")}
OF_A_WORKER |= {"manifests parsed": 1, "checkpoints opened": 1}


_counting: list[Counter[str]] = []


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """Count the calls within, whatever module makes them; in a process that was forked within, anew."""
    if _counting:
        _counting[0].clear()
        yield _counting[0]
        return
    seen: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            seen[name] += 1
            return function(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, function in COUNTED.items():
            wrapped = counted(name, function)
            for module in [module for key, module in sys.modules.items() if key.startswith("orchestrator")]:
                for key in [key for key, value in vars(module).items() if value is function]:
                    patch.setattr(module, key, wrapped)
        patch.setattr(Manifest, "parse", counted("manifests parsed", Manifest.parse))
        patch.setattr(Checkpoint, "__init__", counted("checkpoints opened", Checkpoint.__init__))
        _counting.append(seen)
        yield seen
        _counting.clear()


def _in_engine(world: Any, words: list[str]) -> dict[str, int]:
    """Be one of the processes that an engine has started."""
    os.environ.update(world.environment())
    with counting() as seen:
        assert launch(compose(words)).code == 0
    return dict(seen)


def _in_worker(world: Any, environments: list[dict[str, str]]) -> dict[str, int]:
    """Be one of the processes that the launcher has started."""
    from orchestrator.launch.run import train_worker

    os.environ.update({**environments[world.rank], **world.environment()})
    with counting() as seen:
        assert train_worker() == 0
    return dict(seen)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[list[str], Path]:
    """A run of two processes, signed, and the words to go on with it."""
    tmp = tmp_path_factory.mktemp("once")
    private, public = make_key(tmp, "ours")
    words = [
        *small_overrides(tmp, *TINY, "layout.fsdp=2", "hardware.devices=2", "checkpoint.every_steps=null"),
        f"checkpoint.signing_key={private}",
        f"checkpoint.trusted_keys=[{public}]",
        "checkpoint.require_signature=true",
    ]
    new = run_ranks(2, _in_engine, [*words, "train.max_steps=2"])
    first = {name: count for name, count in ONCE.items() if name not in ("manifests parsed", "checkpoints opened")}
    assert new == [first, first], "a new run: there is no checkpoint to open"
    (run_dir,) = (tmp / "runs").glob("*/*")
    return [*words, f"resume={run_dir}"], run_dir


def test_a_process_of_an_engine_opens_and_decides_each_thing_once(saved):
    words, run_dir = saved
    assert run_ranks(2, _in_engine, [*words, "train.max_steps=3"]) == [ONCE, ONCE]
    assert [row["step"] for row in read_rows(run_dir) if "loss" in row][-1] == 3


def test_the_launcher_decides_and_its_processes_read_what_it_decided(saved, monkeypatch):
    words, run_dir = saved
    newest = committed(run_dir / "checkpoints")[0]
    workers: list[dict[str, int]] = []

    def start_workers(
        command: list[str], environments: list[dict[str, str]], *unused: object, **options: object
    ) -> Ended:
        workers.extend(run_ranks(2, _in_worker, environments))
        return Ended(0)

    monkeypatch.setattr(start, "run_local", start_workers)
    with counting() as seen:
        assert launch(compose([*words, "train.max_steps=4"])).code == 0
    assert dict(seen) == ONCE
    assert workers == [OF_A_WORKER, OF_A_WORKER]
    assert [row["step"] for row in read_rows(run_dir) if "loss" in row][-1] == 4
    written = json.loads((run_dir / "resolved.json").read_text())
    assert written["config"]["hardware"]["target"] == "cpu"
    assert [written["config"]["layout"][axis] for axis in MESH_AXES] == [1, 1, 2, 1, 1, 1]
    assert Path(written["resume_from"]).samefile(newest)


def _otherwise(world: Any, words: list[str], other: str) -> str:
    os.environ.update(world.environment())
    with pytest.raises(UserError) as caught:
        launch(compose([*words, other] if world.rank else words))
    return str(caught.value)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("optim.lr=0.25", "were not started alike\n  got:     rank 1: optim.lr=0.25 (rank 0: 0.003)"),
        ("hardware.precision=bf16", "do not have the same layout\n  got:     fsdp=2, "),
    ],
)
def test_a_process_that_was_started_otherwise_ends_the_job_on_all_of_them(tmp_path, other, said):
    words = small_overrides(tmp_path, *TINY, "layout.fsdp=2", "train.max_steps=2")
    told = run_ranks(2, _otherwise, words, other)
    assert [said in text for text in told] == [True, True], told
    assert not list((tmp_path / "runs").glob("*/*")), "nothing was written"
