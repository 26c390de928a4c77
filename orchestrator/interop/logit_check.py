"""Whether an imported model computes what transformers computes from the same files."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.config.schema import ModelConfig
from orchestrator.errors import CheckpointError, MissingExtraError
from orchestrator.interop.foreign_weights import Parameters
from orchestrator.interop.hf_layers import sizes_of_windows
from orchestrator.models.decoder import Decoder

TOLERANCE = 1e-4
_TOKENS = 64
_SHARE = 0.7  # of the free memory
_OVERHEAD_BYTES = 1 << 30  # transformers itself


@dataclass(frozen=True)
class LogitCheck:
    """The result of the comparison of logits.

    Attributes:
        difference: the largest one, relative to the largest logit; None where it was not measured.
        text: the same in words, or why it was not measured.
    """

    difference: float | None
    text: str


def check_logits(
    directory: Path, config_file: Path, weights: Parameters, model: ModelConfig, wanted: bool
) -> LogitCheck:
    """Compute the logits of some random tokens twice, in fp32 on the CPU: by this product and by transformers.

    No code of the directory is run: transformers takes its own class.

    Args:
        directory: of the weights, in safetensors.
        config_file: the `config.json` of the model.
        weights: those that were read of it, by our names.
        model: as the product describes it.
        wanted: whether not being able to is an error.

    Raises:
        CheckpointError: the logits differ by more than `TOLERANCE`; or `wanted`, and they could not be computed.
        MissingExtraError: `wanted`, and transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        if wanted:
            raise MissingExtraError("transformers", "dev", "check_logits=true")
        return LogitCheck(None, "not checked: transformers is not installed")
    elements = sum(piece.numel() for name in weights for piece in weights.pieces(name))
    needed = 8 * elements + _OVERHEAD_BYTES
    free = _free_bytes()
    if free is not None and needed > _SHARE * free and not wanted:
        return LogitCheck(None, f"not checked: it takes {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
    ids = _some_tokens(model)
    try:
        theirs, version = _theirs(directory, config_file, ids)
    except Exception as error:  # transformers raises anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if wanted:
            raise CheckpointError(f"transformers cannot compute this model: {reason}", got=directory) from None
        return LogitCheck(None, f"not checked: transformers cannot compute this model: {reason}")
    difference = _difference(_ours(weights, model, ids), theirs)
    if not difference <= TOLERANCE:
        raise CheckpointError(
            "the model computes something else here than in transformers",
            got=f"logits that differ by {difference:.1e} of the largest, with transformers {version}",
            allowed=f"{TOLERANCE:.0e}",
            fix="report it with the config.json; check_logits=false imports it nevertheless",
        )
    count = ids.numel()
    return LogitCheck(difference, f"equal to transformers {version} to {difference:.1e} ({count} tokens, fp32)")


def _some_tokens(model: ModelConfig) -> Tensor:
    """Draw token ids, [1, T], so many that a narrow attention window has an effect."""
    length = max(_TOKENS, min(max(sizes_of_windows(model), default=0), 512) + 16)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, int(model.vocab_size), (1, min(length, model.max_seq_len)), generator=generator)


def _ours(weights: Mapping[str, Tensor], model: ModelConfig, ids: Tensor) -> Tensor:
    with torch.device("meta"):
        decoder = Decoder(model)
    decoder.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False, assign=True)
    decoder.tie_weights()
    with torch.no_grad():
        result: Tensor = decoder.eval()(ids)
    return result


def _theirs(directory: Path, config_file: Path, ids: Tensor) -> tuple[Tensor, str]:
    import transformers

    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(str(config_file), trust_remote_code=False)
        options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "trust_remote_code": False}
        options |= {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(str(directory), config=config, **options)
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"it would draw weights at random: {', '.join(missing[:3])}")
        with torch.no_grad():
            return model.eval()(ids, use_cache=False).logits, str(transformers.__version__)
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def _free_bytes() -> int | None:
    """Memory that is free on this machine and in this process's group; None where the system does not say."""
    free = []
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) * 1024)
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit.isdigit():
            free.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, KeyError, ValueError):
        pass
    return min(free, default=None)
