"""Validate what types cannot express: ranges, and keys that must fit each other. All problems at once.

The same rules hold for what a user writes and for what a checkpoint brings.
"""

from __future__ import annotations

import dataclasses
import functools
import unicodedata
from collections.abc import Iterator
from typing import Any

from orchestrator.config.optimizers import LARGEST, check_optimizer, check_schedule
from orchestrator.config.schema import (
    CheckpointConfig,
    HardwareConfig,
    OwnOptimConfig,
    PrometheusConfig,
    RunConfig,
)
from orchestrator.config.transfer import check_transfer
from orchestrator.config.validate_adapters import check_adapters, check_lora_ranges
from orchestrator.config.validate_data import NAME, check_data_config
from orchestrator.config.validate_islands import check_islands, check_islands_run
from orchestrator.config.validate_launch import check_launch
from orchestrator.config.validate_model import check_model, out_of_range
from orchestrator.config.validate_preference import check_preference
from orchestrator.errors import ConfigError

_LARGEST = 1 << 63
_STEPS = (1, 10**12)
# Key -> the least and the largest whole number. The upper bounds are beyond anything that is built, and below what
# overflows a counter, takes all memory, or asks a library for the impossible: a configuration can be untrusted.
_COUNTS: dict[str, tuple[int, int]] = {
    "seed": (0, _LARGEST - 1),
    "hardware.devices": (1, 1 << 16),
    "hardware.threads": (1, 1 << 12),
    "hardware.simulate": (1, 1 << 12),
    "hardware.timeout_seconds": (1, 10**7),
    "hardware.fp8.min_dim": (1, 1 << 20),
    "model.vocab_size": (1, 1 << 24),
    "model.dim": (1, 1 << 20),
    "model.layers": (1, 1 << 14),
    "model.heads": (1, 1 << 14),
    "model.kv_heads": (1, 1 << 14),
    "model.head_dim": (1, 1 << 16),
    "model.mlp_dim": (1, 1 << 22),
    "model.mla.kv_lora_rank": (0, 1 << 16),
    "model.mla.q_lora_rank": (1, 1 << 16),
    "model.mla.nope_head_dim": (1, 1 << 16),
    "model.mla.rope_head_dim": (2, 1 << 16),
    "model.mla.v_head_dim": (1, 1 << 16),
    "model.moe.experts": (0, 1 << 14),
    "model.moe.top_k": (1, 1 << 14),
    "model.moe.mlp_dim": (1, 1 << 22),
    "model.moe.shared_mlp_dim": (0, 1 << 22),
    "model.moe.dense_layers": (0, 1 << 14),
    "model.moe.groups": (1, 1 << 14),
    "model.moe.top_groups": (1, 1 << 14),
    "model.max_seq_len": (1, 1 << 30),
    "model.sliding_window": (1, 1 << 30),
    "model.rope_scaling.original_max_seq_len": (1, 1 << 30),
    "data.tokenizer.vocab_size": (1, 1 << 20),
    "data.tokens.vocab_size": (1, 1 << 24),
    "data.tokens.eos_id": (0, 1 << 24),
    "data.workers": (1, 1 << 12),
    "data.prefetch": (0, 1 << 12),
    "optim.schedule.warmup_steps": (0, 10**12),
    "optim.schedule.warmup_tokens": (0, 1 << 62),
    "optim.schedule.decay_steps": _STEPS,
    "optim.schedule.horizon_steps": _STEPS,
    "layout.replicate": (1, 1 << 20),
    "layout.pipeline": (1, 1 << 20),
    "layout.fsdp": (1, 1 << 20),
    "layout.expert": (1, 1 << 20),
    "layout.context": (1, 1 << 20),
    "layout.tensor": (1, 1 << 20),
    "layout.virtual_stages": (1, 1 << 10),
    "checkpoint.every_steps": _STEPS,
    "checkpoint.keep_last": _STEPS,
    "checkpoint.keep_every_steps": _STEPS,
    "checkpoint.store_timeout_seconds": (1, 10**6),
    "checkpoint.memory.every_steps": _STEPS,
    "checkpoint.handover.sequences": (1, 1 << 12),
    "checkpoint.handover.seq_len": (1, 1 << 20),
    "logger.every_steps": _STEPS,
    "logger.prometheus.port": (0, 65535),
    "launch.nodes": (1, 1 << 20),
    "launch.max_restarts": (0, 10**6),
    "train.max_steps": _STEPS,
    "train.max_skips": _STEPS,
    "train.max_rewinds": (0, 10**6),
    "train.rewind_skip_steps": (0, 10**9),
    "train.spike.window": (8, 10**6),
    "train.spike.steps": (1, 10**4),
    "train.check_replicas_every": _STEPS,
    "train.seq_len": (2, 1 << 30),
    "train.global_batch_tokens": (-_LARGEST, 1 << 40),  # its least is a sequence: see _batch
    "train.eval_every": _STEPS,
    "train.ema.every_steps": _STEPS,
    "train.eval_tokens": (1, 10**12),
    "train.loss_chunk_tokens": (1, 1 << 30),
    "train.micro_batch_size": (1, 1 << 20),
    "train.sample.tokens": (0, 1 << 20),
    "train.sample.every_steps": _STEPS,
    "train.tasks.every_steps": _STEPS,
    "train.tasks.num_fewshot": (0, 1 << 10),
    "train.tasks.batch_tokens": (1, 1 << 30),
}
_NOT_NEGATIVE = (
    *(
        "model.init_std",
        "train.sample.temperature",
        "train.z_loss",
        "train.preference.label_smoothing",
        "launch.backoff_seconds",
    ),
    *("model.moe.balance_loss", "model.moe.z_loss", "model.moe.balance_bias_rate"),
)
MIN_SHARE = 1e-6  # of a source in a mixture
_ABOVE_ZERO = (
    "train.preference.beta",
    "train.spike.deviations",
    "train.tasks.limit",
    "launch.grace_seconds",
    "model.norm_eps",
    "model.rope_theta",
    "model.rope_local_theta",
    "model.rope_share",
    "model.rope_scaling.attention_factor",
    "model.rope_scaling.mscale_all_dim",
    "model.residual_scale",
    "model.attention_scale",
    "model.attention_softcap",
    "model.embedding_scale",
    "model.embedding_init_std",
    "model.head_init_std",
    "model.logit_scale",
    "model.logit_softcap",
    "model.moe.scale",
    "model.moe.capacity_factor",
    "model.rope_scaling.factor",
    "model.rope_scaling.low_freq_factor",
    "model.rope_scaling.high_freq_factor",
    "model.rope_scaling.beta_fast",
    "model.rope_scaling.beta_slow",
)
_VOLATILE = ("memory",)
_MAX_TEXT, _MAX_NAME_BYTES = 4096, 200
# Text of several lines; of everything else each is one word, a path, or a line.
_LINES = ("train.sample.prompt", "hardware.environment")
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # Unicode's control characters, lone surrogates, separators of lines
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # what is read would not be what is there


def validate(config: RunConfig) -> list[ConfigError]:
    """Everything that is wrong with `config` by itself, before hardware or data are looked at."""
    parts = (
        _hardware(config.hardware),
        check_model(config.model),
        check_transfer(config),
        check_data_config(config.data),
        check_schedule(config.optim.schedule),
        _average(config),
        _batch(config),
        _checkpoint(config.checkpoint),
        _prometheus(config.logger.prometheus),
        check_adapters(config),
        check_preference(config),
        check_islands_run(config),
    )
    return [*check_ranges(config), *(problem for part in parts for problem in part)]


def _prometheus(config: PrometheusConfig) -> Iterator[ConfigError]:
    if config.textfile is not None and not config.textfile.endswith(".prom"):
        # node_exporter reads no other files, and none of another kind can be overwritten by mistake.
        what = "the file for node_exporter's textfile collector has another ending"
        yield ConfigError(
            what, got=f"logger.prometheus.textfile={config.textfile}", allowed="a path that ends in .prom"
        )
    if config.enabled and config.port is None and config.textfile is None:
        what = "metrics for Prometheus are neither served nor written"
        got = "logger.prometheus.enabled=true with port=null and textfile=null"
        yield ConfigError(what, got=got, fix="set logger.prometheus.port or logger.prometheus.textfile")


def check_stored(config: RunConfig) -> list[ConfigError]:
    """List what is wrong with the configuration of a checkpoint, before a model of it is built.

    How the run was to be started is not looked at: other hardware, another batch and other places may be meant.

    Args:
        config: of a run.
    """
    return [*check_ranges(config), *check_model(config.model), *check_transfer(config)]


def check_ranges(config: RunConfig) -> list[ConfigError]:
    """List the values that are out of range, each key looked at alone; also used for what a checkpoint brings.

    Args:
        config: of a run.
    """
    problems = [
        out_of_range(key, value, f"{least} or more" if value < least else f"{least} to {largest}")
        for key, (least, largest) in _COUNTS.items()
        if isinstance(value := _get(config, key), int) and not least <= value <= largest
    ]
    problems += [
        out_of_range(key, value, f"0 to {LARGEST:g}")
        for key in _NOT_NEGATIVE
        if not 0 <= (value := _get(config, key)) <= LARGEST
    ]
    above_zero = {key: _get(config, key) for key in _ABOVE_ZERO}
    above_zero |= {f"data.sources[{i}].weight": source.weight for i, source in enumerate(config.data.sources)}
    problems += [
        out_of_range(key, value, f"more than 0, at most {LARGEST:g}")
        for key, value in above_zero.items()
        if value is not None and not 0 < value <= LARGEST
    ]
    problems += _weights([source.weight for source in config.data.sources])
    below_one = {key: _get(config, key) for key in ("model.dropout", "data.validation_fraction", "train.ema.decay")}
    problems += [
        out_of_range(key, value, "0 or more and less than 1")
        for key, value in below_one.items()
        if value is not None and not 0 <= value < 1
    ]
    names = ("min_lr_ratio", "decay_fraction", "warmup_fraction")
    ratios = {f"optim.schedule.{name}": getattr(config.optim.schedule, name) for name in names}
    problems += [
        out_of_range(key, value, "0 to 1") for key, value in ratios.items() if value is not None and not 0 <= value <= 1
    ]
    problems += [*check_optimizer(config.optim), *check_launch(config.launch), *check_lora_ranges(config.train.lora)]
    problems += check_islands(config.islands)
    if (cutoff := config.model.init_cutoff) is not None and not 1 <= cutoff <= LARGEST:
        problems.append(out_of_range("model.init_cutoff", cutoff, "null, or 1 and more"))
    if not config.data.sources:
        problems.append(out_of_range("data.sources", "an empty list", "one source or more"))
    if config.run_id is not None and not NAME.fullmatch(config.run_id):
        allowed = "up to 100 letters, digits, '.', '_' and '-', the first no '.' or '-'"
        problems.append(out_of_range("run_id", ascii(config.run_id)[:300], allowed))
    return [*problems, *_texts(config)]


def _weights(weights: list[float]) -> list[ConfigError]:
    if not weights or not all(0 < weight <= LARGEST for weight in weights):
        return []  # said by check_ranges
    if min(weights) / sum(weights) >= MIN_SHARE:
        return []
    return [
        ConfigError(
            "the weights of data.sources are too far apart",
            got=", ".join(f"{weight:g}" for weight in weights),
            allowed=f"each at least {MIN_SHARE:g} of their sum",
            fix="give shares such as 0.7 and 0.3, and leave out a source that would hardly be seen",
        )
    ]


def _get(config: RunConfig, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def _texts(config: RunConfig) -> list[ConfigError]:
    """Names and paths: what a file system, a terminal or an encoding takes for something else."""
    problems = []
    for key, text in _strings("", config):
        allowed = "\n\r\t" if key.startswith(_LINES) or key.endswith("text_template") else ""
        wrong = [char for char in text if _refused(char) and char not in allowed]
        if wrong or len(text) > _MAX_TEXT:
            what = f"the character U+{ord(wrong[0]):04X}" if wrong else f"{len(text)} characters"
            problems.append(
                ConfigError(
                    f"'{key}' is no text that can be used",
                    got=f"{what} in {ascii(text)[:80]}",
                    allowed=f"printable characters, {_MAX_TEXT} at most",
                    fix=f"set {key}=...",
                )
            )
    name = config.name
    too_long = len(name.encode(errors="replace")) > _MAX_NAME_BYTES
    if not name or "/" in name or name in (".", "..") or too_long:
        problems.append(out_of_range("name", ascii(name)[:300], f"a folder name of at most {_MAX_NAME_BYTES} bytes"))
    return problems


def _strings(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _strings(f"{key}.{field.name}" if key else field.name, getattr(value, field.name))
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from (*_strings(key, name), *_strings(f"{key}.{name}" if name.isprintable() else key, item))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _strings(f"{key}[{index}]", item)


def _refused(char: str) -> bool:
    return not char.isprintable() and (unicodedata.category(char) in _UNPRINTABLE or char in _TURNING)


_RUNTIMES = {"tpu": ("torch_tpu", "torch_xla"), "trainium": ("torchneuron", "torch_xla"), "auto": ()}


def _hardware(hardware: HardwareConfig) -> list[ConfigError]:
    problems, target = [], hardware.target
    runtimes = _RUNTIMES.get(target, ("torch",))
    wanted = " or ".join(runtimes)
    if hardware.runtime not in ("auto", *runtimes):
        problems.append(
            ConfigError(
                "hardware.runtime is the library that drives a TPU or Trainium",
                got=f"hardware.runtime={hardware.runtime} with hardware.target={target}",
                allowed="torch_tpu or torch_xla with hardware=tpu, torchneuron or torch_xla with hardware=trainium",
                fix=f"{f'set it to {wanted}' if wanted else 'name the target'}, or leave it out",
            )
        )
    if hardware.instance is not None and hardware.simulate is None:
        problems.append(
            ConfigError(
                "hardware.instance is the machine that a rehearsal stands for; a real one is looked at",
                got=f"hardware.instance={hardware.instance} without hardware.simulate",
                fix="leave it out, or rehearse: hardware.simulate=4",
            )
        )
    return problems


def _average(config: RunConfig) -> Iterator[ConfigError]:
    if config.train.ema.decay is None:
        return
    got = f"train.ema.decay={config.train.ema.decay:g} with"
    if isinstance(config.optim, OwnOptimConfig):
        yield ConfigError(
            "the average of the weights is kept in the optimizer's state, which one of the user's begins itself",
            got=f"{got} optim._target_",
            allowed="optim=adamw, muon, adafactor or sgd",
            fix="leave out train.ema.decay; schedule-free optimizers average themselves",
        )
    if config.train.lora.rank is not None:
        yield ConfigError(
            "adapters are not averaged",
            got=f"{got} train.lora.rank={config.train.lora.rank}",
            fix="leave out one of them",
        )


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
    for number, stage in enumerate(train.batch_warmup):
        key, wanted = f"train.batch_warmup[{number}]", f"multiples of train.seq_len={train.seq_len}"
        if not 1 <= stage.steps <= _STEPS[1]:
            problems.append(out_of_range(f"{key}.steps", stage.steps, f"1 to {_STEPS[1]}"))
        if not 0 < stage.tokens <= train.global_batch_tokens or stage.tokens % train.seq_len:
            allowed = f"{wanted}, at most train.global_batch_tokens={train.global_batch_tokens}"
            problems.append(out_of_range(f"{key}.tokens", stage.tokens, allowed))
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
    if checkpoint.statement and not (checkpoint.signing_key or checkpoint.model_signing_key):
        problems.append(
            ConfigError(
                "a statement that nobody has signed proves nothing",
                got="checkpoint.statement=true without a key",
                fix="set checkpoint.signing_key or checkpoint.model_signing_key, too",
            )
        )
    scheme, separator, rest = checkpoint.dir.partition("://")
    if separator and scheme in _VOLATILE:
        problems.append(
            ConfigError(
                "checkpoints there would be gone with the process that wrote them",
                got=f"checkpoint.dir={checkpoint.dir}",
                allowed="auto, a path, s3://BUCKET/PREFIX, gs://...",
                fix="set checkpoint.dir to a place that stays",
            )
        )
    elif not checkpoint.dir or (separator and not (scheme.isalnum() and rest)):
        problems.append(
            out_of_range("checkpoint.dir", repr(checkpoint.dir), "auto, a path, s3://BUCKET/PREFIX, gs://...")
        )
    return problems
