"""Validate the configuration of a run that learns from pairs of responses."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.config.schema import RunConfig
from orchestrator.config.validate_model import out_of_range
from orchestrator.errors import ConfigError


def check_preference(config: RunConfig) -> Iterator[ConfigError]:
    """Yield what a run that learns from preferences cannot be.

    Args:
        config: of the run.
    """
    train, settings = config.train, config.train.preference
    if 0.5 <= settings.label_smoothing < 1e38:  # beyond that it is said already
        yield out_of_range("train.preference.label_smoothing", settings.label_smoothing, "0 or more, less than 0.5")
    if settings.loss is None:
        return
    if settings.label_smoothing and settings.loss != "sigmoid":
        yield _unfit("train.preference.label_smoothing", settings.label_smoothing, "0 with this loss", settings.loss)
    if not config.data.document_mask:
        yield _unfit("data.document_mask", False, "true: the responses of a pair share a sequence", settings.loss)
    if train.z_loss:
        yield _unfit("train.z_loss", train.z_loss, "0: the weights of rejected responses are negative", settings.loss)
    for key in ("on_nonfinite", "on_spike"):
        if getattr(train, key) == "rewind":
            allowed = "what leaves no data out that the reference model was not asked about"
            yield _unfit(f"train.{key}", "rewind", allowed, settings.loss)
    if settings.reference == "live" and config.launch.fault_tolerance == "torchft":
        yield _unfit("train.preference.reference", "live", "cached with launch.fault_tolerance=torchft", settings.loss)
    dropout = {"model.dropout": config.model.dropout, "train.lora.dropout": train.lora.dropout}
    for key, value in dropout.items():
        # Both passes have to draw the same masks: a compiled block, and several stages of a rank, draw others.
        if value > 0 and config.hardware.compile:
            yield _unfit(key, value, "0, or hardware.compile=false", settings.loss)
        stages = config.layout.schedule in ("interleaved", "dualpipe_v") or config.layout.virtual_stages not in (
            "auto",
            1,
        )
        if value > 0 and stages:
            yield _unfit(key, value, "0, or layout.schedule=1f1b or zero_bubble", settings.loss)


def _unfit(key: str, value: object, allowed: str, loss: str) -> ConfigError:
    return ConfigError(
        "a setting does not go together with learning from preferences",
        got=f"{key}={value} with train.preference.loss={loss}",
        allowed=allowed,
        fix=f"change {key}, or leave out train.preference.loss",
    )
