"""Start a run with islands: its hub, and those islands that are local, and keep all of them going to the end."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator import stopping
from orchestrator.checkpoint.run_checkpoints import committed
from orchestrator.checkpoint.storage import AnyPath
from orchestrator.config import registry
from orchestrator.config.schema import RunConfig
from orchestrator.config.validate_islands import island_names
from orchestrator.data.prepare import PreparedData, prepare
from orchestrator.data.validation import check_data, mixture_lines, packing_lines
from orchestrator.distributed.local_processes import Hear
from orchestrator.distributed.world import OWN_PREFIX
from orchestrator.errors import (
    DIVERGED,
    DONE,
    FAILED,
    MISTAKE,
    STOPPED,
    CheckpointError,
    ConfigError,
    MissingExtraError,
    RunFailedError,
    error_from_dict,
)
from orchestrator.installing import importable
from orchestrator.islands.island_keys import make as make_key
from orchestrator.islands.terms import describe_terms, terms_of
from orchestrator.launch.hub_brief import ADDRESS, BEGUN, MEMORY, HubBrief
from orchestrator.launch.island_processes import Kept, Process, spawn, wait_for
from orchestrator.launch.island_words import FOLDER, Joining, island_command, tail
from orchestrator.launch.plan import Plan, newest_of
from orchestrator.launch.worker_processes import ERROR
from orchestrator.output import relay, tell
from orchestrator.runs import init_from, run_directory
from orchestrator.runs.messages import doing, say, warn
from orchestrator.runs.run_directory import RunPaths

_POLL_SECONDS = 0.1
_HUB_SECONDS = 60.0  # that the hub takes to listen
_SAVE_SECONDS = 120.0  # that islands take to save, or to end when the run has
KEY = Path(FOLDER) / "key"


def check_islands_here(config: RunConfig, own_launcher: bool, chosen: Mapping[str, bool]) -> bool:
    """See that a run with islands can be started here. Returns whether the configuration is of one.

    Args:
        config: of the run.
        own_launcher: no engine has started this process.
        chosen: keys of the command line.

    Raises:
        MissingExtraError: ZeroMQ is not installed.
        ConfigError: an engine has started this process, or the group is chosen without islands.
    """
    islands = config.islands
    if not islands.members and islands.join is None:
        if config.resume is None and (given := [key for key in chosen if key.partition(".")[0] == "islands"]):
            raise ConfigError(
                "there are no islands to exchange anything",
                got=", ".join(given),
                fix="name them: 'islands=[{hardware: cpu}, {hardware: cuda}]'; or leave these out",
            )
        return False
    if importlib.util.find_spec("zmq") is None:
        raise MissingExtraError("zmq", "islands", "islands")
    if islands.members and not own_launcher:
        raise ConfigError(
            "the hub of a run with islands is started by hand, or by a launcher, on one host",
            got=f"{len(islands.members)} islands in a process that an engine has started",
            fix="start the run outside of the engine, and each of its islands there (place: remote) by "
            "launch engine=... islands.join=ADDRESS islands.island=NAME islands.key_file=FILE",
        )
    return bool(islands.members)


def prepared_facts(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """Prepare the data once for all islands. Returns the facts of the run that are known before it begins.

    Args:
        config: of the run.
        plan: of it.

    Raises:
        UserError: what is wrong with the data.
    """
    doing("preparing the data", config)
    data: PreparedData = prepare(config.data, progress=True, verify=True)
    for text in check_data(config, data):
        warn(text)
    init_from.check_tokenizer(config, plan.checkpoint, data.tokenizer, warn)
    return {
        "name": config.name,
        "vocab_size": data.vocab_size,
        "unigram_entropy_nats": data.unigram_entropy_nats,
        "data": data.describe(),
        "mixture": mixture_lines(data),
        "packing": packing_lines(data, config.train.seq_len, config.data.chat),
    }


class IslandRun:
    """A run with islands, from the open run directory to its end.

    Args:
        plan: of the run.
        place: its directory, held by the caller.
        folder: for what hub and launcher tell each other.
        facts: of the run.
        hear: called with each line that the hub prints; None: it prints where this process does.
    """

    def __init__(self, plan: Plan, place: RunPaths, folder: Path, facts: dict[str, Any], hear: Hear | None = None):
        self._hear = hear
        self._plan, self._config, self._place, self._folder, self._facts = plan, plan.config, place, folder, facts
        islands, self._run_dir = plan.config.islands, place.run_dir.absolute()
        self._key = Path(islands.key_file).expanduser().absolute() if islands.key_file else self._run_dir / KEY
        self._bind, self._address = islands.bind, ""
        self._checkpoint: AnyPath | None = place.resume_from
        self._members = dict(zip(island_names(islands), islands.members, strict=True))
        launch = plan.config.launch
        self._hub = Kept("the hub", self._start_hub, self._newest, launch.max_restarts, launch.backoff_seconds)
        self._islands = {
            name: Kept(
                f"the island {name}",
                lambda name=name: self._start_island(name),  # type: ignore[misc]
                lambda name=name: self._saved(name),  # type: ignore[misc]
                launch.max_restarts,
                launch.backoff_seconds,
            )
            for name, member in self._members.items()
            if member.place == "local"
        }
        self._asked_at: float | None = None

    def run(self) -> int:
        """Run it. Returns the exit code.

        Raises:
            UserError: it cannot go on.
        """
        (self._run_dir / FOLDER).mkdir(exist_ok=True)
        if not self._key.exists():
            make_key(self._key)
        for name in self._islands:
            island_command(self._config, name, self._members[name], self._joining())  # what is wrong with it
        everything = [self._hub, *self._islands.values()]
        try:
            self._hub.begin()
            if not self._listens():
                return self._conclude()
            self._introduce()
            for island in self._islands.values():
                island.begin()
            while self._hub.goes_on and self._look():
                time.sleep(_POLL_SECONDS)
            return self._conclude()
        finally:
            for one in everything:
                one.kill()
            if self._place.resume_from is None and not (self._folder / BEGUN).exists():
                shutil.rmtree(self._run_dir / FOLDER, ignore_errors=True)  # as of a run that was never there

    # --- what is started --------------------------------------------------------------------------------

    def _start_hub(self) -> Process:
        if self._address:  # it was lost: what it has saved meanwhile is where it goes on
            self._checkpoint = self._newest()
        for name in (ADDRESS, ERROR):
            (self._folder / name).unlink(missing_ok=True)
        resumed = str(self._checkpoint) if self._checkpoint is not None else None
        if resumed or self._address:
            self._put_saves_right()
        HubBrief(str(self._run_dir), str(self._key), self._bind, resumed, self._facts).write(self._folder)
        parts = {OWN_PREFIX + "PARTS": json.dumps(registry.permitted())}
        command = [sys.executable, "-m", "orchestrator.launch.worker", "hub", str(self._folder)]
        return spawn(command, {**importable(), **parts, **MEMORY}, piped=True, hear=self._hear)

    def _put_saves_right(self) -> None:
        """Let the islands have the saves that belong to where the hub goes on, and no later ones."""
        from orchestrator.launch.island_state import drop_saves, place_saves  # with torch, which the command lacks

        if self._checkpoint is not None:
            place_saves(self._checkpoint, self._run_dir)
        else:
            drop_saves(self._run_dir, self._islands)

    def _start_island(self, name: str) -> Process:
        command = island_command(self._config, name, self._members[name], self._joining())
        return spawn(command, {**importable(), **MEMORY}, self._log(name))

    def _joining(self) -> Joining:
        return Joining(self._address or "tcp://127.0.0.1:1", self._key, self._run_dir, self._checkpoint)

    def _log(self, name: str) -> Path:
        return self._run_dir / FOLDER / f"{name}.log"

    def _listens(self) -> bool:
        """Wait until the hub listens. Returns whether it does."""
        deadline = time.monotonic() + _HUB_SECONDS
        while not (self._folder / ADDRESS).exists():
            if self._hub.process is None or not self._hub.runs or stopping.requested():
                self._hub.send(signal.SIGTERM)
                return False
            if time.monotonic() > deadline:
                raise RunFailedError("the hub of the run does not start", got=f"nothing in {_HUB_SECONDS:g} s")
            time.sleep(_POLL_SECONDS)
        # A hub that is started again listens where the islands look for it.
        self._bind = self._address = (self._folder / ADDRESS).read_text().strip()
        return True

    def _introduce(self) -> None:
        say(f"run        {self._place.run_dir}" + (f", resumed from {self._checkpoint}" if self._checkpoint else ""))
        terms = terms_of(self._config.islands, self._config.train.max_steps)
        say(f"islands    {', '.join(self._members)}; {describe_terms(terms)}")
        say(f"hub        {self._address}; what the islands print: {self._place.run_dir / FOLDER}/NAME.log")
        for name in self._members.keys() - self._islands.keys():
            words = f"islands.join={self._address} islands.island={name} islands.key_file=FILE"
            say(f"waiting    for {name}, started elsewhere: train ... {words}, with a copy of {self._key}")

    # --- while it goes on -------------------------------------------------------------------------------

    def _look(self) -> bool:
        """See what has become of all processes. Returns whether the run goes on."""
        if stopping.insisted():
            return False
        asked, now = stopping.requested(), time.monotonic()
        if asked and self._asked_at is None:
            self._asked_at = now
            self._hub.send(signal.SIGTERM)  # it tells the islands, and those that are elsewhere, too
        if self._asked_at is not None and now - self._asked_at > _SAVE_SECONDS:
            return False
        for name, island in self._islands.items():
            ended = island.code
            if said := island.look(now, bool(asked)):
                warn(said)
            if ended is None and island.code in (MISTAKE, FAILED) and not (self._folder / BEGUN).exists():
                return False  # before anything was trained: all of it ends, and says why
            if ended is None and island.code == MISTAKE:
                self._show(name)
        if said := self._hub.look(now, bool(asked)):
            warn(said)
        elsewhere = len(self._members) > len(self._islands)
        alone = not elsewhere and not any(one.goes_on for one in self._islands.values())
        if alone and self._asked_at is None:
            self._asked_at = now  # nobody is left that could go on; the hub may still save
            if not all(one.code == DONE for one in self._islands.values()):
                self._hub.send(signal.SIGTERM)
        return True

    def _newest(self) -> AnyPath | None:
        """Return the newest checkpoint of the run."""
        with contextlib.suppress(CheckpointError):
            found = newest_of(self._plan, self._place)
            return found.directory if found is not None else self._place.resume_from
        return self._checkpoint

    def _saved(self, name: str) -> AnyPath | None:
        with contextlib.suppress(CheckpointError):
            return next(iter(committed(self._run_dir / FOLDER / name / "checkpoints")), None)
        return None

    # --- the end ----------------------------------------------------------------------------------------

    def _conclude(self) -> int:
        """End what still runs, in order, and return the exit code of the run."""
        ended = [name for name, one in self._islands.items() if not one.goes_on]  # of themselves
        if self._hub.runs:
            self._hub.send(signal.SIGTERM)
            wait_for([self._hub], 0.0 if stopping.insisted() else _SAVE_SECONDS, stopping.insisted)
        self._hub.look(time.monotonic(), True)
        seconds = 0.0 if stopping.insisted() or self._hub.code != DONE else _SAVE_SECONDS
        wait_for(list(self._islands.values()), seconds, stopping.insisted)
        if stopping.requested():
            return stopping.exit_code(stopping.requested())
        if self._hub.code == DONE:
            return DONE
        if (self._folder / ERROR).exists():
            raise error_from_dict(json.loads((self._folder / ERROR).read_text()))
        return self._failed(ended)

    def _failed(self, own: Iterable[str]) -> int:
        codes = {name: self._islands[name].code for name in own}
        bad = [name for name, code in codes.items() if code not in (None, DONE, *STOPPED)]
        for name in bad:
            self._show(name)
        code = next((one for one in (MISTAKE, DIVERGED) if one in codes.values()), FAILED)
        ended = ", ".join(f"{name}: exit code {codes[name]}" for name in bad) or f"hub: exit code {self._hub.code}"
        tell(f"the run has ended before all was trained ({ended})", level=logging.ERROR)
        if committed(self._place.checkpoints):
            tell(f"continue   python -m orchestrator train resume={shlex.quote(str(self._place.run_dir))}")
        return code

    def _show(self, name: str) -> None:
        """Print what an island has printed last."""
        lines = "\n".join(f"  | {line}" for line in tail(self._log(name)))
        tell(f"the island {name} has ended; its last lines, of {self._log(name)}:\n{lines}", level=logging.ERROR)


def run_islands(plan: Plan, place: RunPaths, facts: dict[str, Any], announce: bool = True) -> int:
    """Run hub and islands in the run directory that is open. Returns the exit code.

    Args:
        plan: of the run.
        place: its directory, held by the caller.
        facts: of the run.
        announce: acknowledge a request to stop on standard error.

    Raises:
        UserError: it cannot go on.
    """
    config = replace(plan.config, resume=None)
    with (
        tempfile.TemporaryDirectory(prefix="orchestrator-", ignore_cleanup_errors=True) as folder,
        stopping.listening(announce=announce),
        stopping.deferred(watched=True),
    ):
        code = IslandRun(replace(plan, config=config), place, Path(folder), facts, None if announce else relay).run()
        run_directory.mark_ended(place.run_dir, "interrupted" if code in STOPPED else "failed", None)
        return code
