"""What the types of the schema cannot say: ranges, and keys that must fit each other. All problems at once."""

from __future__ import annotations

from orchestrator.config.schema import ModelConfig, RunConfig
from orchestrator.errors import ConfigError


def validate(config: RunConfig) -> list[ConfigError]:
    """Everything that is wrong with `config` by itself, before hardware or data are looked at."""
    return [*_ranges(config), *_model(config.model), *_batch(config)]


def _ranges(config: RunConfig) -> list[ConfigError]:
    train, optim, schedule, checkpoint = config.train, config.optim, config.optim.schedule, config.checkpoint
    positive = {
        "train.max_steps": train.max_steps,
        "train.eval_every": train.eval_every,
        "train.eval_tokens": train.eval_tokens,
        "train.loss_chunk_tokens": train.loss_chunk_tokens,
        "train.micro_batch_size": train.micro_batch_size,
        "train.sample.tokens": train.sample.tokens,
        "train.sample.every_steps": train.sample.every_steps,
        "logger.every_steps": config.logger.every_steps,
        "checkpoint.every_steps": checkpoint.every_steps,
        "checkpoint.keep_last": checkpoint.keep_last,
        "checkpoint.keep_every_steps": checkpoint.keep_every_steps,
        "hardware.devices": config.hardware.devices,
        "hardware.threads": config.hardware.threads,
        "hardware.timeout_seconds": config.hardware.timeout_seconds,
        "data.tokenizer.vocab_size": config.data.tokenizer.vocab_size,
        "data.workers": config.data.workers,
    }
    problems = [
        _out(key, value, "1 or more") for key, value in positive.items() if isinstance(value, int) and value < 1
    ]
    above_zero = {"optim.lr": optim.lr, "optim.eps": optim.eps, "optim.grad_clip": optim.grad_clip}
    above_zero |= {f"data.sources[{i}].weight": source.weight for i, source in enumerate(config.data.sources)}
    problems += [
        _out(key, value, "more than 0") for key, value in above_zero.items() if value is not None and not value > 0
    ]
    at_least_zero = {
        "optim.weight_decay": optim.weight_decay,
        "optim.schedule.warmup_steps": schedule.warmup_steps,
        "train.sample.temperature": train.sample.temperature,
        "data.prefetch": config.data.prefetch,
        "seed": config.seed,
    }
    problems += [_out(key, value, "0 or more") for key, value in at_least_zero.items() if not value >= 0]
    below_one = {
        "optim.betas[0]": optim.betas[0],
        "optim.betas[1]": optim.betas[1],
        "model.dropout": config.model.dropout,
        "data.validation_fraction": config.data.validation_fraction,
    }
    problems += [
        _out(key, value, "0 or more and less than 1") for key, value in below_one.items() if not 0 <= value < 1
    ]
    ratios = {
        "optim.schedule.min_lr_ratio": schedule.min_lr_ratio,
        "optim.schedule.decay_fraction": schedule.decay_fraction,
    }
    problems += [_out(key, value, "0 to 1") for key, value in ratios.items() if not 0 <= value <= 1]
    if not config.data.sources:
        problems.append(_out("data.sources", "an empty list", "one source or more"))
    names = {"name": config.name}
    problems += [
        _out(key, value, "a folder name")
        for key, value in names.items()
        if not value or "/" in value or value in (".", "..")
    ]
    return problems


def _model(model: ModelConfig) -> list[ConfigError]:
    sizes = {key: getattr(model, key) for key in ("dim", "layers", "heads", "kv_heads", "mlp_dim", "max_seq_len")}
    sizes |= {"vocab_size": model.vocab_size, "head_dim": model.head_dim, "sliding_window": model.sliding_window}
    problems = [
        _out(f"model.{key}", value, "1 or more") for key, value in sizes.items() if isinstance(value, int) and value < 1
    ]
    if problems:
        return problems
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
        return [_out("train.seq_len", train.seq_len, "2 or more")]
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


def _out(key: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"'{key}' is out of range", got=value, allowed=allowed, fix=f"set {key}=...")
