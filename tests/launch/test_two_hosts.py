"""Two hosts that share nothing but a store: each has its own runs, caches and temporary files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto")

from orchestrator.checkpoint.run_checkpoints import committed
from orchestrator.checkpoint.storage import locate
from tests.lab.namespaces import Host, NoNamespaces, network
from tests.lab.runs import SMALL, TINY, write_corpus
from tests.lab.slow import slow
from tests.lab.store import Store, reachable, serve
from tests.lab.token_order import fingerprints

RUN = "moves"
STEPS = 40
TIMEOUT = 15  # of the jobs of torchrun
MARGIN = 20  # seconds within which processes have ended after the time-out, on a busy machine
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
    apart: Host
    started: list[Any] = field(default_factory=list)

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
        started = [
            host.fork(
                _train,
                self.words(host, f"run_id={run_id}", "name=run", *words),
                environment=self.environment(rank, hosts, port),
                log=host.folder / "log",
            )
            for rank, host in enumerate(hosts)
        ]
        self.started += started
        return started

    def step(self) -> int:
        newest = committed(self.kept)
        return int(newest[0].name.partition("-")[2]) if newest else 0

    def until(self, step: int, processes: list[Any], seconds: float = 120) -> None:
        self._wait(lambda: self.step() >= step, processes, seconds)

    def until_layout(self, devices: int, agents: list[Any]) -> None:
        """Wait for a checkpoint of a start on so many devices, which is the last one."""

        def grown() -> bool:
            return _layouts(self)[-1] == devices and self.step() > step

        step = self.step()
        self._wait(grown, agents, 240)

    def _wait(self, condition: Callable[[], bool], processes: list[Any], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.said()
            alive = [
                process.poll() is None if hasattr(process, "poll") else process.is_alive() for process in processes
            ]
            assert any(alive), self.said()
            time.sleep(0.05)

    @contextlib.contextmanager
    def rendezvous(self) -> Iterator[str]:
        """Keep the agents' store on a host that is none of theirs."""
        from torch.distributed import TCPStore

        address = self.apart.address
        # Whoever makes it connects to it as well, so it is made there.
        store = self.apart.within(lambda: TCPStore(address, 29400, is_master=True, wait_for_workers=False))
        yield f"{address}:29400"
        del store

    def agent(self, host: Host, address: str, nodes: str = "1:2") -> subprocess.Popen[bytes]:
        """Start torchrun, as a user does."""
        options = "is_host=0,join_timeout=60,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
        agent = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc-per-node=1"),
            *("--max-restarts=9", "--monitor-interval=0.2"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={address}", "--rdzv-id=two", f"--rdzv-conf={options}"),
            *(f"--local-addr={host.address}", "-m", "orchestrator", "train"),
        ]
        more = ("train.max_steps=100000", f"hardware.timeout_seconds={TIMEOUT}")
        words = self.words(host, f"run_id={RUN}", "name=run", *more)
        environment = {**self.store.environment, "AWS_ENDPOINT_URL": self.door}
        shared = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return host.start([*agent, *words], {**environment, **shared}, host.folder / "log")

    def has_record(self, host: Host) -> bool:
        return (host.folder / "runs/run" / RUN / "run.json").exists()

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
                found = Place((hosts[0], hosts[1]), store, url, apart)
                yield found
                _kill(found.started)  # those of a test that has failed
    except NoNamespaces as reason:
        pytest.skip(str(reason))


def _is_alive(process: Any) -> bool:
    return process.poll() is None if isinstance(process, subprocess.Popen) else bool(process.is_alive())


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
    began = time.monotonic()
    assert place.end(both) == [1, 1], place.said()
    assert time.monotonic() - began < 5 + MARGIN, "each side has ended by itself"
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


@slow
def test_a_second_submission_on_another_host_waits_or_is_refused(place):
    a, b = place.hosts
    words = ("train.max_steps=400", "optim.schedule.kind=constant")
    first = place.start(a, words=words)
    place.until(10, first)
    second = place.start(b, words=words)
    assert place.end(second) == [2], place.said()
    assert "another process is training this run" in place.said()
    anew = place.start(b, words=(*words, "resume=null"))
    assert place.end(anew) == [2], place.said()
    assert "there is a run of this run_id already" in place.said()
    assert first[0].is_alive(), "nobody has disturbed it"
    _kill(first)
    fewer = (*words, f"train.max_steps={place.step() + 20}")
    # A dead one is no obstacle; what it has left to be done is done on the other host.
    assert place.end(place.start(b, words=fewer)) == [0], place.said()
    assert place.end(place.start(a, words=fewer)) == [0], place.said()
    assert "finished   the run has all its steps" in (a.folder / "log").read_text()


@slow
def test_torchrun_shrinks_to_the_host_that_is_left_and_grows_again(place):
    """Two agents, their store on a third host; a cable is cut; one host goes on by itself; the other comes back."""
    a, b = place.hosts
    with place.rendezvous() as address:
        agents = [place.agent(host, address) for host in (a, b)]
        with _ended(agents):
            place.until(10, agents)
            b.cut()
            reached = place.step()
            place.until(reached + 10, agents, seconds=240)
            assert _layouts(place)[-1] == 1, place.said()
            b.mend()
            agents[1].kill()
            agents[1].wait()
            agents[1] = place.agent(b, address)
            place.until_layout(2, agents)
    _check_tokens(place)


@slow
def test_torchrun_goes_on_when_the_cable_is_back(place):
    """No agent is touched: the processes on both sides of the cut end by themselves, and are started again."""
    a, b = place.hosts
    with place.rendezvous() as address:
        agents = [place.agent(host, address, nodes="2") for host in (a, b)]
        with _ended(agents):
            place.until(10, agents)
            b.cut()
            began = time.monotonic()
            ended = [host.folder / "runs/run" / RUN / "hang/attempt-0/ended.json" for host in (a, b)]
            place._wait(lambda: all(path.exists() for path in ended), agents, TIMEOUT + MARGIN)
            assert time.monotonic() - began > TIMEOUT / 2
            reached = place.step()
            b.mend()
            place.until(reached + 10, agents, seconds=240)
            assert [agent.poll() for agent in agents] == [None, None], place.said()
            assert _layouts(place) == [2, 2]
            assert "does not answer" in (b.folder / "log").read_text(), "the host that was cut off says why it ends"
    _check_tokens(place)


@contextlib.contextmanager
def _ended(agents: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    try:
        yield
        for agent in agents:
            agent.terminate()
        for agent in agents:
            agent.wait(120)
    finally:
        for agent in agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)


def _check_tokens(place: Place) -> None:
    """No step was left out, one that was trained again saw the same tokens, and no two steps the same ones."""
    last = place.step()
    tokens = [path for host in place.hosts for path in host.folder.glob("tokens-*")]
    assert len(set(fingerprints(tokens, last))) == last


def _layouts(place: Place) -> list[int]:
    """Devices of each start of the run, as the host that has written most knows them."""
    found = [[leg["devices"] for leg in place.legs(host)] for host in place.hosts if place.has_record(host)]
    return max(found, key=len)
