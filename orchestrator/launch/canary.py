"""The handover check alone: whether a checkpoint's model computes here what it computed at the save.

Only the weights are loaded, and no data is needed: the checkpoint carries the batch. No torch in the launcher.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import stopping
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.reference import read_reference
from orchestrator.checkpoint.storage import locate
from orchestrator.config import registry
from orchestrator.config.compose import Composed
from orchestrator.config.schema import RunConfig
from orchestrator.config.validate import validate
from orchestrator.distributed.local_processes import run_local
from orchestrator.distributed.world import OWN_PREFIX, World, detect
from orchestrator.errors import MISTAKE, CheckpointError, ConfigErrors, RunFailedError, UserError
from orchestrator.hardware.target import Target
from orchestrator.hardware.target_table import device_count, find_world, job_devices, resolve
from orchestrator.runs import resume
from orchestrator.runs.messages import warn
from orchestrator.runs.own_parts import check_parts
from orchestrator.runs.stored_model import holds_model
from orchestrator.training.check import check_run
from orchestrator.training.resolved import Resolved, read_resolved, resolve_run, write_resolved

if TYPE_CHECKING:
    from orchestrator.strategies.parallel_strategy import ParallelStrategy

_RESULT = "result.json"
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
    target, hardware = resolve(config.hardware), config.hardware
    vocabulary = config.model.vocab_size
    assert isinstance(vocabulary, int), "the checkpoint has it"
    if world is None:
        devices = device_count(hardware, target, target.probe())
        check_run(config, devices)
        resolved, processes = resolve_run(config, target, devices, vocabulary), target.processes(devices)
        return _in_processes(
            resolved, checkpoint, [target.environment(hardware, rank, processes) for rank in range(processes)]
        )
    devices = job_devices(hardware, target, world)
    check_run(config, devices, slices=target.slices())
    for key, value in target.environment(hardware, world.local_rank, world.local_size).items():
        os.environ.setdefault(key, value)
    resolved = resolve_run(config, target, devices, vocabulary, here=max(1, devices // world.size) * world.local_size)
    result = _measure(resolved, target, world, checkpoint)
    return result if world.rank == 0 else None


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


def _in_processes(resolved: Resolved, checkpoint: Checkpoint, environments: list[dict[str, str]]) -> Result:
    """Measure with processes of this machine."""
    with tempfile.TemporaryDirectory(prefix="handover-") as name:
        folder = Path(name)
        write_resolved(folder, resolved)
        parts = {OWN_PREFIX + "PARTS": json.dumps(registry.permitted())}
        worker = [sys.executable, "-m", "orchestrator.launch.worker", "handover", name, str(checkpoint.directory)]
        ended = run_local(worker, [{**environment, **parts} for environment in environments])
        stopping.check()
        if ended.code == MISTAKE:
            raise UserError((folder / "error").read_text())
        if ended.code:
            got = "; ".join(ended.problems) or f"exit code {ended.code}"
            raise RunFailedError("the check was ended before it had a result", got=got, fix="see above")
        result: Result = json.loads((folder / _RESULT).read_text())
        return result


def _measure(resolved: Resolved, target: Target, world: World, checkpoint: Checkpoint) -> Result:
    """Be one process of the job, which measures."""
    from orchestrator.launch.run import quiet
    from orchestrator.training.job import make_strategy

    quiet(world.rank)
    parallel = make_strategy(resolved, target, world)
    parallel.join()
    try:
        return measure_checkpoint(resolved, parallel, checkpoint)
    finally:
        parallel.leave()


def measure_checkpoint(resolved: Resolved, parallel: ParallelStrategy, checkpoint: Checkpoint) -> Result:
    """Load the model of a checkpoint and check it, on a strategy that has joined the others.

    Args:
        resolved: the run.
        parallel: the strategy.
        checkpoint: the checkpoint to check.
    """
    from orchestrator.training.facts import provenance
    from orchestrator.training.handover_check import check_handover
    from orchestrator.training.placed_model import build_placed
    from orchestrator.training.restore import restore_weights

    model = build_placed(resolved.config, parallel)
    restore_weights(checkpoint, resolved.config, parallel, model, cast=False)
    result = check_handover(checkpoint, model, None, parallel, provenance(parallel))
    return {"checkpoint": str(checkpoint.directory), **result.to_dict()}


def check_worker(argv: list[str]) -> int:
    """Be one process of those that `run_check` started: `FOLDER CHECKPOINT`.

    Args:
        argv: the folder of the record, and the checkpoint.
    """
    folder, world = Path(argv[0]), detect(os.environ) or World()
    registry.permit(json.loads(os.environ.get(OWN_PREFIX + "PARTS", "[]")))
    try:
        resolved = read_resolved(folder)
        # Whoever chose it has looked at each file.
        result = _measure(resolved, resolved.target(), world, Checkpoint(locate(argv[1]), look=False))
    except UserError as error:
        # All ranks meet the same problem; one says so.
        if world.rank == 0:
            (folder / "error").write_text(str(error))
        return error.exit_code
    if world.rank == 0:
        (folder / _RESULT).write_text(json.dumps(result))
    return 0
