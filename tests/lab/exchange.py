"""Load checkpoints on one layout and save them again, in a process of its own: an environment and a device count each.

    python -m tests.lab.exchange '{"overrides": [...], "size": 4, "sources": [...], "target": "..."}'

prints JSON: for each source the path written, the loss of the next batch and a digest of its tokens.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.lab.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]


def exchange(python: str, overrides: list[str], size: int, sources: list[Path], target: Path) -> list[dict[str, Any]]:
    """What `python` makes of each checkpoint of `sources`, on `size` ranks."""
    from orchestrator.config.compose import compose
    from orchestrator.hardware.target_table import get_target

    hardware = compose(overrides).config.hardware
    environment = get_target(hardware.target).environment(hardware, 0, size)
    request = {"overrides": overrides, "size": size, "sources": [str(path) for path in sources], "target": str(target)}
    command = [python, "-W", "ignore", "-m", "tests.lab.exchange", json.dumps(request)]
    import os

    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


def _main() -> None:
    request = json.loads(sys.argv[1])
    arguments = (request["overrides"], request["sources"], Path(request["target"]))
    if request["size"] == 1:
        from orchestrator.distributed.world import World

        results = [_work(World(), *arguments)]
    else:
        results = run_ranks(request["size"], _work, *arguments)
    merged = results[0]
    for number, entry in enumerate(merged):
        # Ranks of one data share read the same rows: each counts once.
        rows = {row for result in results for row in result[number]["tokens"]}
        entry["tokens"] = hashlib.sha256("".join(sorted(rows)).encode()).hexdigest()
    print(json.dumps(merged))


def _work(world: Any, overrides: list[str], sources: list[str], target: Path) -> list[dict[str, Any]]:
    import torch

    from orchestrator.checkpoint.writer import Contents, save
    from orchestrator.config.compose import compose
    from orchestrator.data.prepare import prepare
    from orchestrator.runs.run_directory import RunPaths
    from orchestrator.training.job import build, make_strategy
    from tests.lab.runs import resolved_run

    config = compose(overrides).config
    resolved = resolved_run(config, world)
    parallel = make_strategy(resolved, resolved.target(), world)
    parallel.join()
    data = prepare(config.data, progress=False)
    results = []
    for number, source in enumerate(sources):
        folder = target / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        job = build(replace(resolved, paths=RunPaths(folder, folder, Path(source))), parallel, data, leg=0)
        shards = parallel.state_shards(job.module.model, job.module._optimizer)
        path = save(folder, 10, shards, parallel, Contents({}, {}))
        batch = job.loader.step(job.module.step)
        placed = parallel.prepare_batch(batch)
        targets = parallel.sum_over_data((placed["targets"] != -100).sum())
        with torch.no_grad(), parallel.forward_context():
            part = job.module.model(**placed) / targets
        (loss,) = parallel.fetch([parallel.sum_over_data(part.detach())])
        results.append({"path": str(path), "loss": loss, "tokens": [row.tobytes().hex() for row in batch["tokens"]]})
        job.watchers.channels.close()
    parallel.leave()
    return results


if __name__ == "__main__":
    _main()
