"""Checkpoints against the disk: saving and loading against plain writing and reading of the same bytes, and what a
save beside the training costs the step; also what saving and loading take of memory.

They take turns, and who is first changes. What is written is flushed to disk by both; before each reading
the file's pages are dropped from the page cache, where the system allows it. Before each of them a file of that size is
written and removed: what a virtual machine has not used of its memory for a second is taken by its host, and to get it
back costs several times what writing to it does.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import psutil
import torch
from common import trained

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.reader import read_into
from orchestrator.checkpoint.writer import Contents, save
from orchestrator.config.compose import compose
from orchestrator.distributed.exchange import SingleProcess
from orchestrator.sharding.shard import Shard

TURNS = 9
HASHES = ("sha256", "blake3")
PIECE = 1 << 24


def shards(gibibytes: float) -> list[Shard]:
    """Tensors of a 20M model's sizes, repeated."""
    shapes = [(32000, 512), (512, 512), (1376, 512), (512, 1376), (512,)]
    result: list[Shard] = []
    left = gibibytes * 2**30
    while left > 0:
        shape = shapes[len(result) % len(shapes)]
        data = torch.rand(shape)
        result.append(Shard(f"model.t{len(result)}", shape, tuple(slice(0, size) for size in shape), data))
        left -= data.numel() * 4
    return result


def timed(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def drop(folder: Path) -> None:
    """Forget the cached pages of the files of a folder; they are on disk already."""
    for path in folder.rglob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def write_plainly(path: Path, parts: list[Shard]) -> None:
    with open(path, "wb", buffering=0) as file:
        for part in parts:
            file.write(part.data.numpy().data)
        os.fsync(file.fileno())


def read_plainly(path: Path) -> None:
    """As fast as the disk gives it: a thread for each core, each a part of the file."""
    threads = os.cpu_count() or 1
    part = -(-path.stat().st_size // threads)

    def read(start: int) -> None:
        buffer, stop = memoryview(bytearray(PIECE)), start + part
        with open(path, "rb", buffering=0) as file:
            while start < stop and (count := os.preadv(file.fileno(), [buffer[: stop - start]], start)):
                start += count

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(0, part * threads, part)))


def peak_bytes(action: Callable[[], Any]) -> int:
    """Resident memory at its highest while `action` runs, above what it was before."""
    process, done = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        action()
    finally:
        done.set()
        watcher.join()
    return highest - before


def memory(parts: list[Shard], folder: Path) -> None:
    """What a synchronous save, a load and a load of every second column take beside the shards."""
    largest = max(part.data.numel() * 4 for part in parts)
    taken = {"save": peak_bytes(lambda: save(folder, 0, parts, SingleProcess(), Contents({}, {})))}
    path = folder / "step-00000000"
    checkpoint = Checkpoint(path)
    taken["load"] = peak_bytes(lambda: read_into(checkpoint, parts, check=SingleProcess()))
    halves = []
    for part in parts:
        box = tuple(slice(0, size // 2 if dim else size) for dim, size in enumerate(part.shape))
        halves.append(Shard(part.name, part.shape, box, torch.zeros_like(part.data[box])))
    taken["load of half the columns"] = peak_bytes(lambda: read_into(checkpoint, halves, check=SingleProcess()))
    for what, count in taken.items():
        print(f"  {what}: {count / largest:.2f} times the largest tensor ({count / 2**20:.0f} MiB) beside the shards")
    shutil.rmtree(path)


def against_the_disk(gibibytes: float, folder: Path) -> None:
    parts, plain, scratch = shards(gibibytes), folder / "plain.safetensors", folder / "scratch"
    memory(parts, folder)
    names = ["plain", *HASHES]
    took: dict[tuple[str, str], list[float]] = {(what, name): [] for what in ("save", "load") for name in names}

    def one(what: str, name: str, turn: int) -> None:
        path = folder / f"step-{turn:08d}"
        actions = {
            ("save", True): lambda: write_plainly(plain, parts),
            ("load", True): lambda: read_plainly(plain),
            ("save", False): lambda: save(folder, turn, parts, SingleProcess(), Contents({}, {}, hash=name)),
            ("load", False): lambda: read_into(Checkpoint(path), parts, check=SingleProcess()),
        }
        drop(folder)
        write_plainly(scratch, parts)
        scratch.unlink()
        took[what, name].append(timed(actions[what, name == "plain"]))

    for turn in range(TURNS):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            for what in ("save", "load"):
                one(what, name, turn)
            if name == "plain":
                plain.unlink()
            else:
                shutil.rmtree(folder / f"step-{turn:08d}")
    for what in ("save", "load"):
        for name in HASHES:
            report(what, name, gibibytes, took[what, name], took[what, "plain"])


def report(what: str, name: str, gibibytes: float, ours: list[float], plain: list[float]) -> None:
    rates = [gibibytes / statistics.median(times) for times in (ours, plain)]
    print(
        f"  {what}, {name}: {rates[0] / rates[1]:.2f} of the disk's speed ({rates[0]:.2f} against {rates[1]:.2f} "
        f"GiB/s, medians of {TURNS} turns of {gibibytes:g} GiB; by sums {sum(plain) / sum(ours):.2f})",
        flush=True,
    )


class Clock(lightning.Callback):
    """Seconds of each step, from the end of the last to the end of this."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._mark = time.perf_counter()

    def on_train_start(self, *unused: Any) -> None:
        self._mark = time.perf_counter()

    def on_train_batch_end(self, *unused: Any) -> None:
        now = time.perf_counter()
        self.steps.append(now - self._mark)
        self._mark = now


def stall(asynchronous: bool, every: int, steps: int) -> None:
    words = ["model=llama_20m", "hardware=cpu", f"train.max_steps={steps}"]
    words += ["train.eval_every=null", f"checkpoint.every_steps={every}", f"checkpoint.asynchronous={asynchronous}"]
    config = compose([*words, "logger.progress=false", "checkpoint.keep_last=1"]).config
    with trained(config, lambda job, data: Clock()) as (job, clock):
        job.watchers.checkpoints.close()
    step = statistics.median(clock.steps)
    first, later = job.watchers.checkpoints.stalls[0], job.watchers.checkpoints.stalls[1:]
    print(
        f"  {'asynchronous' if asynchronous else 'synchronous'}: the save holds the training for "
        f"{statistics.median(later) / step:.1%} of a step of {step:.2f} s (median of {len(later)}; the first "
        f"{first / step:.1%}), steps during which it writes take {slower(clock.steps, every):.2f} times the others",
        flush=True,
    )


def slower(steps: list[float], every: int) -> float:
    """Median of the steps after a save, against that of all others."""
    after = [seconds for number, seconds in enumerate(steps, 1) if number > every and number % every == 1]
    others = [seconds for number, seconds in enumerate(steps, 1) if number > 2 and number % every > 1]
    return statistics.median(after) / statistics.median(others)


def main() -> None:
    gibibytes = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    print("checkpoints against plain files of the same bytes (flushed to disk; read with a cold page cache)")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        against_the_disk(gibibytes, Path(folder))
    print("what saving costs the training (llama_20m, 4,096 tokens per step as by default, fp32, one process)")
    for asynchronous in (True, False):
        stall(asynchronous, every=5, steps=26)


if __name__ == "__main__":
    main()
