"""Starting a run: everything is settled and checked once, then the processes are started. No torch here."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import sys
import tempfile
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.hashing import new_hash
from orchestrator.checkpoint.run_checkpoints import committed, newest_valid, remove_uncommitted, step_of
from orchestrator.checkpoint.signing import signer, trust
from orchestrator.checkpoint.storage import AnyPath, locate
from orchestrator.checkpoint.store_timeouts import wait_for_stores
from orchestrator.config import registry
from orchestrator.config.compose import Composed
from orchestrator.config.convert import from_dict
from orchestrator.config.paths import absolute
from orchestrator.config.schema import RunConfig
from orchestrator.config.validate import validate
from orchestrator.data.prepare import prepare
from orchestrator.data.validation import check_data
from orchestrator.distributed.local_processes import Ended, run_local
from orchestrator.distributed.world import OWN_PREFIX, World
from orchestrator.errors import (
    DONE,
    FAILED,
    STOPPED,
    CheckpointError,
    ConfigError,
    ConfigErrors,
    DamagedError,
    LostPeerError,
    UserError,
    error_from_dict,
)
from orchestrator.hardware.target import Target
from orchestrator.hardware.target_table import device_count, find_world, job_devices, resolve
from orchestrator.installing import importable
from orchestrator.launch import changes
from orchestrator.launch.run import ERRORS
from orchestrator.output import Stream, relay, tell
from orchestrator.runs import identity, init_from, listing, resume, run_directory
from orchestrator.runs.messages import doing, say, warn
from orchestrator.runs.own_parts import check_parts
from orchestrator.runs.run_directory import RunPaths
from orchestrator.runs.stored_model import holds_model
from orchestrator.training.check import check_run
from orchestrator.training.layout_choice import precision_of, settle_layout
from orchestrator.training.memory_check import check_memory

if TYPE_CHECKING:
    from orchestrator.strategies.parallel_strategy import ParallelStrategy

_LINES_KEPT = 20  # of what failed processes printed last, for the error


@dataclass(frozen=True)
class Plan:
    """What all processes must agree on.

    Attributes:
        run_dir: to go on in; None for a new one.
        name: of the new run directory, by which a restarted job finds it; None to name it by the time.
        uuid: of the run, where it began in another place.
        patient: wait for an earlier process of the same job to end.
        finished: why there is nothing left to do.
        words: what the run was composed from, for the record; None: the command line.
    """

    config: RunConfig
    resume_from: AnyPath | None = None
    run_dir: Path | None = None
    name: str | None = None
    uuid: str | None = None
    patient: bool = False
    finished: str | None = None
    words: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Outcome:
    """What has become of a run that was started.

    Attributes:
        code: the exit code, one of those of `errors`.
        run_dir: of the run; it is gone where nothing was trained. None where there was nothing to start.
        finished: why there was nothing to start.
        error: what a process of the run has left as its reason to fail, if they were asked to (`captured`).
        problems: a line for each process that was lost.
        last_lines: of what the processes printed on standard error, if that was captured.
    """

    code: int
    run_dir: Path | None = None
    finished: str | None = None
    error: UserError | None = None
    problems: tuple[str, ...] = ()
    last_lines: tuple[str, ...] = ()


def launch(composed: Composed, captured: bool = False) -> Outcome:
    """Train as `composed` says, in processes of this machine or as one of those that an engine has started.

    Args:
        captured: the processes print nothing, nor does this one: their lines go to the logger, and their errors come
            back.

    Raises:
        UserError: what is wrong, before anything was started or written; in a process of an engine at any time.
        Stopped: in a process of an engine: a signal came before the first step.
    """
    world = find_world(composed.config.hardware, os.environ)
    main = world is None or world.rank == 0
    wait_for_stores(composed.config.checkpoint.store_timeout_seconds)
    plan = replace(_settle(composed, main=main, alone=world is None), words=composed.words)
    check_parts(plan.config)
    if plan.finished is not None:
        if main:
            say(plan.finished)
        return Outcome(DONE, plan.run_dir, plan.finished)
    return _start_local(plan, captured) if world is None else _join_external(plan, world)


def _settle(composed: Composed, main: bool, alone: bool) -> Plan:
    config = composed.config
    check = main and config.checkpoint.verify_on_load
    if config.resume is None:
        if config.run_id is not None and main:
            _refuse_taken(run_directory.named(config, config.run_id))
        return _new(composed, check, main, config.run_id)
    if "train.init_from" in composed.overrides and config.resume != resume.AUTO:
        raise ConfigError(
            "a resumed run has its weights",
            got=f"resume={config.resume} and train.init_from={config.train.init_from}",
            fix="leave out one of them",
        )
    if config.resume != resume.AUTO:
        point = resume.find(config.resume, config.runs_dir, check, warn, config.checkpoint, listing.wanted_by(composed))
        return _going_on(composed, point, config.run_id, check, main, alone)
    name = identity.name_of(config, composed.job)
    own, run_dir = resume.find_own(composed, name, check, warn)
    if main:
        goes_on = f"goes on from {own.checkpoint.name}" if own else "starts: it has no checkpoint yet"
        tell(f"run        {run_dir} {goes_on}")
    if own is None:
        return replace(_new(composed, check, main, name), patient=True)
    return replace(_going_on(composed, own, name, check, main, alone), patient=True)


def _refuse_taken(run_dir: Path) -> None:
    if run_dir.exists() and not listing.is_empty(run_dir):
        raise ConfigError(
            "there is a run of this run_id already",
            got=run_dir,
            fix="resume=auto goes on with it; or give another run_id",
        )


def _new(composed: Composed, check: bool, main: bool, name: str | None) -> Plan:
    started = absolute(init_from.settle(composed, check, warn))
    _check_places(started, signs=main)
    return Plan(started, name=name)


def _going_on(
    composed: Composed, point: resume.ResumePoint, name: str | None, check: bool, main: bool, alone: bool
) -> Plan:
    """Go on from a checkpoint: in its run's directory, or in a new one called `name`."""
    merged = absolute(resume.merge(point, composed, warn))
    if point.run_dir is None:
        # What branches off is another run, and so is not found by the name of the one that it comes from.
        merged = replace(merged, run_id=composed.config.run_id)
    if problems := validate(merged):
        raise ConfigErrors(problems)
    _check_places(merged, signs=main)
    checkpoint = Checkpoint(point.checkpoint)
    state = checkpoint.state()
    if "data" not in state:
        raise CheckpointError(
            "the checkpoint holds weights alone: there is no run in it to resume",
            got=point.checkpoint,
            fix=f"start a new run from its weights: train.init_from={point.checkpoint}",
        )
    holds_model(checkpoint, merged.model)
    step = checkpoint.step
    _check_changes(from_dict(RunConfig, point.saved), merged, state, step, main)
    plan = Plan(merged, point.checkpoint, point.run_dir, name, _moved(point, state.get("run"), merged.runs_dir))
    if step < merged.train.max_steps or (point.run_dir and run_directory.read_run(point.run_dir).get("left_out")):
        return plan
    if alone and check and (older := _before_damaged(point.checkpoint, merged)):
        return replace(plan, resume_from=older)
    done = f"step {step} of train.max_steps={merged.train.max_steps} in {point.checkpoint}"
    if composed.config.resume == resume.AUTO:
        return replace(plan, finished=f"finished   the run has all its steps: {done}")
    longer = f"set train.max_steps to more than {step} to train on"
    if merged.optim.schedule.kind != "constant":
        longer += ", and 'resume_allow=[schedule]': the schedule ends there"
    raise CheckpointError("the run is finished: there are no steps left to train", got=done, fix=longer)


def _check_changes(saved: RunConfig, merged: RunConfig, state: Mapping[str, Any], step: int, main: bool) -> None:
    """Tell what the resumed run does otherwise than the saved one, and refuse what is not allowed."""
    found = changes.changes(saved, merged, step)
    target = resolve(merged.hardware)
    if change := changes.precision_change(state.get("precision"), precision_of(merged, target)):
        found.append(change)
    for change in found if main else []:
        tell(f"changed    {change}")
    changes.check(found, merged.resume_allow)


def _moved(point: resume.ResumePoint, uuid: object, runs_dir: str) -> str | None:
    """Return the uuid of the checkpoint's run, where the run goes on here and its directory was left elsewhere."""
    if point.run_dir is not None or not point.newest or not identity.is_uuid(uuid):
        return None
    return None if listing.with_uuid(Path(runs_dir), str(uuid)) else str(uuid)


def _before_damaged(last: AnyPath, config: RunConfig) -> AnyPath | None:
    """An older checkpoint, where the last one of a finished run is damaged: what that held is trained again."""
    if config.resume is None or resume.is_checkpoint(config.resume):
        return None
    try:
        Checkpoint(last).verify()
        return None
    except DamagedError as error:
        warn(f"skipping {last}: {error}")
    trusted = trust(config.checkpoint.trusted_keys, config.checkpoint.require_signature)
    return newest_valid(last.parent, True, warn, trusted, before=last)


def _check_places(config: RunConfig, signs: bool) -> None:
    """Libraries and keys that the first save would miss; the signing key only where the manifest is written."""
    if config.checkpoint.dir != "auto":
        locate(config.checkpoint.dir)
    if config.checkpoint.signing_key and signs:
        signer(config.checkpoint.signing_key)
    new_hash(config.checkpoint.hash)
    trust(config.checkpoint.trusted_keys, config.checkpoint.require_signature)


class _Capture:
    """What the processes of a run print and report, kept from the terminal."""

    def __init__(self, folder: str):
        self._folder = Path(folder)
        self._last: deque[str] = deque(maxlen=_LINES_KEPT)

    def hear(self, line: str, stream: Stream) -> None:
        if line.strip():
            relay(line, stream)
            if stream == "stderr":
                self._last.append(line)

    def variables(self) -> dict[str, str]:
        return {OWN_PREFIX + ERRORS: str(self._folder)}

    def outcome(self, ended: Ended, run_dir: Path) -> Outcome:
        found = [error_from_dict(json.loads(path.read_text())) for path in sorted(self._folder.glob("*.json"))]
        # Who lost another process knows less than that process.
        found.sort(key=lambda error: isinstance(error, LostPeerError))
        error = found[0] if found else None
        return Outcome(ended.code, run_dir, None, error, ended.problems, tuple(self._last))


def _start_local(plan: Plan, captured: bool) -> Outcome:
    """Start one process per device of this machine."""
    config = plan.config
    target = resolve(config.hardware)
    devices = device_count(config.hardware, target, target.probe())
    planned = _planned(config, target, devices, main=True)
    check_run(planned, devices)
    doing("preparing the data", config)
    vocab_size = _check_data(planned, devices, progress=True)
    check_memory(planned, target, devices, target.processes(devices), vocab_size)
    with contextlib.ExitStack() as held:
        place = _open_run(plan, held)
        common, processes = _variables(place), target.processes(devices)
        environments = [{**target.environment(config.hardware, rank, processes), **common} for rank in range(processes)]
        doing(f"starting {processes} process{'es' if processes > 1 else ''}", config)
        command = [sys.executable, "-m", "orchestrator.launch.worker", "train"]
        if not captured:
            ended = run_local(command, environments)
            _conclude(ended, place)
            return Outcome(ended.code, place.run_dir, problems=ended.problems)
        capture = _Capture(held.enter_context(tempfile.TemporaryDirectory(prefix="orchestrator-")))
        environments = [{**environment, **importable(), **capture.variables()} for environment in environments]
        ended = run_local(command, environments, capture.hear, announce=False)
        _conclude(ended, place)
        return capture.outcome(ended, place.run_dir.absolute())


def _conclude(ended: Ended, place: RunPaths) -> None:
    """What processes that were ended could not say: what has become of the run, and how it goes on."""
    step = ended.step
    if ended.code in STOPPED and "status" not in run_directory.read_run(place.run_dir):
        tell("stopped    before the first step: there is nothing to save")
    elif ended.code == FAILED or ended.problems:
        for problem in ended.problems:
            if ended.code in STOPPED:
                tell(f"stopped    {problem}")
            else:
                tell(problem, level=logging.ERROR)
        try:
            newest = committed(place.checkpoints)
        except CheckpointError as error:  # a store that has gone; the exit code is that of the run
            newest = []
            tell(f"checkpoint unknown: {error.what}")
        else:
            tell(f"checkpoint {newest[0] if newest else 'none was saved: the run begins again'}")
        if newest:
            tell(f"continue   python -m orchestrator train resume={place.run_dir}")
            # A process may be killed after its save and before it says that it is alive again.
            step = max(step or 0, step_of(newest[0]))
    if ended.code:
        run_directory.mark_ended(place.run_dir, "interrupted" if ended.code in STOPPED else "failed", step)


def _join_external(plan: Plan, world: World) -> Outcome:
    """Be one of the processes that torchrun, Slurm or the user has started, on TPUs one per host."""
    target = resolve(plan.config.hardware)
    devices, slices = job_devices(plan.config.hardware, target, world), target.slices()
    planned = _planned(plan.config, target, devices, main=world.rank == 0)
    check_run(planned, devices, slices=slices)
    # Before torch is imported, where most of these are read. What the engine set stays.
    for key, value in target.environment(plan.config.hardware, world.local_rank, world.local_size).items():
        os.environ.setdefault(key, value)
    if world.rank == 0:
        doing("preparing the data", planned)
    vocab_size = _check_data(planned, devices, progress=world.local_rank == 0, slices=slices)
    check_memory(planned, target, devices, world.local_size, vocab_size)

    from orchestrator.launch.run import work

    places = []

    def settle(parallel: ParallelStrategy) -> RunPaths:
        places.append(_agree(plan, parallel, held))
        return places[0]

    with contextlib.ExitStack() as held:
        code = work(plan.config, world, settle)
    return Outcome(code, places[0].run_dir.absolute())


def _planned(config: RunConfig, target: Target, devices: int, main: bool) -> RunConfig:
    """The configuration with the layout that the run will have. The run keeps its own: other devices, other plans."""
    settled = settle_layout(config, target, devices)
    if settled.why and main:
        tell(f"layout     {settled.why}")
    return replace(config, layout=settled.layout)


def _check_data(config: RunConfig, devices: int, progress: bool, slices: int = 1) -> int:
    """Check the data against the configuration; returns the tokens of its tokenizer."""
    data = prepare(config.data, progress=progress, verify=progress)
    warnings = check_data(config, data)
    if progress:
        for text in warnings:
            warn(text)
    init_from.check_tokenizer(config, data.tokenizer, warn if progress else lambda text: None)
    check_run(config, devices, data.vocab_size, slices)
    return data.vocab_size


def _agree(plan: Plan, parallel: ParallelStrategy, held: contextlib.ExitStack) -> RunPaths:
    """Open the run directory on rank 0, which tells the others."""
    text = ""
    if parallel.rank == 0:
        place = _open_run(plan, held)
        text = json.dumps([str(place.run_dir), str(place.checkpoints), str(place.resume_from or "")])
    run_dir, checkpoints, resume_from = json.loads(parallel.broadcast(text))
    return RunPaths(Path(run_dir), locate(checkpoints), locate(resume_from) if resume_from else None)


def _open_run(plan: Plan, held: contextlib.ExitStack) -> RunPaths:
    """Make what the run is kept in and hold it for this process.

    Raises:
        UserError: it cannot be written, or another process holds it.
    """
    run_dir = _from_here(plan.run_dir or run_directory.create(plan.config, plan.name))
    if plan.run_dir is None and plan.name is None:
        # No other process knows of it, so it may go where not even a lock can be made.
        held.callback(listing.discard_empty, run_dir)
    with run_directory.writing(run_dir):
        return _hold_run(plan, run_dir, held)


def _hold_run(plan: Plan, run_dir: Path, held: contextlib.ExitStack) -> RunPaths:
    held.enter_context(run_directory.lock(run_dir, patient=plan.patient))
    # However this ends, a run directory in which nothing was trained does not stay. Only under the lock: until its
    # first step the run of another process looks like that, too.
    held.callback(listing.discard_empty, run_dir)
    if plan.run_dir is None and plan.uuid is not None:
        identity.adopt_uuid(run_dir, plan.uuid)
    if plan.run_dir is None and plan.resume_from is not None:
        run_directory.adopt_history(run_dir, Checkpoint(plan.resume_from))
    checkpoints = run_directory.checkpoints_dir(run_dir, plan.config)
    if plan.config.checkpoint.dir != "auto":
        held.enter_context(run_directory.hold(checkpoints, run_dir, plan.name))
    words = sys.argv[1:] if plan.words is None else plan.words
    facts = {"id": identity.uuid_of(run_dir), "run_id": plan.name, "command": shlex.join(words)}
    run_directory.write_run(run_dir, {**run_directory.read_run(run_dir), **facts})
    run_directory.write_config(run_dir, plan.config)
    remove_uncommitted(checkpoints)
    return RunPaths(run_dir, checkpoints, plan.resume_from)


def _from_here(path: Path) -> Path:
    """Return a path as a person would write it, who is in this folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _variables(place: RunPaths) -> dict[str, str]:
    paths = {"RUN_DIR": place.run_dir, "CHECKPOINTS_DIR": place.checkpoints, "RESUME": place.resume_from or ""}
    # The workers read the run's configuration from its directory; what of it is the user's, they are told here.
    parts = {OWN_PREFIX + "PARTS": json.dumps(registry.permitted())}
    return {**{OWN_PREFIX + name: str(path) for name, path in paths.items()}, **parts}
