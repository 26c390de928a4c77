"""Two hosts that share nothing but a store: each has its own runs, caches and temporary files."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto")

from orchestrator.checkpoint.run_checkpoints import committed
from orchestrator.checkpoint.storage import locate
from tests.lab.namespaces import Host, NoNamespaces, network
from tests.lab.runs import SMALL, TINY, write_corpus
from tests.lab.store import Store, reachable, serve
from tests.lab.token_order import fingerprints

RUN = "moves"
STEPS = 40
WORDS = (
    *SMALL,
    *TINY,
    f"train.max_steps={STEPS}",
    "checkpoint.every_steps=5",
    "checkpoint.asynchronous=false",
    "hardware.timeout_seconds=5",
    "hardware.devices=1",
    "resume=auto",
    "runs_dir=runs",
    "data.cache_dir=cache",
)


@dataclass
class Place:
    """Two hosts, and the store that both reach."""

    hosts: tuple[Host, Host]
    store: Store
    door: str

    @property
    def kept(self) -> Any:
        return locate(self.store.place) / "two" / "run" / RUN

    def words(self, host: Host, *more: str) -> list[str]:
        corpus = write_corpus(host.folder / "corpus")
        return [
            *WORDS,
            f"data.sources=[{{path:'{corpus}',weight:1}}]",
            f"checkpoint.dir={self.store.place}/two",
            "callbacks=[{_target_:tests.lab.token_order.TokenOrder,file:tokens}]",
            *more,
        ]

    def environment(self, rank: int, hosts: tuple[Host, ...], port: int) -> dict[str, str]:
        several = {"RANK": f"{rank}", "WORLD_SIZE": f"{len(hosts)}", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        meet = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(port)}
        return {**self.store.environment, "AWS_ENDPOINT_URL": self.door, **(several | meet if len(hosts) > 1 else {})}

    def start(self, *hosts: Host, port: int = 29500, run_id: str = RUN, words: tuple[str, ...] = ()) -> list[Any]:
        return [
            host.fork(
                _train,
                self.words(host, f"run_id={run_id}", "name=run", *words),
                environment=self.environment(rank, hosts, port),
                log=host.folder / "log",
            )
            for rank, host in enumerate(hosts)
        ]

    def step(self) -> int:
        newest = committed(self.kept)
        return int(newest[0].name.partition("-")[2]) if newest else 0

    def until(self, step: int, processes: list[Any]) -> None:
        deadline = time.monotonic() + 120
        while self.step() < step:
            assert time.monotonic() < deadline, self.said()
            assert any(process.is_alive() for process in processes), self.said()
            time.sleep(0.05)

    def end(self, processes: list[Any]) -> list[int]:
        for process in processes:
            process.join(120)
            if process.is_alive():
                process.kill()
        return [process.exitcode for process in processes]

    def said(self) -> str:
        return "\n".join(f"--- {host.name}\n{(host.folder / 'log').read_text()[-6000:]}" for host in self.hosts)

    def rows(self, host: Host) -> list[dict[str, Any]]:
        return [json.loads(row) for row in (host.folder / "runs/run" / RUN / "metrics.jsonl").read_text().splitlines()]

    def legs(self, host: Host) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((host.folder / "runs/run" / RUN / "run.json").read_text())["legs"]
        return found


def _train(words: list[str]) -> int:
    from orchestrator.config.compose import compose
    from orchestrator.errors import UserError
    from orchestrator.launch.start import launch
    from orchestrator.output import printing

    with printing():
        try:
            code = launch(compose(words)).code
        except UserError as error:
            print(f"error: {error}")
            code = error.exit_code
    print(f"exit {code}", flush=True)
    return code


@pytest.fixture
def place(tmp_path):
    try:
        with network(tmp_path, "host-a", "host-b", "store") as (*hosts, apart):
            door = apart.listen()
            with serve("s3", door) as store, reachable(store):
                url = f"http://{apart.address}:{door.getsockname()[1]}"
                yield Place((hosts[0], hosts[1]), store, url)
    except NoNamespaces as reason:
        pytest.skip(str(reason))


def _kill(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
        process.join()


def test_a_cut_cable_and_another_first_host_leave_no_trace(place):
    """Both; one is cut off; it goes on alone, on another layout; both again, led by the one that was left behind."""
    a, b = place.hosts
    both = place.start(a, b)
    place.until(10, both)
    b.cut()
    assert place.end(both[:1]) == [1], place.said()
    _kill(both)
    b.mend()
    alone = place.start(b)
    place.until(20, alone)
    _kill(alone)
    grown = place.start(a, b, port=29501)
    assert place.end(grown) == [0, 0], place.said()
    assert place.step() == STEPS
    tokens = [path for host in place.hosts for path in host.folder.glob("tokens-*")]
    assert len(set(fingerprints(tokens, STEPS))) == STEPS
    # The first host was left behind: what was done without it came with the checkpoint.
    assert sorted({row["step"] for row in place.rows(a) if "loss" in row}) == list(range(1, STEPS + 1))
    legs = place.legs(a)
    assert [leg["leg"] for leg in legs] == [0, 1, 2]
    assert [leg["layout"]["fsdp"] for leg in legs] == [2, 1, 2]
    assert [leg["resumed_from"] and leg["start_step"] for leg in legs][:2] == [None, 10]
