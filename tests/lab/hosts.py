"""One process of an XLA job over several pretended hosts: `python -m tests.lab.hosts '{...}'`.

torch_xla's CPU client joins no other process (its GetPjRtCpuClient is given no other ones: csrc/runtime/
pjrt_registry.cpp), so every process here computes the whole job on virtual devices of its own. All the rest is a
job's: the processes meet, agree, vote and stop together, and each writes only the shards of the devices that are
counted as its host's.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from tests.lab.run_server import ROOT


def start_hosts(size: int, overrides: list[list[str]] | list[str], **request: Any) -> list[subprocess.Popen[str]]:
    """Start the processes, with overrides of their own or the same ones."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PJRT_DEVICE": "CPU", "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    processes = []
    for rank in range(size):
        words = overrides[rank] if isinstance(overrides[0], list) else overrides
        (devices,) = [word.partition("=")[2] for word in words if word.startswith("hardware.simulate=")]
        text = json.dumps({"rank": rank, "size": size, "port": port, "overrides": words, **request})
        command = [sys.executable, "-W", "ignore", "-m", "tests.lab.hosts", text]
        process = subprocess.Popen(
            command, cwd=ROOT, env={**environment, "CPU_NUM_DEVICES": devices},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        processes.append(process)
    return processes


def finish(processes: list[subprocess.Popen[str]], seconds: float = 300) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each."""
    try:
        outputs = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def made_up_slices(devices: int, slices: int) -> list[dict[str, Any]]:
    """Attributes of slices of two rows of chips each, which are numbered as no mesh has them."""
    each = devices // slices
    chips = [
        {"coords": [place % 2, place // 2, 0], "core_on_chip": 0, "slice_index": index}
        for index in reversed(range(slices))
        for place in reversed(range(each))
    ]
    return [{"name": f"TPU:{number}", **chip} for number, chip in enumerate(chips)]


def _main() -> int:
    import torch_xla.distributed.spmd as xs
    import torch_xla.runtime as xr

    from orchestrator.checkpoint.checkpoint import Checkpoint
    from orchestrator.config.compose import compose
    from orchestrator.data.prepare import prepare
    from orchestrator.distributed.world import World
    from orchestrator.errors import UserError
    from orchestrator.hardware.target_table import resolve
    from orchestrator.launch.plan import Plan
    from orchestrator.launch.run import Opened, joined, train
    from orchestrator.launch.start import agree
    from orchestrator.training.resolved import resolve_run

    request = json.loads(sys.argv[1])
    rank, size, config = request["rank"], request["size"], compose(request["overrides"]).config
    devices = config.hardware.simulate
    world = World(rank, size, 0, 1, f"tcp:localhost:{request['port']}" if size > 1 else "", engine="test")
    target = resolve(config.hardware)
    checkpoint = Checkpoint(Path(request["resume"])) if "resume" in request else None
    plan = Plan(config, target, checkpoint=checkpoint, resumes=checkpoint is not None)
    whole = xs.XLAShardedTensor.local_shards.fget

    def local_shards(tensor: Any) -> Any:
        shards = whole(tensor)
        for shard in shards:
            if int(shard.shard_device.rpartition(":")[2]) * size // devices != rank:
                shard.replica_id += devices  # of another host's device
        return shards

    with contextlib.ExitStack() as held:
        held.enter_context(mock.patch.object(xs.XLAShardedTensor, "local_shards", property(local_shards)))
        held.enter_context(mock.patch.object(xr, "process_count", return_value=request.get("processes", size)))
        if "slices" in request:
            places = made_up_slices(devices, request["slices"])
            held.enter_context(mock.patch.object(xr, "global_runtime_device_attributes", return_value=places))
        try:
            resolved = resolve_run(config, target, devices, prepare(config.data, progress=False).vocab_size)
            with joined(resolved, world, target) as (parallel, monitor):
                resolved = agree(plan, resolved, parallel, held)
                return train(resolved, parallel, monitor, Opened(target, plan.trusted, checkpoint=checkpoint))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code


if __name__ == "__main__":
    sys.exit(_main())
