"""What an exchange of islands costs, beside what the transport library alone moves for the same bytes, on loopback.

An exchange is all of it: the difference to the outer weights, encoding, hashing, encryption, the hub's mean and outer
step, and the update back into the weights. The library moves as many bytes each way in messages of the same size, with
the same encryption and, for comparison, without.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch

from orchestrator.config.schema import IslandsConfig, RunConfig
from orchestrator.islands.codec import encoded_bytes
from orchestrator.islands.hub import Hub
from orchestrator.islands.hub_socket import HubSocket
from orchestrator.islands.island_keys import curve_pair, import_zmq
from orchestrator.islands.island_messages import PROTOCOL, Bye, Hello, LeaseRequest, Peer, Terms
from orchestrator.islands.link import Link
from orchestrator.islands.run_terms import RunTerms
from orchestrator.launch.hub_brief import MEMORY
from orchestrator.sharding.shard import Shard
from orchestrator.training.island_exchange import IslandExchange

KEY, TURNS, MESSAGE = bytes(range(32)), 7, 16 << 20
SHAPES = {"embed.weight": (8192, 512)} | {f"layers.{at}.mlp.weight": (2048, 512) for at in range(12)}  # 64 MiB in fp32


class Held:
    """Weights in the memory of one process, with what an exchange asks of a strategy."""

    def __init__(self) -> None:
        self.weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
        self.placements = {None: {name: SimpleNamespace(shape=shape) for name, shape in SHAPES.items()}}

    def weight_shards(self, model: Any, names: Any) -> list[Shard]:
        return [shard for shard in self.state_shards(model, None) if shard.name in names]

    def state_shards(self, model: Any, optimizer: Any) -> list[Shard]:
        whole = {name: tuple(slice(0, length) for length in shape) for name, shape in SHAPES.items()}
        return [Shard(f"model.{name}", SHAPES[name], whole[name], data) for name, data in self.weights.items()]

    def any_raised(self, flag: bool) -> bool:
        return flag

    def start_vote(self, value: int) -> Any:
        return SimpleNamespace(result=lambda: value)

    def adopt(self, model: Any, optimizer: Any, shards: Any) -> None:
        pass


def serve(pipe: Any, terms: Terms, rounds: int) -> None:
    """Be the hub of one island."""
    hub = Hub(terms, IslandsConfig(), RunTerms("bench", rounds, 1, {"a": 1.0}))
    socket = HubSocket("tcp://127.0.0.1:*", KEY)
    pipe.send(socket.address)
    while not hub.finished:
        if (found := socket.receive(0.2)) is not None:
            hub.handle(*found)
        for peer, number, answer, frames in hub.answers:
            socket.reply(peer, number, answer, frames)
        hub.answers.clear()
    socket.close()


def echo(pipe: Any, curve: bool, sizes: list[int], turns: int) -> None:
    """Take as many bytes as an exchange brings, and send as many back."""
    zmq = import_zmq()
    socket = zmq.Context(io_threads=2).socket(zmq.ROUTER)
    if curve:
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = curve_pair(KEY, "hub")
    pipe.send(f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}")
    back = [bytes(size) for size in sizes]
    for _ in range(turns):
        for _ in sizes:
            route, *_ = socket.recv_multipart(copy=False)
        for frame in back:
            socket.send_multipart([route, frame], copy=False)
    pipe.recv()


def started(function: Any, *arguments: Any) -> tuple[Any, str, Any]:
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=function, args=(theirs, *arguments), daemon=True)
    process.start()
    return process, mine.recv(), mine


def library(curve: bool, total: int) -> float:
    """Seconds in which the library moves `total` bytes there and back: the median of some turns."""
    zmq = import_zmq()
    sizes = [min(MESSAGE, total - at) for at in range(0, total, MESSAGE)]
    process, address, pipe = started(echo, curve, sizes, TURNS)
    socket = zmq.Context.instance().socket(zmq.DEALER)
    if curve:
        socket.curve_publickey, socket.curve_secretkey = curve_pair(KEY, "island")
        socket.curve_serverkey = curve_pair(KEY, "hub")[0]
    socket.connect(address)
    frames, seconds = [bytes(size) for size in sizes], []
    for _ in range(TURNS):
        begin = time.perf_counter()
        for frame in frames:
            socket.send(frame, copy=False)
        for _ in sizes:
            socket.recv(copy=False)
        seconds.append(time.perf_counter() - begin)
    pipe.send("end")
    process.join()
    socket.close(0)
    return statistics.median(seconds[1:])


def exchange(kind: Any) -> float:
    """Seconds of an exchange of all weights: the median of some."""
    terms = Terms(inner_steps=1, exchange=kind)
    process, address, _ = started(serve, terms, TURNS)
    link, held = Link(address, KEY, Peer("a", "1", 0)), Held()
    one = IslandExchange(held, None, RunConfig(), link)  # type: ignore[arg-type]
    fields = ("", "a", "1", 0, 1, "m", "d", 1, 1, TURNS, 0, 1, one.names, one.shapes, one.boxes())
    welcome: Any = link.ask(Hello(PROTOCOL, *fields)).result()[0]
    one.begin(welcome.terms, welcome.versions)
    one.give()
    seconds = []
    for number in range(TURNS):
        link.ask(LeaseRequest(number)).result()
        for weight in held.weights.values():
            weight += 0.01
        begin = time.perf_counter()
        one.offer(0, number, 1, 1, number + 1)
        one.apply(0)
        seconds.append(time.perf_counter() - begin)
    link.ask(LeaseRequest(TURNS)).result()
    link.ask(Bye("finished")).result()
    link.close()
    process.join(10)
    return statistics.median(seconds[1:])


def main() -> None:
    """Print the ratios."""
    if not MEMORY.items() <= os.environ.items():  # as the launcher starts hubs and islands
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MEMORY})
    from orchestrator.islands.boxes import Box

    for kind in ("fp32", "int8"):
        total = sum(encoded_bytes(Box.whole(name, shape), kind) for name, shape in SHAPES.items())
        ours, curve, plain = exchange(kind), library(True, total), library(False, total)
        print(
            f"exchange of {sum(torch.Size(s).numel() for s in SHAPES.values()) / 1e6:.1f} M weights in {kind}, "
            f"{total / 1e6:.1f} MB each way: {curve / ours:.2f} of what ZeroMQ with the same encryption moves, "
            f"{plain / ours:.2f} of what it moves without"
        )


if __name__ == "__main__":
    main()
