"""One plan and one host's part for all tests: two processes of a CPU, one layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.certify.fixture import WORDS, with_layout
from orchestrator.config.compose import compose
from orchestrator.distributed.world import World
from orchestrator.hardware.target_table import resolve
from orchestrator.launch.certifier import AFTER, BEFORE, RESULT, host_work, work
from orchestrator.sharding.layout import Layout
from orchestrator.training.resolved import Resolved, resolve_run
from tests.lab.ranks import run_ranks

LAYOUT = Layout(fsdp=2)


def resolved_for(layout: Layout) -> Resolved:
    words = [*WORDS, "hardware=cpu", f"hardware.devices={layout.devices}", "hardware.threads=1"]
    config = with_layout(compose([*words, "hardware.precision=fp32"]).config, layout)
    return resolve_run(config, resolve(config.hardware), layout.devices, 256)


def in_host(world: World, data: dict[str, Any], part: str, folder: Path) -> None:
    host_work(Resolved.from_dict(data), part, [LAYOUT], folder)


def in_rank(world: World, data: dict[str, Any], folder: Path, wanted: list[str] | None, fault: Any) -> None:
    """Go through cases in one forked rank, with something wrong in it."""
    if fault is not None:
        fault(world)
    resolved = Resolved.from_dict(data)
    work(resolved, world, resolved.target(), [LAYOUT], folder, wanted=None if wanted is None else frozenset(wanted))


class Site:
    """A folder with the host's results, in which cases are run as often as one likes."""

    def __init__(self, folder: Path):
        self.folder, self.resolved = folder, resolved_for(LAYOUT).to_dict()
        run_ranks(1, in_host, self.resolved, BEFORE, folder)

    def run(self, wanted: list[str] | None = None, fault: Any = None) -> dict[str, Any]:
        import json

        run_ranks(2, in_rank, self.resolved, self.folder, wanted, fault)
        return json.loads((self.folder / RESULT).read_text())

    def after(self) -> None:
        run_ranks(1, in_host, self.resolved, AFTER, self.folder)


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Site:
    return Site(tmp_path_factory.mktemp("certify"))
