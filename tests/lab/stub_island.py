"""An island of a few numbers that joins a real hub by the wire, in place of an island's `python` (see `write_stub`).

It trains as `tests.lab.island_sim` has it, saves where the hub asks it to, and goes on from there when started again.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from orchestrator import stopping
from orchestrator.config.islands_schema import IslandsConfig
from orchestrator.errors import UserError
from orchestrator.islands.island_keys import read as read_key
from orchestrator.islands.island_messages import Bye, Peer, Terms
from orchestrator.islands.link import Link
from orchestrator.islands.run_terms import RunTerms
from orchestrator.islands.terms import terms_of
from tests.lab.island_sim import SimIsland

ROOT = Path(__file__).resolve().parents[2]


def write_stub(path: Path, before: str = "") -> Path:
    """Write a program that is such an island; `before`: what it does first, with its words in `sys.argv`."""
    body = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{before}\nfrom tests.lab.stub_island import main\nmain()\n"
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(0o755)
    return path


class _Hub:
    terms: Terms


class LinkSim:
    """What an island of the simulation needs of it, by the wire and in real time."""

    def __init__(self, words: dict[str, str], folder: Path):
        islands, defaults = {}, IslandsConfig()
        for key, value in words.items():
            name = key.removeprefix("islands.")
            if key != name and isinstance(getattr(defaults, name, None), (str, int)):
                islands[name] = type(getattr(defaults, name))(value)
        batch = int(words.get("train.global_batch_tokens", 4096)) // int(words.get("train.seq_len", 256))
        self.facts = RunTerms("", int(words["train.max_steps"]), batch, {})
        self.hub = _Hub()
        self.hub.terms = terms_of(IslandsConfig(**islands), self.facts.max_steps)
        self.disk, self.mail, self._folder = {}, {}, folder
        self.link: Link | None = None
        self._asked: dict[Any, Future[Any]] = {}
        self._words = words

    @property
    def now(self) -> float:
        return time.monotonic()

    def post(self, peer: Peer, number: int, request: Any, frames: Any = ()) -> None:
        if self.link is None:
            self.link = Link(self._words["islands.join"], read_key(Path(self._words["islands.key_file"])), peer)
            self.link.beating(lambda: (0, "training"))
        self._asked[peer, number] = self.link.ask(request, frames)
        self._asked[peer, number].result() if type(request).__name__ in ("Offer", "Saved", "Bye") else None
        self._deliver()

    def _deliver(self) -> None:
        for key in [key for key, future in self._asked.items() if future.done()]:
            self.mail[key] = self._asked.pop(key).result()

    def live(self, island: SimIsland) -> int:
        """Go through the island's life; returns its exit code."""
        for wait in island.life():
            if isinstance(wait, float):
                time.sleep(wait / 100)
            while callable(wait) and not wait():
                self._deliver()
                time.sleep(0.002)
                if self._stopped(island):
                    return 143
            if self._stopped(island):
                return 143
            self.keep(island)
        assert self.link is not None
        self.link.close()
        return 0

    def keep(self, island: SimIsland) -> None:
        """Write the newest save to the disk."""
        if (kept := island.newest()) is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "kept.partial").write_bytes(pickle.dumps(kept))
            (self._folder / "kept.partial").rename(self._folder / "kept")

    def _stopped(self, island: SimIsland) -> bool:
        number = stopping.requested() or (self.link.stop if self.link else 0)
        if number and self.link is not None:
            self.link.ask(Bye("stopped")).result()
            self.link.close()
        return bool(number)


def main() -> None:
    """Be an island: `-m orchestrator train WORDS`."""
    pairs = (word.partition("=") for word in sys.argv[4:])
    words = {key: value.strip("'") for key, _, value in pairs}
    folder = Path(words["runs_dir"]) / "islands" / words["islands.island"]
    with stopping.listening(announce=False), stopping.deferred():
        sim = LinkSim(words, folder)
        island = SimIsland(sim, words["islands.island"])  # type: ignore[arg-type]
        island.incarnation += f"-{time.time_ns()}"
        if (folder / "kept").exists():
            island.kept = pickle.loads((folder / "kept").read_bytes())
            island.saves[island.kept.mark] = island.kept
        try:
            code = sim.live(island)
        except UserError as error:  # as the product's islands end
            print(error, file=sys.stderr)
            os._exit(error.exit_code)
        if island.refused is not None:
            print(f"refused: {island.refused.what}", file=sys.stderr)
            code = 1
    sys.exit(code)
