"""What the types of the schema cannot say: ranges, and keys that must fit each other. All problems at once."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

from orchestrator.config.schema import CheckpointConfig, HardwareConfig, ModelConfig, RunConfig
from orchestrator.errors import ConfigError

_RUN_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_POSITIVE = (
    "hardware.devices",
    "hardware.threads",
    "hardware.simulate",
    "hardware.timeout_seconds",
    "model.vocab_size",
    "model.dim",
    "model.layers",
    "model.heads",
    "model.kv_heads",
    "model.head_dim",
    "model.mlp_dim",
    "model.max_seq_len",
    "model.sliding_window",
    "model.rope_scaling.original_max_seq_len",
    "data.tokenizer.vocab_size",
    "layout.replicate",
    "layout.fsdp",
    "layout.context",
    "layout.tensor",
    "data.workers",
    "checkpoint.every_steps",
    "checkpoint.keep_last",
    "checkpoint.keep_every_steps",
    "checkpoint.handover.sequences",
    "checkpoint.handover.seq_len",
    "logger.every_steps",
    "train.max_steps",
    "train.eval_every",
    "train.eval_tokens",
    "train.loss_chunk_tokens",
    "train.micro_batch_size",
    "train.sample.tokens",
    "train.sample.every_steps",
)
_NOT_NEGATIVE = (
    "seed",
    "model.init_std",
    "data.prefetch",
    "optim.weight_decay",
    "optim.schedule.warmup_steps",
    "train.sample.temperature",
)
_ABOVE_ZERO = (
    "model.norm_eps",
    "model.rope_theta",
    "model.rope_scaling.factor",
    "model.rope_scaling.low_freq_factor",
    "model.rope_scaling.high_freq_factor",
    "model.rope_scaling.beta_fast",
    "model.rope_scaling.beta_slow",
    "optim.lr",
    "optim.eps",
    "optim.grad_clip",
)


def validate(config: RunConfig) -> list[ConfigError]:
    """Everything that is wrong with `config` by itself, before hardware or data are looked at."""
    parts = (_hardware(config.hardware), _model(config.model), _batch(config), _checkpoint(config.checkpoint))
    return [*check_ranges(config), *(problem for part in parts for problem in part)]


def check_ranges(config: RunConfig) -> list[ConfigError]:
    """Values that are wrong by themselves, each key looked at alone."""
    problems = [
        _out(key, value, f"{least} or more")
        for least, keys in ((1, _POSITIVE), (2, ("train.seq_len",)), (0, _NOT_NEGATIVE))
        for key in keys
        if isinstance(value := _get(config, key), (int, float)) and not least <= value < math.inf
    ]
    above_zero = {key: _get(config, key) for key in _ABOVE_ZERO}
    above_zero |= {f"data.sources[{i}].weight": source.weight for i, source in enumerate(config.data.sources)}
    problems += [
        _out(key, value, "more than 0, and finite")
        for key, value in above_zero.items()
        if value is not None and not 0 < value < math.inf
    ]
    below_one = {f"optim.betas[{i}]": beta for i, beta in enumerate(config.optim.betas)}
    below_one |= {key: _get(config, key) for key in ("model.dropout", "data.validation_fraction")}
    problems += [
        _out(key, value, "0 or more and less than 1") for key, value in below_one.items() if not 0 <= value < 1
    ]
    ratios = {key: _get(config, key) for key in ("optim.schedule.min_lr_ratio", "optim.schedule.decay_fraction")}
    problems += [_out(key, value, "0 to 1") for key, value in ratios.items() if not 0 <= value <= 1]
    if not config.data.sources:
        problems.append(_out("data.sources", "an empty list", "one source or more"))
    if config.run_id is not None and not _RUN_ID.fullmatch(config.run_id):
        allowed = "up to 100 letters, digits, '.', '_' and '-', the first no '.' or '-'"
        problems.append(_out("run_id", repr(config.run_id), allowed))
    if not config.name or "/" in config.name or "\0" in config.name or config.name in (".", ".."):
        problems.append(_out("name", repr(config.name), "a folder name"))
    return problems


def _get(config: RunConfig, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def _hardware(hardware: HardwareConfig) -> list[ConfigError]:
    problems, asked = [], f"hardware.runtime={hardware.runtime}"
    if hardware.runtime != "auto" and hardware.target != "tpu":
        problems.append(
            ConfigError(
                "hardware.runtime chooses between the libraries that drive a TPU",
                got=f"{asked} with hardware.target={hardware.target}",
                allowed="hardware.target=tpu",
                fix="set hardware=tpu, or leave out hardware.runtime",
            )
        )
    if hardware.runtime == "torch_tpu" and hardware.simulate is not None:
        problems.append(
            ConfigError(
                "torch_tpu has no virtual devices to rehearse on",
                got=f"{asked} with hardware.simulate={hardware.simulate}",
                fix="leave out one of them: torch_xla rehearses the job, and its checkpoints are the same",
            )
        )
    return problems


def _model(model: ModelConfig) -> list[ConfigError]:
    sizes = (model.dim, model.heads, model.kv_heads, 1 if model.head_dim == "auto" else model.head_dim)
    if min(sizes) < 1:
        return []  # said by check_ranges
    problems = []
    if model.head_dim == "auto" and model.dim % model.heads:
        what = "model.dim does not divide by model.heads"
        problems.append(
            ConfigError(what, got=f"{model.dim} / {model.heads}", fix="change one of them, or set model.head_dim")
        )
    if model.heads % model.kv_heads:
        what = "model.heads does not divide by model.kv_heads"
        allowed = f"a divisor of {model.heads} as model.kv_heads"
        problems.append(
            ConfigError(what, got=f"{model.heads} / {model.kv_heads}", allowed=allowed, fix="change one of them")
        )
    head_dim = model.dim // model.heads if model.head_dim == "auto" else model.head_dim
    if model.positions == "rope" and head_dim % 2:
        problems.append(
            ConfigError(
                "RoPE turns pairs of elements: a head's width is even",
                got=f"head_dim {head_dim}",
                fix="change model.head_dim",
            )
        )
    return problems


def _batch(config: RunConfig) -> list[ConfigError]:
    train, problems = config.train, []
    if train.seq_len < 2:
        return []  # said by check_ranges
    if train.seq_len > config.model.max_seq_len:
        problems.append(
            ConfigError(
                "the sequences are longer than the model can see",
                got=f"train.seq_len={train.seq_len}",
                allowed=f"at most model.max_seq_len={config.model.max_seq_len}",
                fix=f"set train.seq_len={config.model.max_seq_len} or model.max_seq_len={train.seq_len}",
            )
        )
    if train.global_batch_tokens < train.seq_len or train.global_batch_tokens % train.seq_len:
        near = max(1, round(train.global_batch_tokens / train.seq_len)) * train.seq_len
        problems.append(
            ConfigError(
                "the global batch is not a whole number of sequences",
                got=f"train.global_batch_tokens={train.global_batch_tokens} / train.seq_len={train.seq_len}"
                f" = {train.global_batch_tokens / train.seq_len:g}",
                fix=f"set train.global_batch_tokens={near}",
            )
        )
    return problems


def _checkpoint(checkpoint: CheckpointConfig) -> list[ConfigError]:
    problems = []
    if checkpoint.require_signature and not checkpoint.trusted_keys:
        problems.append(
            ConfigError(
                "no signature can be trusted without a key to check it with",
                got="checkpoint.require_signature=true with checkpoint.trusted_keys=[]",
                fix="set checkpoint.trusted_keys=[key.pub.pem]",
            )
        )
    scheme, separator, rest = checkpoint.dir.partition("://")
    if not checkpoint.dir or (separator and not (scheme.isalnum() and rest)):
        problems.append(_out("checkpoint.dir", repr(checkpoint.dir), "auto, a path, s3://BUCKET/PREFIX, gs://..."))
    return problems


def _out(key: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"'{key}' is out of range", got=value, allowed=allowed, fix=f"set {key}=...")
