"""The command line of each island of a run: `train` with the run's own words, and those of the island."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoint.storage import AnyPath, there
from orchestrator.config.as_words import as_words, value_word
from orchestrator.config.schema import IslandConfig, RunConfig
from orchestrator.errors import ConfigError
from orchestrator.sharding.axes import MESH_AXES

FOLDER = "islands"
"""Of the islands' own run directories, in that of the run; and in its checkpoints of theirs."""
# What an island is told otherwise, or has of its own.
_OTHERWISE = (
    *("islands.members", "islands.bind", "islands.schedule", "islands.name", "islands.key_file"),
    *("name", "run_id", "runs_dir", "resume", "hardware.target", "checkpoint.dir"),
)


@dataclass(frozen=True)
class Joining:
    """Where an island joins.

    Attributes:
        address: of the hub.
        key_file: of the key that all share.
        run_dir: of the run.
        checkpoint: that the run goes on from; None: it begins.
    """

    address: str
    key_file: Path
    run_dir: Path
    checkpoint: AnyPath | None = None


def island_command(config: RunConfig, name: str, member: IslandConfig, joining: Joining) -> list[str]:
    """Return the command that starts a local island.

    Args:
        config: of the run.
        name: of the island.
        member: its entry of `islands.members`.
        joining: where it joins.

    Raises:
        ConfigError: its interpreter is not there.
    """
    return [_interpreter(name, member), "-m", "orchestrator", "train", *island_words(config, name, member, joining)]


def island_words(config: RunConfig, name: str, member: IslandConfig, joining: Joining) -> list[str]:
    """Return the words of an island, from which its configuration is composed.

    Args:
        config: of the run.
        name: of the island.
        member: its entry of `islands.members`.
        joining: where it joins.
    """
    # Also what is auto: an island that goes on elsewhere would keep the layout of its save.
    layout = {axis: getattr(config.layout, axis) for axis in MESH_AXES} | dict(member.layout)
    own = {f"layout.{key}": value for key, value in layout.items()}
    own["hardware.devices"] = config.hardware.devices if member.devices == "auto" else member.devices
    joins = {"islands.join": joining.address, "islands.island": name, "islands.key_file": str(joining.key_file)}
    place = {"runs_dir": str(joining.run_dir), "name": FOLDER, "run_id": name, "resume": _resume(name, joining)}
    words = [word for word in as_words(config, _OTHERWISE) if word.partition("=")[0] not in own]
    told = [f"{key}={value_word(value)}" for key, value in {**own, **joins, **place}.items()]
    return [f"hardware={member.hardware}", *words, *told, *member.overrides]


def _resume(name: str, joining: Joining) -> str:
    """Return where an island goes on: its newest save, or, where that is not here, what the run's checkpoint has."""
    own = joining.run_dir / FOLDER / name / "checkpoints"
    if joining.checkpoint is None or any(own.glob("step-*")):
        return "auto"
    stored = joining.checkpoint / FOLDER / name
    return str(stored) if there(stored) else "auto"


def _interpreter(name: str, member: IslandConfig) -> str:
    if member.python is None:
        return sys.executable
    # Of a virtual environment the name of the link says which one it is: it is not resolved.
    found = shutil.which(str(Path(member.python).expanduser()))
    if found is None:
        raise ConfigError(
            "the interpreter of an island is not there",
            got=f"python: {member.python} of the island {name}",
            allowed="a path such as .venv-xla/bin/python, or a name on PATH",
            fix="make that environment (scripts/setup xla makes .venv-xla), or leave out python",
        )
    return str(Path(found).absolute())


def tail(path: Path, lines: int = 20) -> Sequence[str]:
    """Return the last lines of an island's output.

    Args:
        path: of the file.
        lines: how many.
    """
    try:
        return path.read_text(errors="replace").splitlines()[-lines:]
    except OSError:
        return ()
