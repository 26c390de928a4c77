"""Runs on the test double of a vendor's device (`tests.lab.fake_device`), on forked ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.distributed.world import World
from orchestrator.hardware.native_chip import NativeChipTarget
from orchestrator.hardware.target import Probe
from tests.lab.ranks import run_ranks

# Words of the command line → device type and process group.
CHIPS = {
    "neuron": (["hardware=trainium"], "neuron", "neuron"),
    "tpu": (["hardware=tpu", "hardware.runtime=torch_tpu"], "tpu", "tpu_dist"),
}


def train_on(chip: str, config: RunConfig, size: int, run_dir: Path, resume_from: Path | None = None) -> list[dict]:
    """Train on `size` ranks, each with a made-up device of its own; returns what each of them called."""
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_ranks(size, _work, chip, to_dict(config), run_dir, resume_from, clean=True)


def on_chip(chip: str, size: int) -> Any:
    """Make this process believe that its host has `size` devices of that kind, and their library."""
    from tests.lab import fake_device

    _, device, group = CHIPS[chip]
    found = Probe("made up", True, size, (f"made-up {chip}",) * size, None, {})
    NativeChipTarget._look = lambda self: found  # type: ignore[method-assign]
    return fake_device.install(device, group)


def _work(world: World, chip: str, data: dict[str, Any], run_dir: Path, resume_from: Path | None) -> dict[str, int]:
    from orchestrator.launch.run import work
    from tests.lab import fake_device
    from tests.lab.runs import resolved_run

    on_chip(chip, world.size)
    code = work(resolved_run(from_dict(RunConfig, data), world, run_dir, resume_from), world)
    assert code == 0
    return dict(fake_device.calls)
