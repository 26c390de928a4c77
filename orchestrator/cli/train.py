"""`train`: compose the configuration and start the run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.config.compose import conf_dir, group_options, run_composed
from orchestrator.config.words import BASE
from orchestrator.distributed.world import LAUNCHED, detect, first_process
from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.config.compose import Composed
    from orchestrator.config.sweep import Scored
    from orchestrator.sweeps.sweep_record import SweepRecord

_HELP = """usage: python -m orchestrator train [group=option ...] [key=value ...] [flags]

Train a model. Without arguments: a small one on the built-in corpus, on the best hardware found.

Examples
  train hardware=cpu hardware.devices=4 layout.fsdp=2 layout.tensor=2 model=llama_20m
  train experiment=tiny_gpt optim.lr=1e-3 train.max_steps=200
  train resume=latest                     go on where the last run stopped (or: resume=DIRECTORY)
  train train.init_from=DIRECTORY         start from the weights of a checkpoint (checkpoint import makes one)
  train -m optim.lr=1e-3,3e-4             one run per value, and a table of what each reached (train.objective)
  train -m hydra/sweeper=optuna 'optim.lr=tag(log, interval(1e-4, 1e-2))'
                                          search: values by what the runs so far have reached, see docs/sweeps.md

Groups
{groups}

Flags
  --cfg job            print the whole configuration, with every key, and stop
  --config-dir DIR     options of your own: DIR/model/mine.yaml is then model=mine
  -m, --multirun       run every combination of comma-separated values
  --hydra-help         the flags of Hydra, which composes the configuration"""


def main(argv: list[str]) -> int:
    """Train the model that the Hydra words `argv` configure. Returns the exit code."""
    if any(word in ("-h", "--help") for word in argv):
        print(_help())
        return 0
    from orchestrator.runs.messages import doing

    if first_process() and sys.stderr.isatty() and not _FLAGS & {word.partition("=")[0] for word in argv}:
        # What follows imports much. In a log a mistake is better said alone.
        doing("reading the configuration", argv)
    from orchestrator.planner.planned_models import refuse_planned_only

    refuse_planned_only(argv, "train")
    _refuse_many_sweepers(argv)
    return run_composed(argv, "orchestrator train", _train, _keep)


def _refuse_many_sweepers(argv: list[str]) -> None:
    """Refuse a sweeper in each of the processes that an engine has started: each would choose other values."""
    chosen = [word for word in argv if word.startswith("hydra/sweeper=") and not word.endswith("=basic")]
    world = detect(os.environ)
    if chosen and world is not None and world.size > 1:
        raise ConfigError(
            "a sweeper starts the processes of its runs itself",
            got=f"{chosen[0]} in one of {world.size} processes of {world.engine}",
            fix="start it once; several such processes share a sweep (docs/sweeps.md)",
        )


def _keep(folder: Path, record: SweepRecord) -> None:
    from orchestrator.report.sweep_page import keep_sweep

    keep_sweep(folder, record)


def _train(composed: Composed) -> Scored:
    from orchestrator.launch.objective import start_and_score

    engine = composed.config.launch.name
    if engine != "local" and LAUNCHED not in os.environ and detect(os.environ) is None:
        raise ConfigError(
            "train trains here: it submits nothing",
            got=f"launch={engine}",
            fix=f"python -m orchestrator launch engine={engine} ... submits; leave out launch to train on this machine",
        )
    return start_and_score(composed)


# Of Hydra: something is printed, and no run started.
_FLAGS = {"--cfg", "-c", "--info", "-i", "--hydra-help", "--version", "-sc", "--shell-completion"}


def _help() -> str:
    groups = group_options([conf_dir()])
    width = max(map(len, groups))
    lines = [
        f"  {group:<{width}}  {', '.join(option for option in options if option != BASE)}"
        for group, options in groups.items()
    ]
    return _HELP.format(groups="\n".join(lines))
