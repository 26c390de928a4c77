"""A run without open choices: resolved once, by the launcher, and read by every process. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from orchestrator.atomic_files import write_atomically
from orchestrator.checkpoint.format import parse_json
from orchestrator.checkpoint.storage import locate
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import HandoverConfig, LayoutConfig, ModelConfig, MuonConfig, OptimConfig, RunConfig
from orchestrator.config.transfer import settle_transfer
from orchestrator.config.validate import check_stored
from orchestrator.data.prepare import PreparedData
from orchestrator.errors import ConfigError, UserError
from orchestrator.hardware.target import Target
from orchestrator.hardware.target_table import target_of
from orchestrator.planner.estimate.stages import balance_stages, stage_costs
from orchestrator.planner.spec import ModelShape
from orchestrator.runs.run_directory import RESOLVED, RunPaths
from orchestrator.sharding.axes import MESH_AXES
from orchestrator.sharding.layout import Layout, resolve_layout
from orchestrator.sharding.pipeline import DIVIDED_BACKWARD, micro_batch_of, stages_of
from orchestrator.training.check import resolve_model
from orchestrator.training.layout_choice import Settled, precision_of, settle_layout

Remat = Literal["none", "selective", "full"]
UNKNOWN = "unknown"
_FORMAT, _VERSION = "orchestrator-resolved", 1
_MAX_BYTES = 1 << 24
# Of the handover's sequences: a save holds the training for as long as it takes to measure them.
_STEP_PARTS, _MIN_LENGTH, _MAX_LENGTH = 256, 8, 128

DECIDED = (
    *("hardware.target", "hardware.devices", "hardware.precision", "hardware.chip", "hardware.runtime"),
    *(f"layout.{axis}" for axis in (*MESH_AXES, "schedule", "context_kind")),
    *("layout.virtual_stages", "layout.stage_layers"),
    *("train.micro_batch_size", "train.remat", "model.vocab_size", "optim.ns_dtype"),
    *("data.tokenizer.kind", "checkpoint.handover.seq_len"),
)
"""Keys whose `auto`, or empty list, is decided here."""
LEFT_OPEN = {
    "checkpoint.dir": "`paths.checkpoints` says where",
    "checkpoint.memory.dir": "each host has a memory of its own",
    "data.cache_dir": "each host has a cache of its own",
    "data.tokenizer.bos": "as the tokenizer's own files say, which only reading them shows",
    "data.tokenizer.eos": "likewise",
    "data.workers": "each host has cores of its own",
    "hardware.compilation_cache": "each host has one of its own",
    "islands.outer.lr": "the hub decides for all islands: `islands.terms`",
    "islands.outer.momentum": "likewise",
    "launch.notices": "each host asks the cloud that it is in",
    "hardware.threads": "each host has cores of its own",
    "model.head_dim": "no choice: `ModelConfig.head_width` is the rule",
    "model.moe.mlp_dim": "likewise: `MoEConfig.width`",
    "resume": "a word for a checkpoint, which `paths.resume_from` is",
}
"""Keys whose `auto` stays, and why."""
# What hosts may have of their own. Everything else is the same on all of them, or the job is not one.
_OF_A_HOST = (
    *("checkpoint.dir", "checkpoint.memory.dir", "checkpoint.model_signing_key", "checkpoint.require_signature"),
    *("checkpoint.signing_key", "checkpoint.trusted_keys"),
    *("data.cache_dir", "data.sources", "data.tokenizer.path", "data.validation", "data.workers"),
    *("hardware.compilation_cache", "hardware.devices", "hardware.environment", "hardware.threads"),
    *("resume", "run_id", "runs_dir", "train.init_from"),
)


@dataclass(frozen=True)
class Resolved:
    """What a run is, decided.

    Attributes:
        config: of the run, with the keys of `DECIDED` filled in: target, devices of a host, precision, chip (`unknown`
            where it is), layout, micro-batch, remat, vocabulary and some more.
        asked: the configuration as the user gave it. It is kept in the run directory and travels with checkpoints:
            on other devices it is resolved anew.
        devices: of the whole job; the product of the layout's degrees.
        data: fingerprint of the data that the run was checked against; empty where there was none.
        why: how the layout was found, in a line; empty where nothing was planned.
        takes_older: a damaged checkpoint may be replaced by an older one of its run. Not where the user has named it.
        paths: where the run is kept, and the checkpoint that it goes on from. None before its directory is opened, and
            where none is made (a rehearsal).
    """

    config: RunConfig
    asked: RunConfig
    devices: int
    data: str = ""
    why: str = ""
    takes_older: bool = False
    paths: RunPaths | None = None

    @property
    def layout(self) -> Layout:
        """Degrees of the mesh axes, none of them open."""
        return resolve_layout(self.config.layout, self.devices)

    @property
    def precision(self) -> str:
        """`fp32`, `bf16` or `fp8`: of the matrix products."""
        return self.config.hardware.precision

    @property
    def micro_batch(self) -> int:
        """Sequences per device and backward pass; a step may have fewer."""
        size = self.config.train.micro_batch_size
        assert isinstance(size, int)
        return size

    @property
    def remat(self) -> Remat:
        """Which activations are computed a second time."""
        return cast(Remat, self.config.train.remat)

    @property
    def chip(self) -> str | None:
        """Key of the chip catalogue; None where the chip is not known."""
        return None if self.config.hardware.chip == UNKNOWN else self.config.hardware.chip

    @property
    def place(self) -> RunPaths:
        """The paths of a run whose directory is open."""
        assert self.paths is not None, "the run directory is opened first"
        return self.paths

    def target(self) -> Target:
        """Return the target, in a process that has not found it itself."""
        return target_of(self.config.hardware)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        paths = self.paths
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "config": to_dict(self.config),
            "asked": to_dict(self.asked),
            "devices": self.devices,
            "data": self.data,
            "why": self.why,
            "takes_older": self.takes_older,
            "run_dir": str(paths.run_dir) if paths else None,
            "checkpoints": str(paths.checkpoints) if paths else None,
            "resume_from": str(paths.resume_from) if paths and paths.resume_from is not None else None,
        }

    @classmethod
    def from_dict(cls, data: Any, where: object = "the resolved run") -> Resolved:
        """Take it back from `to_dict`. It may come from a file, so nothing of it is believed.

        Args:
            data: whatever JSON can hold.
            where: it is from, for a message.

        Raises:
            ConfigError: something is missing, of a wrong type, left open, or contradicts the rest.
        """
        problem, fields = _checked(data), data
        if problem:
            raise _not_one(problem, where)
        try:
            config, asked = from_dict(RunConfig, fields["config"]), from_dict(RunConfig, fields["asked"])
            if problems := [*check_stored(config), *check_stored(asked)]:
                raise problems[0]
            run_dir, checkpoints, resume_from = (fields[key] for key in ("run_dir", "checkpoints", "resume_from"))
            paths = None
            if run_dir is not None:
                last = None if resume_from is None else locate(resume_from)
                paths = RunPaths(Path(run_dir), locate(checkpoints), last)
        except UserError as error:
            raise _not_one(str(error), where) from None
        kept = {key: fields[key] for key in ("devices", "data", "why", "takes_older")}
        result = cls(config, asked, paths=paths, **kept)
        if problem := result._contradiction():
            raise _not_one(problem, where)
        return result

    def _contradiction(self) -> str:
        """Return what of it is no decision, or none of what was asked for; empty where all is right."""
        config, asked = dict(flat(to_dict(self.config))), dict(flat(to_dict(self.asked)))
        if still := [key for key in DECIDED if config.get(key) == "auto"]:
            return f"{', '.join(still)} is left open"
        is_open = lambda key, value: key in DECIDED and value in ("auto", [])  # noqa: E731
        asked = {key: config.get(key) if is_open(key, value) else value for key, value in asked.items()}
        if other := sorted(key for key in config.keys() | asked.keys() if config.get(key) != asked.get(key)):
            return f"{', '.join(other)} is not what was asked for"
        try:
            resolve_layout(self.config.layout, self.devices)
        except UserError as error:
            return str(error)
        return ""

    def differences(self, other: Resolved) -> list[str]:
        """List what differs from rank 0's record, but for what each host has of its own.

        Args:
            other: rank 0's record.
        """
        theirs = dict(flat(to_dict(other.config)))
        found = [
            f"{key}={value} (rank 0: {theirs.get(key)})"
            for key, value in flat(to_dict(self.config))
            if value != theirs.get(key) and not any(key == own or key.startswith(f"{own}.") for own in _OF_A_HOST)
        ]
        return found + ([f"data {self.data[:12]} (rank 0: {other.data[:12]})"] if self.data != other.data else [])


def resolve_run(
    config: RunConfig,
    target: Target,
    devices: int,
    vocab_size: int,
    *,
    here: int | None = None,
    settled: Settled | None = None,
    data: PreparedData | None = None,
) -> Resolved:
    """Decide everything that `config` leaves open.

    Args:
        config: checked.
        target: that it runs on.
        devices: of the whole job.
        vocab_size: tokens of the data's tokenizer.
        here: devices of this host; None: all.
        settled: the layout, where it has been planned already.
        data: what the run was checked against.

    Raises:
        LayoutError: the degrees do not fit the devices.
        ConfigError: the tokenizer has more tokens than the model.
    """
    config = settle_transfer(config)
    settled = settled or settle_layout(config, target, devices)
    layout, model = resolve_layout(settled.layout, devices), resolve_model(config.model, vocab_size)
    train, handover = config.train, config.checkpoint.handover
    share = train.global_batch_tokens // train.seq_len // layout.data_parallel
    whole = micro_batch_of(layout, max(1, share)) if layout.pipeline > 1 else max(1, share)
    micro_batch = whole if settled.micro_batch == "auto" else settled.micro_batch
    divided = layout.pipeline > 1 and layout.schedule in DIVIDED_BACKWARD
    remat = "full" if divided and settled.remat == "selective" and train.remat == "auto" else settled.remat
    chip = config.hardware.chip if config.hardware.chip != "auto" else target.probe().chip or UNKNOWN
    hardware = replace(
        config.hardware,
        target=cast(Any, target.name),
        devices=devices if here is None else here,
        precision=cast(Literal["fp32", "bf16", "fp8"], precision_of(config, target)),
        chip=chip,
        runtime=cast(Any, target.runtime),
    )
    optim = settle_optimizer(config.optim, target.device_type == "cpu" or config.hardware.simulate is not None)
    tokenizer = replace(config.data.tokenizer, kind=cast(Any, config.data.tokenizer.made_from))
    decided = replace(
        config,
        hardware=hardware,
        model=model,
        optim=optim,
        layout=_arranged(config.layout, layout, model, train.seq_len),
        checkpoint=replace(config.checkpoint, handover=replace(handover, seq_len=_handover_length(handover, config))),
        train=replace(train, micro_batch_size=micro_batch, remat=remat),
        data=replace(config.data, tokenizer=tokenizer),
    )
    return Resolved(decided, config, devices, data.fingerprint if data else "", settled.why)


def _arranged(config: LayoutConfig, layout: Layout, model: ModelConfig, seq_len: int) -> LayoutConfig:
    """Fill in degrees, and how a pipeline's layers are divided: so that its busiest stage has least to do."""
    layers = layout.stage_layers
    if layout.pipeline > 1 and not layers and model._target_ is None:
        stages = len(stages_of(layout, model.layers))  # says so where there are too few layers
        layers = balance_stages(*stage_costs(ModelShape.of(model), seq_len), stages)
    virtual = layout.virtual_stages if config.virtual_stages == "auto" else config.virtual_stages
    decided = replace(config, **cast(Any, layout.as_dict()), schedule=layout.schedule, context_kind=layout.context_kind)
    return replace(decided, virtual_stages=virtual, stage_layers=layers)


def settle_optimizer(config: OptimConfig, on_cpu: bool) -> OptimConfig:
    """Settle the precision of Muon's iteration: fp32 where a CPU computes it.

    Args:
        config: of the optimizer.
        on_cpu: whether the devices are CPUs.
    """
    if isinstance(config, MuonConfig) and config.ns_dtype == "auto":
        return replace(config, ns_dtype="fp32" if on_cpu else "bf16")
    return config


def settle_unplanned(config: RunConfig) -> RunConfig:
    """Settle without a plan what of `train` is `auto` yet: no remat, one backward pass per step.

    Args:
        config: of a run, settled or not.
    """
    train, size = config.train, config.train.micro_batch_size
    whole = train.global_batch_tokens // train.seq_len
    remat = "none" if train.remat == "auto" else train.remat
    return replace(config, train=replace(train, remat=remat, micro_batch_size=whole if size == "auto" else size))


def settle_vocabulary(config: RunConfig, vocab_size: int | None) -> RunConfig:
    """Settle the size of the model's vocabulary.

    Args:
        config: of a run, settled or not.
        vocab_size: tokens of the tokenizer; None: not known.

    Raises:
        ConfigError: it is not known, or the tokenizer has more tokens than the model.
    """
    if vocab_size is not None:
        return replace(config, model=resolve_model(config.model, vocab_size))
    if config.model.vocab_size == "auto":
        raise ConfigError(
            "the size of the vocabulary is not known",
            got="model.vocab_size=auto",
            fix="give the tokenizer's: LanguageModule(config, vocab_size=data.vocab_size)",
        )
    return config


def _handover_length(settings: HandoverConfig, config: RunConfig) -> int:
    """Tokens of each sequence of the handover check."""
    if settings.seq_len != "auto":
        return settings.seq_len
    length = min(_MAX_LENGTH, max(_MIN_LENGTH, config.train.global_batch_tokens // _STEP_PARTS))
    return min(length, config.train.seq_len)


def write_resolved(folder: Path, resolved: Resolved) -> Path:
    """Write the record into a run directory, for the processes of this start.

    Args:
        folder: the run directory.
        resolved: the record.

    Raises:
        OSError: the file cannot be written.
    """
    path = folder / RESOLVED
    write_atomically(path, json.dumps(resolved.to_dict(), indent=1))
    return path


def read_resolved(folder: Path) -> Resolved:
    """Read what `write_resolved` has written.

    Args:
        folder: the run directory.

    Raises:
        ConfigError: there is no such file, or it is not what was written.
    """
    path = folder / RESOLVED
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        data = parse_json(content)
    except (OSError, ValueError, RecursionError) as error:
        raise _not_one(str(getattr(error, "strerror", None) or error), path) from None
    return Resolved.from_dict(data, path)


def flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of a configuration as plain data; lists are values.

    Args:
        data: the configuration.
        prefix: of the keys.
    """
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


_KINDS: dict[str, Any] = {
    "format": str,
    "version": int,
    "config": dict,
    "asked": dict,
    "devices": int,
    "data": str,
    "why": str,
    "takes_older": bool,
    "run_dir": str | None,
    "checkpoints": str | None,
    "resume_from": str | None,
}


def _checked(data: Any) -> str:
    """Return what is wrong with the keys and the types of their values; empty where nothing is."""
    if not isinstance(data, dict) or data.keys() != _KINDS.keys():
        keys = sorted(data.keys() ^ _KINDS.keys()) if isinstance(data, dict) else ["no mapping"]
        return f"missing or unknown: {', '.join(map(ascii, keys))[:200]}"
    for key, kind in _KINDS.items():
        # A truth value is a whole number to Python.
        if not isinstance(data[key], kind) or (kind is int and isinstance(data[key], bool)):
            return f"{key} is {ascii(data[key])[:100]}"
    if (data["format"], data["version"]) != (_FORMAT, _VERSION):
        return f"it is of another kind or version: {ascii(data['format'])[:100]} {data['version']}"
    if (data["run_dir"] is None) != (data["checkpoints"] is None):
        return "a run is kept in its directory and in that of its checkpoints"
    return ""


def _not_one(problem: str, where: object) -> ConfigError:
    return ConfigError(
        f"this is no resolved run: {' '.join(problem.split())}"[:600],
        got=where,
        allowed=f"the file {RESOLVED} that a start of this version has written",
        fix="start the run again: resume=RUN_DIRECTORY writes it anew",
    )
