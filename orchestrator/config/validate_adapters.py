"""Rules of `train.lora` beyond types."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.config.schema import LoraConfig, RunConfig
from orchestrator.config.validate_model import out_of_range
from orchestrator.errors import ConfigError

_MAX_RANK, _MAX_ALPHA, _MAX_NAMES = 1 << 14, 1e6, 100


def check_lora_ranges(lora: LoraConfig) -> Iterator[ConfigError]:
    """Yield the values that are out of range, each key looked at alone.

    Args:
        lora: the settings.
    """
    if lora.rank is not None and not 1 <= lora.rank <= _MAX_RANK:
        yield out_of_range("train.lora.rank", lora.rank, f"1 to {_MAX_RANK}, or null for no adapters")
    if not 0 < lora.alpha <= _MAX_ALPHA:
        yield out_of_range("train.lora.alpha", lora.alpha, f"more than 0, at most {_MAX_ALPHA:g}")
    if not 0 <= lora.dropout < 1:
        yield out_of_range("train.lora.dropout", lora.dropout, "0 or more and less than 1")
    if not 1 <= len(lora.target_modules) <= _MAX_NAMES:
        shown = f"{len(lora.target_modules)} names"
        yield out_of_range("train.lora.target_modules", shown, f"all-linear, or 1 to {_MAX_NAMES} names")


def check_adapters(config: RunConfig) -> Iterator[ConfigError]:
    """Yield what a run of adapters cannot be.

    Args:
        config: of the run.
    """
    lora = config.train.lora
    if lora.rank is None:
        return
    if config.hardware.precision == "fp8":
        yield ConfigError(
            "layers with adapters are not computed in fp8",
            got="train.lora.rank with hardware.precision=fp8",
            allowed="fp32, bf16",
            fix="set hardware.precision=bf16",
        )
    if config.launch.fault_tolerance == "torchft":
        yield ConfigError(
            "replica groups hand whole weights to a group that comes back, and know no adapters",
            got="train.lora.rank with launch.fault_tolerance=torchft",
            fix="set launch.fault_tolerance=none",
        )
