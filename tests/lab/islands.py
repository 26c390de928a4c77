"""Islands as forked processes with their imports made, and the hub of their run in another one."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.islands_schema import IslandsConfig
from orchestrator.config.schema import RunConfig
from orchestrator.distributed.world import World
from orchestrator.islands import island_keys
from orchestrator.islands.island_messages import Terms
from orchestrator.islands.run_terms import RunTerms
from tests.lab.ranks import preload
from tests.lab.runs import small_config

PORT_FILE, NOTES, OUTER, LEDGER, STOP = "port", "notes.jsonl", "outer.npz", "ledger.json", "stop"


@dataclass
class LabRun:
    """A run with islands, in a folder.

    Args:
        folder: for everything.
        terms: of the exchange.
        words: of all islands.
        expected: names and shares of the islands that it begins with.
        settings: keys of the group `islands` for the hub.
        save_every: global steps between two saves.
        eval_every: global steps between two evaluations.
        hosts: namespaces of islands, by name, and of the `hub`; without them all are on this machine.
        cores: the core that an island alone may use, by name.
    """

    folder: Path
    terms: Terms
    words: tuple[str, ...] = ()
    expected: Mapping[str, float | None] = field(default_factory=lambda: {"a": None, "b": None})
    settings: Mapping[str, Any] = field(default_factory=dict)
    save_every: int | None = None
    eval_every: int | None = None
    hosts: Mapping[str, Any] = field(default_factory=dict)
    cores: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        preload()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.key = self.folder / "key"
        island_keys.make(self.key)
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = server.getsockname()[1]
        self.islands: dict[str, LabIsland] = {}
        self.config = small_config(self.folder, *self.words)
        from orchestrator.data.prepare import prepare

        prepare(self.config.data, progress=False)
        train = self.config.train
        batch = train.global_batch_tokens // train.seq_len
        self.facts = RunTerms("lab", train.max_steps, batch, self.expected, self.eval_every, self.save_every)
        self._hub = self._start_hub()

    def _start_hub(self) -> Any:
        process = multiprocessing.get_context("fork").Process(target=_serve, args=(self,))
        process.start()
        return process

    @property
    def address(self) -> str:
        return f"tcp://{self.hosts['hub'].address if self.hosts else '127.0.0.1'}:{self.port}"

    def settle(self, name: str) -> None:
        """Let this process be where an island, or the hub, is to be."""
        if name in self.hosts:
            self.hosts[name].enter()
        if name in self.cores:
            os.sched_setaffinity(0, {self.cores[name]})

    def start(self, name: str, *words: str, size: int = 1, resume: bool = True, slower: float = 0.0) -> LabIsland:
        """Start an island, from its newest checkpoint if it has one."""
        joins = (f"islands.join={self.address}", f"islands.island={name}", f"islands.key_file={self.key}")
        config = small_config(self.folder, *self.words, *joins, f"hardware.devices={size}", *words)
        island = LabIsland(self, name, config, size, resume, slower)
        self.islands[name] = island
        return island

    def finish(self, seconds: float = 120) -> None:
        """Wait for the end of the run; all that still live have to end well."""
        deadline = time.monotonic() + seconds
        for island in self.islands.values():
            island.wait(deadline - time.monotonic())
        self._hub.join(max(1, deadline - time.monotonic()))
        assert self._hub.exitcode == 0, (self.folder / "hub.log").read_text()[-3000:]

    def close(self) -> None:
        """End what still lives."""
        for island in self.islands.values():
            island.kill()
        if self._hub.is_alive():
            self._hub.kill()

    def notes(self, kind: str | None = None) -> list[dict[str, Any]]:
        """What the hub has recorded."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for line in (self.folder / NOTES).read_text().splitlines():
                with contextlib.suppress(ValueError):  # that is just being written
                    found.append(json.loads(line))
        return [note for note in found if kind in (None, note["kind"])]

    def outer(self) -> dict[str, np.ndarray[Any, Any]]:
        """The outer weights at the end."""
        with np.load(self.folder / OUTER) as found:
            return dict(found)

    def ledger(self) -> dict[str, Any]:
        """The ledger at the end, and what is wrong with it."""
        found: dict[str, Any] = json.loads((self.folder / LEDGER).read_text())
        return found

    def losses(self) -> dict[int, float]:
        """Loss of each global step, over all islands."""
        sums: dict[int, list[float]] = {}
        for note in self.notes("report"):
            for at, loss, targets in zip(note["at"], note["losses"], note["targets"], strict=True):
                one = sums.setdefault(at, [0.0, 0.0])
                one[0], one[1] = one[0] + loss * targets, one[1] + targets
        return {at: total / count for at, (total, count) in sorted(sums.items()) if count}

    def validation(self) -> float:
        """The last validation loss."""
        return float(self.notes("validation")[-1]["values"][0])


class LabIsland:
    """The forked ranks of an island."""

    def __init__(self, run: LabRun, name: str, config: RunConfig, size: int, resume: bool, slower: float):
        from orchestrator.checkpoint.run_checkpoints import committed

        self.name, self.run_dir = name, run.folder / "islands" / name
        self.run_dir.mkdir(parents=True, exist_ok=True)
        found = committed(self.run_dir / "checkpoints") if resume else []
        context = multiprocessing.get_context("fork")
        store = f"file:{self.run_dir / f'store-{time.time_ns()}'}" if size > 1 else ""
        self.log = self.run_dir / "log"
        self._processes = []
        for rank in range(size):
            world = World(rank, size, rank, size, store, engine="test")
            settle = lambda: run.settle(name)  # noqa: E731
            arguments = (world, to_dict(config), self.run_dir, found[0] if found else None, self.log, slower, settle)
            process = context.Process(target=_work, args=arguments)
            process.start()
            self._processes.append(process)

    def kill(self) -> None:
        """Kill its ranks at once."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.join()

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to its ranks."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    @property
    def alive(self) -> bool:
        return any(process.is_alive() for process in self._processes)

    def wait(self, seconds: float, code: int = 0) -> None:
        """Wait until it has ended, with this exit code."""
        deadline = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0.1, deadline - time.monotonic()))
        codes = [process.exitcode for process in self._processes]
        assert codes == [code] * len(codes), f"{self.name}: {codes}\n{self.log.read_text()[-4000:]}"


def _redirect(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)


def _work(
    world: World,
    data: dict[str, Any],
    run_dir: Path,
    resume: Any,
    log: Path,
    slower: float,
    settle: Callable[[], None],
) -> None:
    import torch

    from orchestrator.errors import UserError
    from orchestrator.launch.run import work
    from orchestrator.observe import gemm
    from tests.lab.runs import resolved_run

    _redirect(log)
    torch.set_num_threads(1)
    gemm.measure_gemm_flops.__defaults__ = (0.01,)
    gemm._CPU_SHAPES = ()  # type: ignore[assignment]
    code = 1
    try:
        settle()
        if slower:
            _slow_down(slower)
        code = work(resolved_run(from_dict(RunConfig, data), world, run_dir, resume), world)
    except UserError as error:
        print(error)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _slow_down(seconds: float) -> None:
    """Let every step take so much longer."""
    from orchestrator.training.module import LanguageModule

    step = LanguageModule.training_step

    def slower(self: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(seconds)
        step(self, batch, batch_idx)

    LanguageModule.training_step = slower  # type: ignore[method-assign]


def _serve(run: LabRun) -> None:
    """Be the hub."""
    from orchestrator.islands.hub import Hub
    from orchestrator.islands.hub_socket import HubSocket
    from orchestrator.islands.ledger import audit

    _redirect(run.folder / "hub.log")
    code = 1
    try:
        run.settle("hub")
        with (run.folder / NOTES).open("a", buffering=1) as notes:

            def write(note: dict[str, Any]) -> None:
                notes.write(json.dumps(note) + "\n")

            hub = Hub(run.terms, IslandsConfig(**run.settings), run.facts, note=write)
            wire = HubSocket(run.address, island_keys.read(run.key))
            ticked = 0.0
            while not hub.finished:
                if (found := wire.receive(0.05)) is not None:
                    hub.handle(*found)
                if time.monotonic() - ticked > 0.25:
                    ticked = time.monotonic()
                    hub.tick()
                for peer, number, answer, frames in hub.answers:
                    wire.reply(peer, number, answer, frames)
                hub.answers.clear()
                if hub.save_ready:
                    hub.kept(hub.capture())
            for _ in range(10):  # who has not heard the last answer asks again
                if (found := wire.receive(0.05)) is not None:
                    hub.handle(*found)
                    for peer, number, answer, frames in hub.answers:
                        wire.reply(peer, number, answer, frames)
                    hub.answers.clear()
        state = hub.capture()
        np.savez(run.folder / OUTER, **{name: array for name, array in state.tensors.items() if name[:6] == "model."})
        ledger = {**hub.ledger.plain(), "problems": audit(hub.ledger), "versions": hub.versions}
        (run.folder / LEDGER).write_text(json.dumps(ledger))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
