"""Rehearse from Python: whether a run fits a TPU, by Google's own compiler and without a TPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.api.configs import Configuration, to_composed
from orchestrator.config.schema import MuonConfig, RunConfig
from orchestrator.data.prepare import prepare
from orchestrator.errors import UserError
from orchestrator.hardware.target import Target
from orchestrator.hardware.target_table import resolve
from orchestrator.installing import importable
from orchestrator.interop.imported_source import with_imported
from orchestrator.rehearsal.tpu_compiler import CompileTopology, Verdict, compile_program, count_devices
from orchestrator.runs.init_from import settle
from orchestrator.runs.messages import warn
from orchestrator.training.check import check_run
from orchestrator.training.resolved import Resolved, resolve_run, write_resolved


@dataclass(frozen=True)
class Rehearsal:
    """The result of a rehearsal: facts of the staged program, and the compiler's verdict on it."""

    devices: int
    precision: str
    staged: dict[str, Any]
    verdict: Verdict


def rehearse(
    config: Configuration,
    topology: str,
    *,
    timeout_seconds: float = 1800.0,
    config_dir: str | Path | None = None,
) -> Rehearsal:
    """Compile the training step of a run for a TPU, on a machine without one.

    Needs torch_xla in this Python's environment, and the compiler's environment (`scripts/setup tpu-compiler`).

    Args:
        config: of the run, as for `train`; `hardware=tpu` is implied.
        topology: chips and how they are wired, such as `v5e:16x16`.
        timeout_seconds: of the staging and of the compiler, each.
        config_dir: as for `compose`, where `config` is overrides.

    Returns:
        The verdict (`.verdict.status`: `fits`, `does not fit` or `unknown`) and the facts of the staged program.

    Raises:
        UserError: what of the configuration, the topology or the environments is wrong.
    """
    return rehearse_config(
        settle(with_imported(to_composed(config, config_dir)), False, warn), topology, timeout_seconds
    )


def rehearse_config(config: RunConfig, topology: str, timeout_seconds: float) -> Rehearsal:
    """Stage the step of `config` for a topology and compile it.

    Args:
        config: of the run.
        topology: such as `v5e:4x4`.
        timeout_seconds: of the staging and of the compiler, each.

    Raises:
        UserError: what of the configuration, the topology or the environments is wrong.
    """
    slices = CompileTopology.parse(topology).slices
    devices = count_devices(topology)
    precision = "bf16" if config.hardware.precision == "auto" else config.hardware.precision
    hardware = replace(config.hardware, target="tpu", simulate=devices, devices="auto", precision=precision)
    config = replace(config, hardware=hardware)
    target = resolve(hardware)
    check_run(config, devices, slices=slices, strategy=target.strategy)
    vocab_size = config.model.vocab_size
    if vocab_size == "auto":
        vocab_size = prepare(config.data, progress=True).vocab_size
        check_run(config, devices, vocab_size, slices, target.strategy)
    if isinstance(config.optim, MuonConfig) and config.optim.ns_dtype == "auto":
        # Of the chip, not of the CPU that pretends to be one.
        config = replace(config, optim=replace(config.optim, ns_dtype="bf16"))
    resolved = resolve_run(config, target, devices, vocab_size)
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        staged, reason = _stage(resolved, target, Path(folder), timeout_seconds)
        if reason:
            verdict = Verdict("unknown", reason)
        else:
            verdict = compile_program(Path(folder, "step.mlir"), topology, timeout_seconds, staged["degrees"])
    return Rehearsal(devices, precision, staged, verdict)


def _stage(resolved: Resolved, target: Target, folder: Path, timeout_seconds: float) -> tuple[dict[str, Any], str]:
    """Let a process write the program into `folder`. Returns its facts, or why there are none."""
    write_resolved(folder, resolved)
    # The mesh has all devices; the runtime is asked for nothing and needs only more than one.
    environment = {
        **os.environ,
        **importable(),
        **target.environment(resolved.config.hardware, 0, 1),
        "CPU_NUM_DEVICES": "2",
    }
    command = [sys.executable, "-m", "orchestrator.rehearsal.stage", str(folder)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        return {}, f"writing the step down was stopped after {timeout_seconds:g} s (timeout_seconds)"
    if done.returncode == UserError.exit_code:
        raise UserError(done.stderr.partition("error: ")[2].strip() or done.stderr)
    if done.returncode:
        return {}, f"writing the step down failed: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}"
    facts: dict[str, Any] = json.loads((folder / "staged.json").read_text())
    return facts, ""
