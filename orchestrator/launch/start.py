"""Start a run: resolve and check everything once, then start the processes. No torch here."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.checkpoint.run_checkpoints import remove_uncommitted
from orchestrator.checkpoint.store_timeouts import wait_for_stores
from orchestrator.config import registry
from orchestrator.config.compose import Composed
from orchestrator.data.prepare import prepare
from orchestrator.data.validation import check_data
from orchestrator.distributed.exchange import exchange, new_topic
from orchestrator.distributed.job_host import job_host
from orchestrator.distributed.local_processes import Supervision, run_local
from orchestrator.distributed.process_template import ProcessTemplate
from orchestrator.distributed.world import OWN_PREFIX, World
from orchestrator.errors import DONE, ConfigError, MovedOnError, UserError
from orchestrator.hardware.target import Target
from orchestrator.hardware.target_table import check_started, device_count, find_world, job_devices
from orchestrator.installing import importable
from orchestrator.launch.failure_notes import FOLDER, first_error, read_notes
from orchestrator.launch.group_launcher import check_groups, start_groups
from orchestrator.launch.islands import check_islands_here, prepared_facts, run_islands
from orchestrator.launch.plan import Plan, find_plan
from orchestrator.launch.run import RUN_DIR, Opened, joined, train
from orchestrator.launch.several_hosts import processes_here, start_processes
from orchestrator.launch.supervise import Finished, Supervisor
from orchestrator.output import Stream, relay, tell
from orchestrator.runs import identity, init_from, listing, resume, run_directory, time_book
from orchestrator.runs.attempts import note_last
from orchestrator.runs.messages import doing, say, warn
from orchestrator.runs.moved_run import catch_up
from orchestrator.runs.own_parts import check_parts
from orchestrator.runs.run_directory import RunPaths
from orchestrator.training.check import check_run
from orchestrator.training.layout_choice import settle_layout
from orchestrator.training.memory_check import check_memory
from orchestrator.training.resolved import Resolved, resolve_run, write_resolved

if TYPE_CHECKING:
    from orchestrator.strategies.parallel_strategy import ParallelStrategy

_LINES_KEPT = 20  # of what failed processes printed last, for the error
_SHOWN = 4  # processes that were started otherwise


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


def launch(composed: Composed, captured: bool = False, began: float | None = None) -> Outcome:
    """Train as `composed` says, in processes of this machine or as one of those that an engine has started.

    Args:
        composed: the configuration of this command line.
        captured: the processes print nothing, nor does this one: their lines go to the logger, and their errors come
            back.
        began: when this start began, for the time book, in seconds since the epoch; None: now.

    Raises:
        UserError: what is wrong, before anything was started or written; in a process of an engine at any time.
        Stopped: in a process of an engine: a signal came before the first step.
    """
    world = find_world(composed.config.hardware, os.environ)
    host = job_host(os.environ) if world is None else None
    main = world.rank == 0 if world else host is None or host.number == 0
    wait_for_stores(composed.config.checkpoint.store_timeout_seconds)
    began = time.time() if began is None else began
    while True:
        plan = find_plan(composed, main=main, alone=world is None and host is None)
        plan = replace(plan, words=composed.words, began=began)
        check_parts(plan.config)
        check_groups(plan.config, own_launcher=world is None and host is None)
        islands = check_islands_here(plan.config, world is None and host is None, composed.overrides)
        if plan.finished is not None:
            if main:
                say(plan.finished)
            return Outcome(DONE, plan.run_dir, plan.finished)
        if host is not None:
            processes = processes_here(plan)
            if processes > 1:
                ended = start_processes(host, processes, _words(plan), sweep=composed.job is not None)
                return Outcome(ended.code, problems=ended.problems)
            world = host.world(0, 1)
            os.environ.update(world.environment())  # as of every process that somebody has started
        if world is not None:
            return _join_external(plan, world)
        try:
            return _start_islands(plan, captured) if islands else _start_local(plan, captured)
        except MovedOnError as error:  # before anything was started
            tell(f"run        {error.what}: looking again")


def resolve_plan(plan: Plan, devices: int, world: World, slices: int = 1) -> tuple[Resolved, Opened]:
    """Decide everything that the run leaves open, once, and check that it can be trained so.

    Args:
        plan: what is to be started.
        devices: of the whole job.
        world: this process among those of an engine; one that starts them itself stands for all.
        slices: groups of devices between which the network is slow.

    Returns:
        The record that all processes read, and what was opened on the way.

    Raises:
        UserError: what does not fit together.
    """
    config, target, speaks = plan.config, plan.target, world.local_rank == 0
    settled = settle_layout(config, target, devices)
    if settled.why and world.rank == 0:
        tell(f"layout     {settled.why}")
    planned = replace(config, layout=settled.layout)
    check_run(planned, devices, slices=slices, strategy=target.strategy)
    if world.rank == 0:
        doing("preparing the data", config)
    data = prepare(config.data, progress=speaks, verify=speaks)
    hear = warn if speaks else _unheard
    for text in check_data(config, data):
        hear(text)
    init_from.check_tokenizer(config, plan.checkpoint, data.tokenizer, hear)
    check_run(planned, devices, data.vocab_size, slices, target.strategy)
    here = max(1, devices // world.size) * world.local_size
    resolved = resolve_run(config, target, devices, data.vocab_size, here=here, settled=settled, data=data)
    placement = target.placement(resolved.layout.as_dict())
    if placement and world.rank == 0:
        tell(f"topology   {placement}")
    check_memory(resolved, target, target.processes(here))
    return replace(resolved, takes_older=plan.takes_older), Opened(target, plan.trusted, data, plan.checkpoint)


def _unheard(text: str) -> None:
    """Drop a line of another process of this host."""


def _start_local(plan: Plan, captured: bool) -> Outcome:
    """Start one process per device of this machine, and again where they fail."""
    target = plan.target
    devices = device_count(plan.config.hardware, target, target.probe())
    template = _template(plan, devices, captured)

    def start(resolved: Resolved, supervision: Supervision) -> Finished:
        return _start_processes(resolved, plan.target, replace(supervision, template=template), captured)

    def resolve(plan: Plan, devices: int) -> Resolved:
        return resolve_plan(plan, devices, World(), plan.target.slices())[0]

    with contextlib.ExitStack() as held:
        if template is not None:
            held.callback(template.close)
        resolved = open_run(plan, resolve(plan, devices), held)
        finished = Supervisor(plan, resolved, start, resolve).run(announce=not captured)
        run_dir = resolved.place.run_dir.absolute() if captured else resolved.place.run_dir
    error = first_error(finished.notes) if captured else None
    return Outcome(finished.ended.code, run_dir, None, error, finished.ended.problems, finished.last_lines)


def _start_islands(plan: Plan, captured: bool) -> Outcome:
    """Start the hub and the local islands of a run."""
    with contextlib.ExitStack() as held:
        facts = prepared_facts(plan.config, plan)
        place = open_place(plan, held)
        code = run_islands(plan, place, facts, announce=not captured)
        return Outcome(code, place.run_dir.absolute() if captured else place.run_dir)


def _template(plan: Plan, devices: int, captured: bool) -> ProcessTemplate | None:
    """Start to import what the processes need, beside all that is still to be done before they are started."""
    if not plan.target.may_fork or plan.config.launch.fault_tolerance == "torchft":
        return None
    environment = plan.target.environment(plan.config.hardware, 0, plan.target.processes(devices))
    environment |= importable() if captured else {}
    return ProcessTemplate([sys.executable, "-m", "orchestrator.launch.worker", "template"], environment, captured)


def _start_processes(resolved: Resolved, target: Target, supervision: Supervision, captured: bool) -> Finished:
    processes, place, hardware = target.processes(resolved.devices), resolved.place, resolved.asked.hardware
    doing(f"starting {processes} process{'es' if processes > 1 else ''}", resolved.config)
    command = [sys.executable, "-m", "orchestrator.launch.worker", "train"]
    last: deque[str] = deque(maxlen=_LINES_KEPT)

    def hear(line: str, stream: Stream) -> None:
        if line.strip():
            relay(line, stream)
            if stream == "stderr":
                last.append(line)

    with tempfile.TemporaryDirectory(prefix="orchestrator-", ignore_cleanup_errors=True) as folder:
        # The workers read what is resolved from the run's directory; what of it is the user's code, they are told here.
        parts = {OWN_PREFIX + "PARTS": json.dumps(registry.permitted())}
        common = {OWN_PREFIX + RUN_DIR: str(place.run_dir), OWN_PREFIX + FOLDER: folder, **parts}
        common |= importable() if captured else {}
        environments = [{**target.environment(hardware, rank, processes), **common} for rank in range(processes)]
        heard = hear if captured else None
        if resolved.config.launch.fault_tolerance == "torchft":
            ended = start_groups(resolved, command, environments, heard, not captured)
        else:
            ended = run_local(command, environments, heard, not captured, supervision=supervision)
        return Finished(ended, read_notes(Path(folder)), tuple(last))


def _join_external(plan: Plan, world: World) -> Outcome:
    """Be one of the processes that torchrun, Slurm or the user has started, on TPUs one per host.

    Each of them resolves the run, as the mesh in which they meet is made of the layout. Once they have met, what they
    have come to is held against rank 0's, whose record they all go on with.
    """
    target, hardware = plan.target, plan.config.hardware
    check_started(hardware, target, world)
    # Before torch is imported, where most of these are read. What the engine set stays.
    for key, value in target.environment(hardware, world.local_rank, world.local_size).items():
        os.environ.setdefault(key, value)
    resolved, opened = resolve_plan(plan, job_devices(hardware, target, world), world, target.slices())
    with contextlib.ExitStack() as held, joined(resolved, world, target) as (parallel, monitor):
        resolved = agree(plan, resolved, parallel, held)
        code = train(resolved, parallel, monitor, opened)
    return Outcome(code, resolved.place.run_dir.absolute())


def agree(plan: Plan, resolved: Resolved, parallel: ParallelStrategy, held: contextlib.ExitStack) -> Resolved:
    """Broadcast rank 0's record to all processes, and let rank 0 open the run directory.

    Args:
        plan: the run that the command line means.
        resolved: this process's record.
        parallel: the strategy, joined.
        held: keeps the run directory locked.

    Raises:
        ConfigError: a process was started otherwise than rank 0.
        UserError: the run directory cannot be opened.
    """
    first = Resolved.from_dict(parallel.broadcast(resolved.to_dict()), "rank 0")
    found = resolved.differences(first)
    mine = f"rank {parallel.rank}: {', '.join(found)}" if found else ""
    topic = parallel.broadcast(new_topic())
    told = json.loads(exchange(parallel, topic, mine, lambda texts: json.dumps([text for text in texts if text])))
    if told:
        raise ConfigError(
            "the processes of this job were not started alike",
            got="; ".join(told[:_SHOWN]) + ("; ..." if len(told) > _SHOWN else ""),
            fix="give the same command line, and the same data, on every host",
        )
    if parallel.rank == 0:
        first = open_run(plan, first, held)
    return Resolved.from_dict(parallel.broadcast(first.to_dict()), "rank 0")


def open_run(plan: Plan, resolved: Resolved, held: contextlib.ExitStack) -> Resolved:
    """Create the run directory and lock it for this process. Returns the record, with its paths.

    Args:
        plan: the run that the command line means.
        resolved: the run.
        held: keeps the run directory locked.

    Raises:
        UserError: it cannot be written, or another process holds it.
        MovedOnError: another process has saved a checkpoint since the plan was made.
    """
    place = open_place(plan, held)
    with run_directory.writing(place.run_dir):
        resolved = replace(resolved, paths=place)
        write_resolved(place.run_dir, resolved)
    return resolved


def open_place(plan: Plan, held: contextlib.ExitStack) -> RunPaths:
    """Create the run directory and lock it for this process.

    Args:
        plan: the run that the command line means.
        held: keeps the run directory locked.

    Raises:
        UserError: as `open_run`.
        MovedOnError: likewise.
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
    time_book.note_start(run_dir, plan.began, run_directory.read_times(plan.checkpoint if plan.resumes else None))
    checkpoints = run_directory.checkpoints_dir(run_dir, plan.config)
    if plan.config.checkpoint.dir != "auto":
        limit = plan.config.hardware.timeout_seconds
        held.enter_context(run_directory.hold(checkpoints, run_dir, plan.name, plan.patient, limit))
    if plan.newest is not None and plan.newest != resume.newest(run_dir, checkpoints):
        raise MovedOnError(run_dir)
    if plan.resumes and plan.checkpoint is not None:
        catch_up(run_dir, plan.checkpoint)
    if lost := note_last(run_dir, plan.checkpoint.step if plan.resumes and plan.checkpoint else None):
        tell(f"restart    after attempt {lost.attempt}: {lost.cause}")
    facts = {"id": identity.uuid_of(run_dir), "run_id": plan.name, "command": shlex.join(_words(plan))}
    run_directory.write_run(run_dir, {**run_directory.read_run(run_dir), **facts})
    run_directory.write_config(run_dir, plan.config)
    remove_uncommitted(checkpoints)
    return RunPaths(run_dir, checkpoints, plan.resume_from)


def _words(plan: Plan) -> Sequence[str]:
    return sys.argv[1:] if plan.words is None else plan.words


def _from_here(path: Path) -> Path:
    """Return a path as a person would write it, who is in this folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
