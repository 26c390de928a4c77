"""Run a function on several forked gloo ranks: torch is imported once, so a world costs a second, not fifteen."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.distributed.world import World
from orchestrator.observe import gemm

TIMEOUT_SECONDS = 240


def run_ranks(size: int, function: Callable[..., Any], *args: Any, clean: bool = False) -> list[Any]:
    """Call `function(world, *args)` on `size` ranks and return what they return, rank 0's first.

    A rank that raises fails the caller with its traceback; ranks that hang are killed. With `clean` nothing was ever
    computed in their parent: torch's autograd takes no new kind of device once it was used, and a child inherits that.
    """
    context: Any = multiprocessing.get_context("forkserver" if clean else "fork")
    if clean:
        context.set_forkserver_preload(["tests.lab.preloaded"])
    else:
        preload()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        store = f"file:{Path(folder) / 'store'}" if size > 1 else ""
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            world = World(rank, size, rank, size, store, engine="test")
            process = context.Process(target=_child, args=(theirs, world, function, args))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            results = [_receive(pipe, rank) for rank, pipe in enumerate(pipes)]
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()
    failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(results) if not ok]
    if failures:
        raise AssertionError("\n".join(failures))
    return [value for _, value in results]


def preload() -> None:
    """Import once what every rank would import for itself."""
    for module in (
        "orchestrator.training.job",
        "orchestrator.strategies.dtensor",
        "grain",
        "torch.distributed.checkpoint",
    ):
        importlib.import_module(module)


def _receive(pipe: Any, rank: int) -> tuple[bool, Any]:
    try:
        if pipe.poll(TIMEOUT_SECONDS):
            return pipe.recv()
        return False, f"no answer within {TIMEOUT_SECONDS} seconds"
    except EOFError:
        return False, "died without an answer"


def _child(pipe: Any, world: World, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    # Where no peak is published it is measured; no test of several ranks is about utilisation.
    gemm.measure_gemm_flops.__defaults__ = (0.01,)
    gemm._CPU_SHAPES = ()
    try:
        pipe.send((True, function(world, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        sys.stdout.flush()
        # No interpreter shutdown: a forked pytest must not run its parent's exit hooks.
        os._exit(0)
