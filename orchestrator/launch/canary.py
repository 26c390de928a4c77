"""The handover check alone: whether a checkpoint's model computes here what it computed at the save.

Only the weights are loaded, and no data is needed: the checkpoint carries the batch. No torch in the launcher.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.reference import read_reference
from orchestrator.config.compose import Composed
from orchestrator.config.schema import RunConfig
from orchestrator.config.validate import validate
from orchestrator.errors import CheckpointError, ConfigErrors
from orchestrator.hardware.target_table import find_world
from orchestrator.launch.model_job import plan_job
from orchestrator.runs import resume
from orchestrator.runs.messages import warn
from orchestrator.runs.own_parts import check_parts
from orchestrator.runs.stored_model import holds_model

if TYPE_CHECKING:
    from orchestrator.strategies.served_model import ServedModel

Result = dict[str, Any]
"""As `Handover.to_dict`, with `checkpoint`, the directory."""


def run_check(composed: Composed, where: str) -> Result | None:
    """Check the checkpoint that `where` names (as for a resume) with the hardware and the layout of `composed`.

    Returns:
        What was found; None in a process of `torchrun` or Slurm that is not the first.

    Raises:
        UserError: the checkpoint cannot be read or carries no reference, or does not fit the hardware or the layout.
    """
    world = find_world(composed.config.hardware, os.environ)
    config, checkpoint = _find(composed, where, verify=world is None or world.rank == 0)
    result: Result | None = plan_job(config, checkpoint, cast=False).run("handover")
    return result


def _find(composed: Composed, where: str, verify: bool) -> tuple[RunConfig, Checkpoint]:
    """Return the checkpoint that `where` names, and its run's configuration with what the command line asks for."""
    asked = composed.config
    check = verify and asked.checkpoint.verify_on_load

    point = resume.find(where, asked.runs_dir, check, warn, asked.checkpoint)
    config = resume.merge(point, composed, warn)
    if problems := validate(config):
        raise ConfigErrors(problems)
    check_parts(config)
    checkpoint = point.checkpoint
    if read_reference(checkpoint) is None:
        raise CheckpointError(
            "the checkpoint carries no reference batch to compare with",
            got=point.directory,
            fix="save it again with checkpoint.handover.enabled=true",
        )
    return replace(config, model=holds_model(checkpoint, config.model)), checkpoint


def check_model(served: ServedModel, arguments: Mapping[str, Any]) -> Result:
    """Check the model of a checkpoint: a task of `launch.model_job`, which all ranks call together.

    Args:
        served: the model, its bits as they are stored.
        arguments: none.
    """
    from orchestrator.training.facts import provenance
    from orchestrator.training.handover_check import check_handover

    here = provenance(served.parallel)
    result = check_handover(served.checkpoint, served.model, None, served.parallel, here)
    return {"checkpoint": str(served.checkpoint.directory), **result.to_dict()}
