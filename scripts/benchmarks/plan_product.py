"""The planner against the product's CPU runs: memory of a worker and seconds of a step, predicted and measured.

The chip that is planned for is this machine: the rate of matrix products that a worker reaches (`observe.gemm`), and
the rate at which it copies memory, measured in as many processes as train. Measured memory is the highest resident
size of a worker during its steps, less its resident size before the model is built; before that, a tiny run has loaded
whatever a step loads late. The prediction is of live bytes, so the C library is told to give large pieces back when
they are freed (`MALLOC_MMAP_THRESHOLD_`); a second figure says what it holds when it is not told. Nothing is saved or
evaluated: the copy that an asynchronous save takes would come on top.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.chips.chip import Chip, Figure
from orchestrator.chips.load import load_catalogue
from orchestrator.config.compose import compose
from orchestrator.config.schema import RunConfig
from orchestrator.distributed.local_processes import run_local
from orchestrator.distributed.world import World, detect
from orchestrator.hardware import host
from orchestrator.hardware.target_table import resolve
from orchestrator.planner.estimate.memory import estimate_memory
from orchestrator.planner.estimate.time import step_time
from orchestrator.planner.evidence.calibration import calibration
from orchestrator.planner.spec import Cluster, JobSpec, ModelShape, ParallelPlan

STEPS, WARMUP = 5, 1
MIB = 2**20
QUIET = [
    "hardware=cpu",
    f"train.max_steps={STEPS}",
    "train.eval_every=null",
    "train.eval_tokens=256",
    "checkpoint.every_steps=null",
    "logger.tensorboard=false",
    "logger.progress=false",
]
TINY = ["model=tiny", "train.seq_len=64", "train.global_batch_tokens=128"]
EIGHT = ["layout.fsdp=2", "train.global_batch_tokens=16384", "train.micro_batch_size=4"]  # micro-batches
CASES: dict[str, tuple[int, list[str]]] = {
    "tiny": (1, ["model=tiny", "train.seq_len=256", "train.global_batch_tokens=8192"]),
    "llama_20m": (1, ["model=llama_20m", "train.seq_len=256", "train.global_batch_tokens=2048"]),
    "llama_20m, remat full": (1, ["model=llama_20m", "train.global_batch_tokens=4096", "train.remat=full"]),
    "llama_20m, 2 micro-batches": (
        1,
        ["model=llama_20m", "train.global_batch_tokens=4096", "train.micro_batch_size=8"],
    ),
    "llama_20m, fsdp 2": (2, ["model=llama_20m", "train.global_batch_tokens=4096", "layout.fsdp=2"]),
    "tiny, fsdp 2, reduced in each": (2, ["model=tiny", *EIGHT]),
    "tiny, fsdp 2, in the last": (2, ["model=tiny", *EIGHT, "train.reduce_gradients=last"]),
    "llama_20m, fsdp 2, reduced in each": (2, ["model=llama_20m", *EIGHT]),
    "llama_20m, fsdp 2, in the last": (2, ["model=llama_20m", *EIGHT, "train.reduce_gradients=last"]),
}


def main() -> None:
    print("memory of a worker above its baseline and time of a step, predicted and measured (fp32)", flush=True)
    wanted = sys.argv[1:] or list(CASES)
    for name, (processes, overrides) in [(name, CASES[name]) for name in wanted]:
        tight = measure(processes, overrides, {"MALLOC_MMAP_THRESHOLD_": "131072"})
        usual = measure(processes, overrides, {})
        memory, seconds = predict(compose([*QUIET, *overrides]).config, processes, usual)
        found, kept = (max(rank["bytes"] for rank in ranks) for ranks in (tight, usual))
        step = max(rank["seconds"] for rank in usual)
        print(
            f"  {name:<34} memory {memory / MIB:6.0f} / {found / MIB:6.0f} MiB, ratio {memory / found:.3f} "
            f"(untold C library {kept / MIB:.0f} MiB, ratio {memory / kept:.3f}); "
            f"step {seconds:.2f} / {step:.2f} s, ratio {seconds / step:.2f}",
            flush=True,
        )


def measure(processes: int, overrides: list[str], environment: dict[str, str]) -> list[dict[str, float]]:
    """What each worker reports; they are started as the launcher starts a run's."""
    config = compose([*QUIET, *overrides]).config
    target = resolve(config.hardware)
    with tempfile.TemporaryDirectory() as folder:
        environments = [
            {**target.environment(config.hardware, rank, processes), **environment} for rank in range(processes)
        ]
        command = [sys.executable, __file__, "--worker", folder, *overrides]
        if run_local(command, environments).code:
            raise SystemExit("a worker failed")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(processes)]


def predict(config: RunConfig, processes: int, measured: list[dict[str, float]]) -> tuple[float, float]:
    """Bytes and seconds of a step on chips of the rates that the workers have found."""
    flops = min(rank["flops"] for rank in measured)
    bandwidth = min(rank["bandwidth"] for rank in measured)
    cluster = Cluster(_machine(flops, bandwidth, processes), processes)
    train, layout = config.train, config.layout
    shape = ModelShape.of(config.model, vocab=int(measured[0]["vocabulary"]))
    job = JobSpec(
        shape,
        train.seq_len,
        train.global_batch_tokens,
        precision="fp32",
        stack="orchestrator",
        loss_chunk_tokens=train.loss_chunk_tokens,
        document_mask=config.data.document_mask,
    )
    sequences = train.global_batch_tokens // train.seq_len // processes
    micro_batch = sequences if train.micro_batch_size == "auto" else train.micro_batch_size
    fsdp = processes if layout.fsdp == "auto" else layout.fsdp
    plan = ParallelPlan(
        fsdp=fsdp,
        micro_batch=micro_batch,
        remat=train.remat,
        compiled=False,
        reduce_gradients=train.reduce_gradients,
    )
    # What was measured is what can be had: nothing of it is lost on the way from a peak.
    constants = replace(calibration(cluster.chip, "orchestrator"), achievable=1.0, gemm=1.0)
    return estimate_memory(job, cluster, plan).total, step_time(job, cluster, plan, constants).step


def _machine(flops: float, bandwidth: float, processes: int) -> Chip:
    def figure(value: float | None, unit: str) -> Figure:
        return Figure(value, unit, "measured by scripts/bench plan_product")

    memory = host.ram_bytes()
    return replace(
        load_catalogue().get("cpu-generic"),
        fp32_flops=figure(flops, "FLOP/s"),
        bf16_flops=figure(flops, "FLOP/s"),
        hbm_bytes=figure(memory / processes if memory else None, "bytes"),
        hbm_bandwidth=figure(bandwidth, "bytes/s"),
        intra_bandwidth=figure(bandwidth / 2, "bytes/s"),  # gloo's loopback: a copy out of memory and one into it
    )


# --- the worker -------------------------------------------------------------------------------------


def work(folder: Path, overrides: list[str]) -> None:
    """Train, and write down what it took."""
    import torch

    from orchestrator.data.prepare import prepare
    from orchestrator.observe.gemm import measure_gemm_flops

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    world = detect(os.environ) or World()
    config = compose([*QUIET, *overrides]).config
    _train(compose([*QUIET, *TINY, "layout.fsdp=1"]).config, World(), folder / f"tiny{world.rank}")
    facts: dict[str, float] = {
        "flops": measure_gemm_flops(torch.device("cpu"), torch.float32, seconds=1.0),
        "bandwidth": _copy_rate(),
        "vocabulary": prepare(config.data).vocab_size,
    }
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    steps = _train(config, world, folder / f"run{world.rank}")
    facts |= {"bytes": _status("VmHWM") - before, "seconds": statistics.median(steps[WARMUP:])}
    (folder / f"{world.rank}.json").write_text(json.dumps(facts))


def _train(config: RunConfig, world: World, run_dir: Path) -> list[float]:
    """Seconds of each step of a run like any other."""
    import lightning.pytorch as lightning
    from common import resolved_in

    from orchestrator.data.prepare import prepare
    from orchestrator.training.job import build, make_strategy

    ends: list[float] = []

    class Clock(lightning.Callback):
        def on_train_batch_end(self, *unused: Any) -> None:
            ends.append(time.perf_counter())

    run_dir.mkdir()
    data = prepare(config.data)
    resolved = resolved_in(config, world, data, run_dir)
    parallel = make_strategy(resolved, resolved.target(), world)
    parallel.join()
    job = build(resolved, parallel, data, leg=0)
    job.trainer.callbacks.append(Clock())
    # What the run does after its last step is not a step.
    late = (job.watchers.checkpoints, job.watchers.samples)
    job.trainer.callbacks = [one for one in job.trainer.callbacks if one not in late]
    job.trainer.fit(job.module, job.loader)
    job.watchers.channels.close()
    job.watchers.checkpoints.close()
    parallel.leave()
    return [after - before for before, after in itertools.pairwise(ends)]


def _status(name: str) -> int:
    """Bytes, of a line of this process's status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def _copy_rate() -> float:
    """Bytes per second that a copy reads and writes, the best of some: a piece of memory beyond all caches."""
    import torch

    source = torch.zeros(64 * MIB)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - begin)
    return 2 * source.nbytes / best


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
