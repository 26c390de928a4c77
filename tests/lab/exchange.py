"""Load checkpoints on one layout and save them again, with the loss of the next batch and a digest of its tokens."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any


def merged(results: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What all ranks of `_work` found, as one: for each source the path written, the loss and the digest."""
    found = results[0]
    for number, entry in enumerate(found):
        # Ranks of one data share read the same rows: each counts once.
        rows = {row for result in results for row in result[number]["tokens"]}
        entry["tokens"] = hashlib.sha256("".join(sorted(rows)).encode()).hexdigest()
    return found


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
        shards = parallel.state_shards(job.module.model, job.module.optimizer)
        path = save(folder, 10, shards, parallel, Contents({}, {}))
        batch = job.loader.step(job.module.step)
        placed = parallel.prepare_batch(batch)
        job.module.model.eval()  # without the losses of routers, as the rows have it
        targets = parallel.sum_over_data((placed["targets"] != -100).sum())
        with torch.no_grad(), parallel.forward_context():
            part = job.module.model(**placed) / targets
        (loss,) = parallel.fetch([parallel.sum_over_data(part.detach())])
        results.append({"path": str(path), "loss": loss, "tokens": [row.tobytes().hex() for row in batch["tokens"]]})
        job.watchers.channels.close()
    parallel.leave()
    return results
