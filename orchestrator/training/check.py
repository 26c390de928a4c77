"""Check a run before a device is touched or a process started. No torch."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.config.batch_sizes import BatchSizes
from orchestrator.config.schema import ModelConfig, RunConfig
from orchestrator.errors import ConfigError, ConfigErrors, LayoutError, UserError
from orchestrator.hardware.mesh import slices_problem
from orchestrator.runs.own_parts import own_indivisible
from orchestrator.sharding.axes import MESH_AXES
from orchestrator.sharding.layout import Layout, check_layout, resolve_layout
from orchestrator.sharding.pipeline import check_pipeline, no_pipelines


def check_run(
    config: RunConfig, devices: int, vocab_size: int | None = None, slices: int = 1, strategy: str = "dtensor"
) -> None:
    """Check the layout against the devices, the model, the batch and, if it is known yet, the tokenizer.

    Args:
        config: of the run.
        devices: of the job.
        vocab_size: tokens of the tokenizer; None while it is not known.
        slices: groups of devices between which the network is slow.
        strategy: of the hardware target, `dtensor` or `xla`.

    Raises:
        ConfigErrors: all that is wrong.
    """
    problems: list[UserError] = []
    model = config.model
    try:
        if vocab_size is not None:
            model = resolve_model(model, vocab_size)
    except UserError as error:
        problems.append(error)
    try:
        layout = resolve_layout(config.layout, devices)
        problems += _check_strategy(layout, strategy)
        problems += _check_copies(config, layout, strategy)
        train = config.train
        micro_batch = None if train.micro_batch_size == "auto" else train.micro_batch_size
        for tokens in reversed(BatchSizes.of(train).all):
            found = check_layout(layout, model, train.seq_len, tokens)
            share = max(1, tokens // train.seq_len // layout.data_parallel)
            found += check_pipeline(layout, model, share, micro_batch, config.hardware.compile, train.remat)
            known = {str(problem) for problem in problems}
            problems += [problem for problem in found if str(problem) not in known]
        if model._target_ is not None and layout.tensor > 1:
            problems += own_indivisible(model, layout.tensor)
        if problem := slices_problem(layout.replicate, slices):
            problems.append(problem)
    except UserError as error:
        problems.append(error)
    if problems:
        raise ConfigErrors(problems)


def check_elsewhere(config: RunConfig, devices: int, strategy: str, planned: bool) -> None:
    """Check a run that other machines are to train, as far as it does not depend on what they plan.

    Args:
        config: of the run.
        devices: of the job.
        strategy: of the hardware target, `dtensor` or `xla`.
        planned: those machines choose the degrees that are open, where several are.

    Raises:
        ConfigErrors: all that is wrong.
    """
    if config.launch.fault_tolerance == "torchft":
        raise ConfigErrors(
            [
                ConfigError(
                    "replica groups are started, and started again, by the product's own launcher on one machine",
                    got="launch.fault_tolerance=torchft for other machines",
                    fix="set launch.fault_tolerance=restart",
                )
            ]
        )
    opened = [axis for axis in MESH_AXES if getattr(config.layout, axis) == "auto"]
    if len(opened) < 2 or not planned:
        check_run(config, devices, strategy=strategy)


def _check_strategy(layout: Layout, strategy: str) -> list[LayoutError]:
    """List what of the layout the strategy does not have."""
    problems = []
    if strategy == "xla" and layout.context > 1 and layout.context_kind != "gather":
        problems.append(
            LayoutError(
                "on XLA the compiler gathers keys and values over the context axis, and knows no other way",
                got=f"layout.context_kind={layout.context_kind} with layout.context={layout.context}",
                fix="set layout.context_kind=gather",
            )
        )
    if strategy == "xla" and layout.pipeline > 1:
        problems.append(no_pipelines(layout))
    return problems


def _check_copies(config: RunConfig, layout: Layout, strategy: str) -> list[LayoutError]:
    """List why the copies of the model cannot be replica groups of torchft's, where they are to be."""
    if config.launch.fault_tolerance != "torchft":
        return []
    problems = []
    if strategy == "xla":
        problems.append(
            LayoutError(
                "replica groups are of the torch-native strategy; XLA compiles all copies into one program",
                got=f"launch.fault_tolerance=torchft with hardware={config.hardware.target}",
                fix="set launch.fault_tolerance=restart",
            )
        )
    if layout.replicate == 1:
        problems.append(
            LayoutError(
                "with launch.fault_tolerance=torchft the copies of the model are what may be lost, and there is one",
                got=f"layout.replicate=1 on {layout.devices} device{'s' if layout.devices != 1 else ''}",
                allowed="2 or more",
                fix="set layout.replicate=2, or launch.fault_tolerance=restart",
            )
        )
    without = {
        "pipelines": (layout.pipeline > 1, "layout.pipeline", layout.pipeline, "1"),
        "snapshots in memory: each group has the state of the others": (
            *(config.checkpoint.memory.enabled, "checkpoint.memory.enabled", "true", "false"),
        ),
        "rewinds": (config.train.on_nonfinite == "rewind", "train.on_nonfinite", "rewind", "stop"),
        "check of their bits": (
            *(config.train.check_replicas_every is not None, "train.check_replicas_every"),
            *(config.train.check_replicas_every, "null"),
        ),
        "tasks of lm-eval": (bool(config.train.tasks.names), "train.tasks.names", "[...]", "[]"),
        "rewinds at spikes": (config.train.on_spike == "rewind", "train.on_spike", "rewind", "warn"),
    }
    problems += [
        LayoutError(
            f"replica groups have no {what}",
            got=f"{key}={value} with launch.fault_tolerance=torchft",
            fix=f"set {key}={other}, or launch.fault_tolerance=restart",
        )
        for what, (wrong, key, value, other) in without.items()
        if wrong
    ]
    return problems


def resolve_model(config: ModelConfig, vocab_size: int) -> ModelConfig:
    """Fill in the vocabulary.

    An automatic one is the tokenizer's rounded up to a multiple of 128, so that tensor parallelism can cut
    it and matrix units like it; one that is given must hold the tokenizer's.

    Args:
        config: of the model.
        vocab_size: tokens of the tokenizer.

    Raises:
        ConfigError: the tokenizer has more tokens than the model.
    """
    if config.vocab_size == "auto":
        return replace(config, vocab_size=-(-vocab_size // 128) * 128)
    if config.vocab_size < vocab_size:
        raise ConfigError(
            "the model's vocabulary is smaller than the tokenizer's",
            got=f"model.vocab_size={config.vocab_size}, tokenizer {vocab_size}",
            allowed=f"{vocab_size} or more",
            fix="set model.vocab_size=auto, or another tokenizer",
        )
    return config
