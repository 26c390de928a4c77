"""Work on the model of a checkpoint: processes whose ranks have it placed, and what a function makes of it.

A verb opens a job (`open_job`) and runs one of `TASKS` in it. Where one process drives all devices that is this one,
which reads the terminal and writes on it; else processes of this machine, or those that an engine has started. All
ranks call the task together; what rank 0 returns comes back. No torch in the launcher.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.signing import trust
from orchestrator.checkpoint.storage import locate
from orchestrator.config import registry
from orchestrator.config.compose import Composed
from orchestrator.config.schema import RunConfig
from orchestrator.distributed.world import OWN_PREFIX, World, detect
from orchestrator.errors import (
    ConfigError,
    ConfigErrors,
    UserError,
)
from orchestrator.hardware.target import Target
from orchestrator.hardware.target_table import check_started, device_count, find_world, job_devices, resolve
from orchestrator.interop.imported_source import import_once, is_foreign
from orchestrator.launch.worker_processes import leave_error, run_workers
from orchestrator.runs import resume
from orchestrator.runs.messages import warn
from orchestrator.runs.stored_model import model_of, stored_config
from orchestrator.training.check import check_run
from orchestrator.training.layout_choice import Settled
from orchestrator.training.resolved import Resolved, read_resolved, resolve_run, write_resolved

if TYPE_CHECKING:
    from orchestrator.strategies.parallel_strategy import ParallelStrategy
    from orchestrator.strategies.served_model import ServedModel

TASKS = {
    "chat": "orchestrator.inference.chat_task:chat",
    "generate": "orchestrator.inference.generate_task:generate",
    "handover": "orchestrator.launch.canary:check_model",
    "evaluate": "orchestrator.evaluation.evaluate_job:evaluate_tasks",
    "loss": "orchestrator.evaluation.evaluate_job:evaluate_texts",
}
"""Name → function that all ranks call, as `task(served, arguments)`: a `ServedModel`, and what JSON carries.

What it returns is what JSON carries, too; that of rank 0 counts.
"""
MODEL = "model"
"""The kind of these processes, as `launch.worker` knows it."""

# What of a command line concerns a model that is not trained.
_KEYS = (
    *("hardware", "layout", "runs_dir", "hydra", "seed", "logger.progress", "checkpoint.dir"),
    *("checkpoint.trusted_keys", "checkpoint.require_signature", "checkpoint.verify_on_load"),
    "checkpoint.store_timeout_seconds",
)
_TASK, _RESULT = "task.json", "result.json"


@dataclass(frozen=True)
class ModelJob:
    """A checkpoint, and the devices that its model is to be on.

    Attributes:
        resolved: its model, with the hardware and the layout.
        checkpoint: opened.
        target: the hardware, looked at.
        world: this process among those of an engine; None where there is none.
        cast: weights that are stored in other bits are converted, and no error.
    """

    resolved: Resolved
    checkpoint: Checkpoint
    target: Target
    world: World | None
    cast: bool = True

    @property
    def speaks(self) -> bool:
        """Whether this is the process that talks to the user."""
        return self.world is None or self.world.rank == 0

    @property
    def processes(self) -> int:
        """Of the whole job."""
        return self.target.processes(self.resolved.devices) if self.world is None else self.world.size

    def run(self, task: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Start the processes, place the model, and call a task on all ranks.

        Args:
            task: a key of `TASKS`.
            arguments: that it gets; what JSON carries.

        Returns:
            What the task returned on rank 0; None in a process of an engine that is not the first.

        Raises:
            UserError: of the task, or as the processes do not meet, or one of them is lost.
        """
        if self.world is None and self.processes > 1:
            return self._in_processes(task, arguments or {})
        with self.served() as served:
            result = _call(task, served, arguments or {})
        return result if self.speaks else None

    @contextlib.contextmanager
    def served(self) -> Iterator[ServedModel]:
        """Be one process of the job: within it the others have been joined, and the model is placed."""
        from orchestrator.launch.run import joined

        world, hardware = self.world or World(), self.resolved.config.hardware
        # Before torch is imported, where most of these are read. What an engine set stays.
        own = self.target.environment(hardware, world.local_rank, world.local_size)
        os.environ.update(own if self.world is None else {key: os.environ.get(key, own[key]) for key in own})
        with joined(self.resolved, world, self.target) as (parallel, _):
            yield self._place(parallel)

    def _place(self, parallel: ParallelStrategy) -> ServedModel:
        from orchestrator.strategies.served_model import ServedModel
        from orchestrator.training.placed_model import build_placed
        from orchestrator.training.restore import open_together, restore_weights

        config = self.resolved.config
        trusted = trust(config.checkpoint.trusted_keys, config.checkpoint.require_signature)
        # Named `latest`, it may be another one in a process that looked a second later.
        place = locate(parallel.broadcast(str(self.checkpoint.directory)))
        source = open_together(place, trusted, parallel, self.checkpoint)
        model = build_placed(config, parallel)
        restore_weights(source, config, parallel, model, self.cast, trusted)
        model.eval()
        return ServedModel(model, parallel, source, config)

    def _in_processes(self, task: str, arguments: Mapping[str, Any]) -> Any:
        """Run a task in processes of this machine."""
        hardware, count = self.resolved.config.hardware, self.processes
        with tempfile.TemporaryDirectory(prefix="orchestrator-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            write_resolved(folder, self.resolved)
            about = {"task": task, "arguments": arguments, "cast": self.cast}
            (folder / _TASK).write_text(json.dumps({**about, "checkpoint": str(self.checkpoint.directory)}))
            parts = {OWN_PREFIX + "PARTS": json.dumps(registry.permitted())}
            environments = [{**self.target.environment(hardware, rank, count), **parts} for rank in range(count)]
            run_workers([MODEL, name], environments, folder, "the job")
            return json.loads((folder / _RESULT).read_text())


def open_job(composed: Composed, where: str, also: Collection[str] = ()) -> ModelJob:
    """Open the checkpoint that `where` names, for the hardware and the layout of a command line.

    What the checkpoint's own run was trained on says nothing here: without a word on it, its model is on the devices
    that are found, divided among them by fsdp.

    Args:
        composed: the command line.
        where: `latest`, or a path or URL, as for a resume; or a Hugging Face directory, which is imported once.
        also: keys or groups of the configuration that the verb reads beside hardware, layout and their like.

    Raises:
        ConfigError: the command line has keys that mean nothing here.
        CheckpointError: there is no such checkpoint, it holds no model, or it is damaged or not trusted.
        LayoutError: the layout does not fit the devices or the model.
        HardwareError: the hardware is not here.
    """
    check_words(composed, also)
    asked = composed.config
    world = find_world(asked.hardware, os.environ)
    verify = asked.checkpoint.verify_on_load and (world is None or world.rank == 0)
    if is_foreign(where):
        where = str(import_once(where, asked.runs_dir, say=world is None or world.rank == 0))
    point = resume.find(where, asked.runs_dir, verify, warn, asked.checkpoint)
    saved = stored_config(point.checkpoint)
    train = replace(asked.train, loss_chunk_tokens=saved.train.loss_chunk_tokens, micro_batch_size="auto", remat="none")
    model = model_of(point.checkpoint)
    return plan_job(replace(asked, model=model, train=train), point.checkpoint, trained=False)


def check_words(composed: Composed, also: Collection[str] = ()) -> None:
    """Refuse keys of a command line that mean nothing for a model that is not trained.

    Args:
        composed: the command line.
        also: keys or groups that the verb reads, too.

    Raises:
        ConfigErrors: each of them.
    """
    known = (*_KEYS, *also)
    wrong = [key for key in composed.overrides if not any(key == one or key.startswith(f"{one}.") for one in known)]
    if wrong:
        allowed = ", ".join(key for key in known if key != "hydra")
        fix = "leave it out: the model is the checkpoint's, and nothing is trained"
        raise ConfigErrors([ConfigError(f"'{key}' means nothing here", allowed=allowed, fix=fix) for key in wrong])


def plan_job(config: RunConfig, checkpoint: Checkpoint, *, trained: bool = True, cast: bool = True) -> ModelJob:
    """Decide on which devices the model of a checkpoint is to be, and how it is divided.

    Args:
        config: with the model of the checkpoint, whose vocabulary is known.
        checkpoint: opened.
        trained: `config.train` is that of a training; else it is made to fit the devices.
        cast: weights that are stored in other bits are converted, and no error.

    Raises:
        UserError: as `open_job`.
    """
    target, hardware = resolve(config.hardware), config.hardware
    world = find_world(hardware, os.environ)
    if world is None:
        here = devices = device_count(hardware, target, target.probe())
    else:
        check_started(hardware, target, world)
        devices = job_devices(hardware, target, world)
        here = max(1, devices // world.size) * world.local_size
    settled = None
    if not trained:
        # A step that any layout of so many devices divides: none is made, and no memory for one is planned.
        length = 2 * devices
        train = replace(config.train, seq_len=length, global_batch_tokens=length * length)
        config = replace(config, train=train)
        settled = Settled(config.layout, "auto", "none")
    vocabulary = config.model.vocab_size
    assert isinstance(vocabulary, int), "the checkpoint has it"
    check_run(config, devices, slices=target.slices(), strategy=target.strategy)
    resolved = resolve_run(config, target, devices, vocabulary, here=here, settled=settled)
    return ModelJob(resolved, checkpoint, target, world, cast)


def _call(task: str, served: ServedModel, arguments: Mapping[str, Any]) -> Any:
    module, _, name = TASKS[task].partition(":")
    return getattr(importlib.import_module(module), name)(served, arguments)


def model_worker(argv: list[str]) -> int:
    """Be one process of those that `ModelJob.run` started.

    Args:
        argv: the folder of the job.

    Returns:
        The exit code.
    """
    folder, world = Path(argv[0]), detect(os.environ) or World()
    # What of the configuration is the user's own code no file may say.
    registry.permit(json.loads(os.environ.get(OWN_PREFIX + "PARTS", "[]")))
    try:
        resolved, about = read_resolved(folder), json.loads((folder / _TASK).read_text())
        # Whoever chose it has looked at each file.
        checkpoint = Checkpoint(locate(about["checkpoint"]), look=False)
        with ModelJob(resolved, checkpoint, resolved.target(), world, about["cast"]).served() as served:
            result = _call(about["task"], served, about["arguments"])
    except UserError as error:
        return leave_error(folder, world.rank, error)
    if world.rank == 0:
        (folder / _RESULT).write_text(json.dumps(result))
    return 0
