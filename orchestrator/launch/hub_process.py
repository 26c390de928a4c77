"""The process of the hub of a run with islands: `worker hub FOLDER`, from what its launcher has left in that folder."""

from __future__ import annotations

import json
import math
import os
import platform
import threading
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from orchestrator import stopping
from orchestrator.atomic_files import write_atomically
from orchestrator.checkpoint.signing import trust
from orchestrator.checkpoint.storage import locate
from orchestrator.config import registry
from orchestrator.config.compose import read_config
from orchestrator.config.schema import RunConfig
from orchestrator.config.validate_islands import island_names
from orchestrator.distributed import standing
from orchestrator.distributed.world import OWN_PREFIX
from orchestrator.errors import DIVERGED, DONE, ConfigError, UserError
from orchestrator.islands.hub import Hub
from orchestrator.islands.hub_socket import HubSocket
from orchestrator.islands.hub_state import HubState
from orchestrator.islands.island_keys import read as read_key
from orchestrator.islands.run_rows import RunRows
from orchestrator.islands.run_terms import RunTerms
from orchestrator.islands.terms import describe_terms, terms_of
from orchestrator.launch.group_launcher import stop_with_launcher
from orchestrator.launch.hub_brief import ADDRESS, BEGUN, HubBrief
from orchestrator.launch.island_hub import HubLoop, HubNotes
from orchestrator.launch.island_state import fitting, read_run, save_run
from orchestrator.launch.worker_processes import leave_error
from orchestrator.observe.history import METRICS
from orchestrator.observe.sink import JsonLines, SideChannels
from orchestrator.report.run_data import read_lines
from orchestrator.report.run_islands import EXCHANGES
from orchestrator.report.run_report import write_report
from orchestrator.report.run_time import goodput_line
from orchestrator.runs import identity, run_directory, time_book
from orchestrator.runs.messages import say, warn
from orchestrator.runs.record import Record
from orchestrator.runs.time_book import TimeBook


def hub_worker(words: list[str]) -> int:
    """Be the hub: `hub FOLDER`. Returns the exit code.

    Args:
        words: the folder.
    """
    threading.Thread(target=stop_with_launcher, daemon=True).start()
    registry.permit(json.loads(os.environ.get(OWN_PREFIX + "PARTS", "[]")))
    folder = Path(words[0])
    try:
        with stopping.deferred():
            return _serve(folder, HubBrief.read(folder))
    except UserError as error:
        return leave_error(folder, 0, error)


def run_terms(config: RunConfig, run: str) -> RunTerms:
    """Return what the hub knows of a run before any island comes.

    Args:
        config: of the run.
        run: its uuid.
    """
    train, islands = config.train, config.islands
    shares = [None if one.share == "auto" else float(one.share) for one in islands.members]
    return RunTerms(
        run,
        train.max_steps,
        train.global_batch_tokens // train.seq_len,
        dict(zip(island_names(islands), shares, strict=True)),
        train.eval_every,
        config.checkpoint.every_steps,
    )


def _serve(folder: Path, brief: HubBrief) -> int:
    run_dir = Path(brief.run_dir)
    config, facts = read_config(run_dir / run_directory.CONFIG), run_directory.read_run(run_dir)
    state = None
    if brief.resume_from is not None:
        settings = config.checkpoint
        trusted = trust(settings.trusted_keys, settings.require_signature)
        state = fitting(read_run(locate(brief.resume_from), trusted), terms_of(config.islands, config.train.max_steps))
    checkpoints = run_directory.checkpoints_dir(run_dir, config)
    leg, channels = len(facts["legs"]), SideChannels(warn)
    record_file = channels.open(str(EXCHANGES), JsonLines(run_dir / EXCHANGES).write, unit="entries")
    metrics = channels.open(METRICS, JsonLines(run_dir / METRICS).write)
    with ExitStack() as held:
        socket = held.enter_context(closing(HubSocket(brief.bind, read_key(Path(brief.key_file)))))
        book = held.enter_context(time_book.keep(run_dir, leg))
        held.callback(channels.close)
        standing.enter(standing.LOADING)
        notes = HubNotes(record_file, metrics, leg)
        notes.begun = lambda: _begun(folder)
        # A run that branches off keeps the name that the saves of its islands have.
        run = str(state.plain["run"]) if state is not None else identity.uuid_of(run_dir)
        hub = make_hub(config, run, state, notes)
        notes.rows = rows = make_rows(hub, config, leg)
        hub.note({"kind": "begins", "step": hub.step, "resumed_from": brief.resume_from})
        about = _leg(brief, config, leg, hub)
        record = Record(run_dir, {**facts, **brief.facts}, about, channels, True, book)
        standing.here.step = hub.step
        record.begin()
        write_atomically(folder / ADDRESS, socket.address)

        def publish(islands: dict[str, Any]) -> None:
            record.publish(**islands, **_parameters(hub))

        loop = HubLoop(
            hub,
            socket,
            notes,
            lambda state: save_run(checkpoints, state, config),
            publish,
            config.train.max_steps,
            config.checkpoint.at_end,
        )
        status = "failed"
        try:
            code = loop.serve()
            status = {DONE: "finished", DIVERGED: "diverged"}.get(code, "interrupted")
        finally:
            record.end(status, rows.step, [])
            book.close()
    _conclude(run_dir, status, notes, rows.step, book)
    return code


def _begun(folder: Path) -> None:
    """Let the launcher know that the first lease is handed out."""
    write_atomically(folder / BEGUN, "")
    standing.enter(standing.COMPILING)


def make_hub(config: RunConfig, run: str, state: HubState | None, notes: HubNotes) -> Hub:
    """Make the hub of a run.

    Args:
        config: of the run.
        run: its uuid.
        state: from which it goes on; None: it begins.
        notes: takes what it notes.
    """
    islands, repeat = config.islands, list[dict[str, Any]]()
    if islands.schedule is not None:
        repeat, bad = read_lines(Path(islands.schedule))
        if bad or not repeat:
            raise ConfigError(
                "the schedule is no record of exchanges",
                got=f"islands.schedule={islands.schedule}: {f'{bad} lines that are none' if bad else 'nothing in it'}",
                allowed="islands/exchanges.jsonl of a run",
            )
    terms = terms_of(islands, config.train.max_steps)
    return Hub(terms, islands, run_terms(config, run), state, note=notes.take, repeat=repeat)


def make_rows(hub: Hub, config: RunConfig, leg: int) -> RunRows:
    """Make what makes the rows of metrics of a run.

    Args:
        hub: of the run.
        config: of the run.
        leg: number of this start.
    """
    booked = [(one.name, number) for one in hub.members.values() for number in one.booked]
    rounds = hub.terms.algorithm != "decoupled"
    return RunRows(hub.facts.sequences, config.train.seq_len, rounds, hub.step, booked, leg)


def _leg(brief: HubBrief, config: RunConfig, leg: int, hub: Hub) -> dict[str, Any]:
    return {
        "leg": leg,
        "start_step": hub.step,
        "resumed_from": brief.resume_from,
        "host": platform.node(),
        "target": f"{len(config.islands.members)} islands",
        "exchange": describe_terms(hub.terms),
        "islands": {},
    }


def _parameters(hub: Hub) -> dict[str, Any]:
    """Return the number of parameters, which the first island brings along."""
    hello = next((hello for one in hub.members.values() for hello in one.hellos.values()), None)
    return {"exchanged_parameters": sum(map(math.prod, hello.shapes))} if hello else {}


def _conclude(run_dir: Path, status: str, notes: HubNotes, step: int, book: TimeBook) -> None:
    try:
        write_report(run_dir)
    except Exception as error:  # the run is done and saved
        warn(f"the report could not be written: {error!r}")
    loss = notes.latest.get("loss")
    say(f"\n{status} at step {step}" + (f": loss {loss:.4f}" if loss is not None else ""))
    say(f"exchanges  {notes.exchanges}; {run_dir / EXCHANGES} says of what")
    say(f"goodput    {goodput_line(book.book())}")
    say(f"report     {run_dir / 'report.html'}")
    say(f"run        {run_dir}")
    if status == "interrupted":
        say(f"continue   python -m orchestrator train resume={run_dir}")
