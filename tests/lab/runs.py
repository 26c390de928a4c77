"""Small real runs: the real configuration, shrunk, through the real `work` on forked ranks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.config.compose import compose
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.data.prepare import prepare
from orchestrator.distributed.world import World
from orchestrator.hardware.target_table import job_devices, resolve
from orchestrator.runs.resume import is_checkpoint
from orchestrator.runs.run_directory import RunPaths
from orchestrator.training.resolved import Resolved, resolve_run
from tests.lab.ranks import run_ranks

STEPS = 20
# A model of every feature would hide which one breaks; these are small and plain, tests add what they need.
SMALL = (
    "model.dim=64",
    "model.layers=2",
    "model.heads=4",
    "model.kv_heads=2",
    "model.mlp_dim=96",
    "data.tokenizer.kind=bytes",
    f"train.max_steps={STEPS}",
    "train.seq_len=64",
    "train.global_batch_tokens=512",
    "train.eval_every=null",
    "train.eval_tokens=1024",
    "train.sample.tokens=4",
    "optim.schedule.warmup_steps=5",
    "checkpoint.every_steps=10",
    "logger.every_steps=1",
    "logger.progress=false",
    "logger.tensorboard=false",
    "hardware=cpu",
    "hardware.threads=1",
)
# The same once more, smaller: where what happens around the steps is tested, and not what they compute.
TINY = (
    "model.dim=32",
    "model.layers=1",
    "train.seq_len=32",
    "train.global_batch_tokens=128",
    "train.eval_tokens=128",
    "train.sample.tokens=1",
)


def write_corpus(folder: Path) -> str:
    """Documents of different lengths, always the same; returns the glob of its files."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "39.txt").exists():
        return str(folder / "*.txt")  # another run may be reading it
    for number in range(40):
        lines = [
            f"def f{number}_{line}(x):\n    return x * {line * number % 97} + {line}\n"
            for line in range(number % 9 + 2)
        ]
        (folder / f"{number:02d}.txt").write_text("\n".join(lines))
    return str(folder / "*.txt")


def small_overrides(tmp: Path, *overrides: str) -> list[str]:
    """Overrides of a run that takes seconds and touches nothing outside `tmp`."""
    corpus = write_corpus(tmp / "corpus")
    places = [
        f"runs_dir={tmp / 'runs'}",
        f"data.cache_dir={tmp / 'cache'}",
        f"data.sources=[{{path:'{corpus}',weight:1}}]",
    ]
    return [*SMALL, *places, *overrides]


def small_config(tmp: Path, *overrides: str) -> RunConfig:
    return compose(small_overrides(tmp, *overrides)).config


def resolved_run(
    config: RunConfig,
    world: World,
    run_dir: Path | None = None,
    resume_from: Path | None = None,
    checkpoints: Any = None,
    vocab_size: int | None = None,
) -> Resolved:
    """What a launcher makes of `config`, which has looked for no run and opened no directory."""
    target = resolve(config.hardware)
    vocab_size = vocab_size or prepare(config.data, progress=False).vocab_size
    result = resolve_run(config, target, job_devices(config.hardware, target, world), vocab_size)
    paths = None if run_dir is None else RunPaths(run_dir, checkpoints or run_dir / "checkpoints", resume_from)
    return replace(result, paths=paths, takes_older=config.resume is not None and not is_checkpoint(config.resume))


def train(config: RunConfig, size: int, run_dir: Path, resume_from: Path | None = None) -> list[dict[str, Any]]:
    """Train on `size` forked ranks; returns the rows of metrics.jsonl."""
    work_ranks(config, size, run_dir, resume_from)
    return read_rows(run_dir)


def work_ranks(config: RunConfig, size: int, run_dir: Path, resume_from: Path | None = None) -> list[int]:
    """Train on `size` forked ranks; returns their exit codes."""
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_ranks(size, _work, to_dict(config), run_dir, resume_from)


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(rows: Iterable[dict[str, Any]]) -> list[float]:
    """Training losses by step; where legs overlap the later one counts."""
    return [loss for _, loss in sorted({row["step"]: row["loss"] for row in rows if "loss" in row}.items())]


def assert_trained_alike(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], relative: float) -> None:
    """The same 20 losses and the evaluation within `relative`, and the same gradient norms within 1e-4."""
    assert len(losses(ours)) == 20
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=relative)
    norms = [[row["grad_norm"] for row in rows if "loss" in row] for rows in (ours, theirs)]
    np.testing.assert_allclose(*norms, rtol=1e-4)
    evaluations = [[row["val_loss"] for row in rows if "val_loss" in row] for rows in (ours, theirs)]
    assert len(evaluations[0]) == 1
    np.testing.assert_allclose(*evaluations, rtol=relative)


def checkpoint(run_dir: Path, step: int = STEPS) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def _work(world: World, data: dict[str, Any], run_dir: Path, resume_from: Path | None) -> int:
    from orchestrator.launch.run import work

    return work(resolved_run(from_dict(RunConfig, data), world, run_dir, resume_from), world)
