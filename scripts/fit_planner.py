"""Fit the constants of `planner/evidence/calibration.yaml` to published runs; held-out families are never read.

`scripts/fit_planner` prints what it found and, with `--write`, puts it into the file. Constants move in log (rates,
seconds) or logit (shares) from where `START` has them, each held by a prior, so that a constant that the runs say
nothing of stays where the literature has it. First all stacks of a vendor together, then each stack from there.
Residuals are log(predicted / measured), softened (Huber) and weighted so that a family counts as the root of its rows.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from orchestrator.planner.estimate.memory import step_memory
from orchestrator.planner.estimate.time import step_time
from orchestrator.planner.evidence import calibration
from orchestrator.planner.evidence.published import PublishedRun, held_out_families, shipped

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "planner" / "data"
SHARES = {
    "tensor_hidden", "context_hidden", "expert_hidden", "pipeline_hidden", "replicate_hidden", "selective_recompute",
    "offload_recompute", "fsdp_hidden", "selective_kept",
}  # fmt: skip
SOFT = 0.1
UNMOVED = 0.1
"""Share of its prior's width below which a constant is not written: the runs had nothing to say of it."""
MARGIN = 0.05
"""By how much an estimate should be on the right side of the capacity."""
MISSED = 2.0
"""Weight of too little memory: a run that dies costs more than a layout that was not tried."""


@dataclass
class Constant:
    """One number of the file: where it is, how it moves, and how far the prior lets it."""

    place: tuple[str, ...]
    sigma: float

    @property
    def name(self) -> str:
        return self.place[-1]

    def read(self, data: dict[str, Any]) -> float:
        """Where it stands now, also where the file leaves it to the vendor or to the class."""
        level, name, *rest = self.place
        stack = name if level == "stacks" else next(k for k, v in data["stacks"].items() if v["vendor"] == name)
        if level == "vendors":
            data = {**data, "stacks": {stack: {"vendor": name}}}
        value = float(getattr(calibration.parse(data, stack, rest[1] if rest[0] == "chips" else ""), self.name))
        return math.log(value / (1 - value)) if self.name in SHARES else math.log(value)

    def write(self, data: dict[str, Any], moved: float) -> None:
        for key in self.place[:-1]:
            data = data.setdefault(key, {})
        value = 1 / (1 + math.exp(-moved)) if self.name in SHARES else math.exp(moved)
        data[self.place[-1]] = float(f"{value:.4g}")


def time_residual(run: PublishedRun, constants: calibration.Calibration) -> float:
    assert run.seconds is not None
    return math.log(step_time(run.job, run.cluster, run.plan, constants).step / run.seconds)


def memory_residual(run: PublishedRun, constants: calibration.Calibration) -> float:
    """log(predicted / measured); where only the verdict is known, by how much the estimate is on the wrong side."""
    estimate = step_memory(run.job, run.cluster, run.plan, constants)
    if run.memory is not None:
        off = math.log(estimate.total / run.memory)
    else:
        assert estimate.capacity is not None
        over = math.log(estimate.total / estimate.capacity)
        off = min(0.0, over - MARGIN) if run.out_of_memory else max(0.0, over + MARGIN)
    return MISSED * off if off < 0 else off


def fit(
    data: dict[str, Any],
    runs: Sequence[PublishedRun],
    constants: Sequence[Constant],
    residual: Callable[[PublishedRun, calibration.Calibration], float],
    soft: float = SOFT,
    rounds: int = 25,
) -> dict[str, Any]:
    """Levenberg-Marquardt with a Huber loss and Gaussian priors; returns the data with the constants moved."""
    start = np.array([constant.read(data) for constant in constants])
    sigma = np.array([constant.sigma for constant in constants])
    sizes: dict[str, int] = {}
    for run in runs:
        sizes[run.family] = sizes.get(run.family, 0) + 1
    weight = np.array([sizes[run.family] ** -0.25 for run in runs])

    def residuals(point: np.ndarray) -> np.ndarray:
        moved = copy.deepcopy(data)
        for constant, value in zip(constants, point, strict=True):
            constant.write(moved, value)
        known: dict[tuple[str, str], calibration.Calibration] = {}
        found = []
        for run in runs:
            key = (run.job.stack, run.cluster.chip.key)
            if key not in known:
                known[key] = calibration.parse(moved, *key)
            found.append(residual(run, known[key]))
        return np.array(found) * weight / soft

    def loss(point: np.ndarray, raw: np.ndarray) -> float:
        size = np.abs(raw)
        return float(np.sum(np.where(size < 1, raw**2, 2 * size - 1)) + np.sum(((point - start) / sigma) ** 2))

    point, damping = start.copy(), 1e-2
    raw = residuals(point)
    best = loss(point, raw)
    for _ in range(rounds):
        step = 1e-3
        jacobian = np.stack([(residuals(point + step * unit) - raw) / step for unit in np.eye(len(point))], axis=1)
        robust = 1 / np.maximum(1.0, np.abs(raw))
        normal = jacobian.T @ (robust[:, None] * jacobian) + np.diag(1 / sigma**2)
        slope = jacobian.T @ (robust * raw) + (point - start) / sigma**2
        for _ in range(8):
            candidate = point - np.linalg.solve(normal + damping * np.diag(np.diag(normal)), slope)
            candidate = np.clip(candidate, start - 4 * sigma, start + 4 * sigma)
            tried = residuals(candidate)
            value = loss(candidate, tried)
            if value < best:
                break
            damping *= 4
        else:
            break
        gain, point, raw, best, damping = best - value, candidate, tried, value, damping / 4
        if gain < 1e-4 * best:
            break
    result = copy.deepcopy(data)
    for constant, moved, first in zip(constants, point, start, strict=True):
        if abs(moved - first) > UNMOVED * constant.sigma:
            constant.write(result, moved)
    return result


VENDOR_CONSTANTS = {
    "gemm": 0.15, "gemm_fp8": 0.15, "gemm_traffic": 0.5, "attention": 0.4, "elementwise": 0.4, "layer_seconds": 0.7,
    "tensor_hidden": 1.0, "pipeline_hidden": 1.0, "fsdp_hidden": 1.0, "replicate_hidden": 1.0, "expert_hidden": 1.0,
    "context_hidden": 0.7, "expert_gemm": 0.5, "straggler": 0.7, "inter_link": 0.2, "offload_recompute": 0.7,
    "inter_hop": 0.7, "intra_hop": 1.0, "intra_link": 0.15,
}  # fmt: skip
STACK_CONSTANTS = {
    "gemm": 0.2, "gemm_fp8": 0.2, "gemm_traffic": 0.4, "attention": 0.5, "elementwise": 0.3, "layer_seconds": 0.7,
    "step_seconds": 0.7, "tensor_hidden": 0.7, "pipeline_hidden": 0.7, "fsdp_hidden": 0.7, "replicate_hidden": 0.7,
    "expert_hidden": 0.7, "expert_gemm": 0.4, "intra_hop": 0.7, "intra_link": 0.15, "straggler": 0.5,
    "inter_link": 0.3,
}  # fmt: skip
CHIP_CONSTANTS = {"sustained": 0.1, "sustained_fp8": 0.1, "attention_scale": 0.3}
ACHIEVABLE = 0.2
"""Of `achievable`, which stands for the rate of chips that the catalogue has no measured one of."""
STACK_CHIP_CONSTANTS = {
    # Triton's attention of 2023 was not made for Hopper.
    ("composer", "h100-sxm"): {"attention_scale": 0.5, "sustained": 0.1},
    # Before CUDA graphs of sparse layers, x86 hosts could not launch a small micro-batch's kernels in time.
    ("megatron-2025", "b200"): {"expert_seconds": 0.5, "sustained_fp8": 0.1},
    ("megatron-2025", "b300"): {"expert_seconds": 0.5},
    ("megatron-2025", "h100-sxm"): {"sustained_fp8": 0.1},
}


ROWS_OF_A_VENDOR = 10
VENDOR_MEMORY_CONSTANTS = {"kept": 0.2, "logit_bytes": 0.3, "context_bytes": 0.5, "fragmentation": 0.5}
MEMORY_CONSTANTS = {
    "kept": 0.2, "logit_bytes": 0.3, "context_bytes": 0.5, "fragmentation": 0.5, "gradient_bytes": 0.1,
    "optimizer_bytes": 0.1,
}  # fmt: skip


def chip_constants(vendor: str, runs: Sequence[PublishedRun]) -> list[Constant]:
    """One set per chip that has runs; the fp8 rate only where some ran in fp8."""
    constants = []
    if not all(run.cluster.chip.achievable_bf16_flops.known for run in runs):
        constants.append(Constant(("vendors", vendor, "constants", "achievable"), ACHIEVABLE))
    chips = sorted({run.cluster.chip.key for run in runs})
    for key in chips:
        own = [run for run in runs if run.cluster.chip.key == key]
        names = dict(CHIP_CONSTANTS)
        if len(chips) == 1 or not any(run.job.precision == "fp8" for run in own):
            del names["sustained_fp8"]
        constants += [Constant(("vendors", vendor, "chips", key, name), sigma) for name, sigma in names.items()]
    return constants


def fit_times(data: dict[str, Any], runs: Sequence[PublishedRun]) -> dict[str, Any]:
    timed = [run for run in runs if run.seconds is not None]
    for vendor in ("nvidia", "amd", "google", "aws"):
        ours = [run for run in timed if run.vendor == vendor]
        place = ("vendors", vendor)
        constants = [Constant((*place, "constants", name), sigma) for name, sigma in VENDOR_CONSTANTS.items()]
        constants += chip_constants(vendor, ours)
        data = fit(data, ours, constants, time_residual)
        data["vendors"][vendor]["fitted_to"] = account(data, ours)
        for stack in sorted({run.job.stack for run in ours}):
            own = [run for run in ours if run.job.stack == stack]
            constants = [Constant(("stacks", stack, "constants", name), s) for name, s in STACK_CONSTANTS.items()]
            for (of, chip), names in STACK_CHIP_CONSTANTS.items():
                if of == stack:
                    constants += [Constant(("stacks", of, "chips", chip, name), s) for name, s in names.items()]
            data = fit(data, own, constants, time_residual)
            data["stacks"][stack]["fitted_to"] = account(data, own)
    return data


def account(data: dict[str, Any], runs: Sequence[PublishedRun]) -> dict[str, Any]:
    """What a set of constants was fitted to, and how well it does there."""
    sizes = [
        abs(math.expm1(time_residual(run, calibration.parse(data, run.job.stack, run.cluster.chip.key))))
        for run in runs
    ]
    return {
        "date": str(date.today()),
        "rows": len(runs),
        "families": sorted({run.family for run in runs}),
        "median_error_of_fitted_rows": round(float(np.median(sizes)), 4),
    }


def fit_memories(data: dict[str, Any], runs: Sequence[PublishedRun]) -> dict[str, Any]:
    told = [run for run in runs if run.memory is not None or run.out_of_memory is not None]
    for vendor in sorted({run.vendor for run in told}):
        ours = [run for run in told if run.vendor == vendor]
        if len(ours) >= ROWS_OF_A_VENDOR:
            place = ("vendors", vendor, "constants")
            constants = [Constant((*place, name), sigma) for name, sigma in VENDOR_MEMORY_CONSTANTS.items()]
            data = fit(data, ours, constants, memory_residual, SOFT / 2)
    for stack in sorted({run.job.stack for run in told}):
        own = [run for run in told if run.job.stack == stack]
        constants = [Constant(("stacks", stack, "constants", name), s) for name, s in MEMORY_CONSTANTS.items()]
        if any(not run.plan.compiled and run.out_of_memory is not None for run in own):
            constants.append(Constant(("stacks", stack, "constants", "eager_kept"), 0.3))
        data = fit(data, own, constants, memory_residual, SOFT / 2)
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace orchestrator/planner/evidence/calibration.yaml")
    options = parser.parse_args()
    runs, _ = shipped(DATA)
    held = held_out_families(runs)
    seen = [run for run in runs if run.family not in held]
    data = yaml.safe_load((ROOT / "scripts" / "planner_priors.yaml").read_text(encoding="utf-8"))
    data = fit_memories(fit_times(data, seen), seen)
    if options.write:
        header = (
            "# Written by scripts/fit_planner --write, not by hand. Priors: scripts/planner_priors.yaml.\n"
            "# Meaning: planner/evidence/calibration.py. Loss: log(predicted / measured), Huber beyond 10%.\n"
        )
        calibration.FILE.write_text(header + yaml.safe_dump(data, sort_keys=False, width=120), encoding="utf-8")


if __name__ == "__main__":
    main()
