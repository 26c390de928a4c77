"""Construct and check the user's own parts of a run, before a device is touched.

Torch is loaded only where a configuration names such a part.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from orchestrator.config.registry import OwnPart
from orchestrator.config.schema import ModelConfig, RunConfig
from orchestrator.data.own_documents import own_documents
from orchestrator.errors import CallbackError, ConfigError, ConfigErrors, LayoutError, UserError
from orchestrator.optim.schedule import schedule_of
from orchestrator.sharding import rules

if TYPE_CHECKING:
    import lightning.pytorch as lightning
    from lightning.pytorch.loggers import Logger

    from orchestrator.models.protocol import ShardableModel

Shape = tuple[int, ...]
_STAND_IN_VOCABULARY = 1024  # rows of a model that is described before its tokenizer is known


def build_model(config: ModelConfig, loss_chunk_tokens: int) -> ShardableModel:
    """Build the model of a run, on torch's default device.

    Args:
        config: of the model.
        loss_chunk_tokens: tokens whose logits exist at one time.

    Raises:
        ConfigError: an own model that cannot be found or made, or that the strategies cannot shard.
    """
    if config._target_ is None:
        from orchestrator.models.decoder import Decoder

        return Decoder(config, loss_chunk_tokens)
    from orchestrator.models.protocol import check_model

    part = _model_part(config)
    return check_model(part.make(config, loss_chunk_tokens), f"{part.key}._target_={part.named}")


def _model_part(config: ModelConfig) -> OwnPart:
    assert config._target_ is not None
    return OwnPart("model", config._target_, "model", config.arguments)


def describe_model(config: ModelConfig) -> ShardableModel:
    """Build the model without its numbers, on the meta device.

    Args:
        config: of the model.

    Raises:
        ConfigError: as `build_model`.
    """
    import torch

    with torch.device("meta"):
        return build_model(config, loss_chunk_tokens=1)


def own_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Measure name and shape of every parameter of an own model, a tied one once.

    Args:
        config: of the model.
    """
    return {name: tuple(parameter.shape) for name, parameter in describe_model(config).named_parameters()}


def check_parts(config: RunConfig) -> None:
    """Find, and where it costs nothing make, every part that the configuration names. No device is touched.

    Args:
        config: of the run.

    Raises:
        ConfigErrors: all that is wrong with them.
    """
    problems: list[UserError] = []
    for check in (_check_model, _check_schedule, _check_documents, _check_callbacks, _check_loggers):
        try:
            check(config)
        except ConfigErrors as errors:
            problems += errors.problems
        except UserError as error:
            problems.append(error)
    if problems:
        raise ConfigErrors(problems)


def _check_model(config: RunConfig) -> None:
    model = config.model
    if model._target_ is None:
        if model.arguments:
            fix = "set model._target_, or leave them out"
            raise ConfigError(
                "arguments are given to a model of one's own", got=f"model.arguments={model.arguments}", fix=fix
            )
        return
    _places(model)


def _places(model: ModelConfig) -> dict[str, rules.Placement]:
    if model.vocab_size == "auto":
        model = replace(model, vocab_size=_STAND_IN_VOCABULARY)
    described = describe_model(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in described.named_parameters()}
    return rules.place(described.logical_axes(), shapes)


def own_indivisible(model: ModelConfig, tensor: int) -> list[LayoutError]:
    """List the parameters of an own model that the tensor axis cannot cut evenly; the vocabulary's size is the data's.

    Args:
        model: of the run.
        tensor: degree of the tensor axis.
    """
    return [
        LayoutError(
            "a parameter of the model does not divide by layout.tensor",
            got=f"{name} {place.shape}, dim {place.tensor_dim} by {tensor}",
            fix="lower layout.tensor, or change the model's sizes",
        )
        for name, place in _places(model).items()
        if not name.startswith(("embed.", "head."))
        and place.tensor_dim is not None
        and place.shape[place.tensor_dim] % tensor
    ]


def _check_schedule(config: RunConfig) -> None:
    rate = schedule_of(config)
    if config.optim.schedule._target_ is not None:
        for step in (0, config.train.max_steps - 1):
            rate(step, config.optim.lr)


def _check_documents(config: RunConfig) -> None:
    for source in config.data.sources:
        own_documents(config.data, source).check()


def _check_callbacks(config: RunConfig) -> None:
    if config.callbacks:
        import lightning.pytorch as lightning

        for part in _parts("callback", config.callbacks, "callbacks"):
            part.check(expected=lightning.Callback)


def _check_loggers(config: RunConfig) -> None:
    if config.logger.own:
        from lightning.pytorch.loggers import Logger

        for part in _parts("logger", config.logger.own, "logger.own"):
            part.check(expected=Logger)


def _parts(kind: str, entries: tuple[dict[str, Any], ...], key: str) -> list[OwnPart]:
    return [OwnPart.of(kind, entry, f"{key}[{number}]") for number, entry in enumerate(entries)]


def own_callbacks(config: RunConfig) -> list[lightning.Callback]:
    """Make the user's callbacks.

    Args:
        config: of the run.

    Raises:
        ConfigError: one cannot be found or made.
    """
    if not config.callbacks:
        return []
    import lightning.pytorch as lightning

    return [part.make(expected=lightning.Callback) for part in _parts("callback", config.callbacks, "callbacks")]


def own_loggers(config: RunConfig) -> dict[str, Callable[[], Logger]]:
    """Return what makes each of the user's loggers, by a name for messages; making one may open a connection.

    Args:
        config: of the run.
    """
    if not config.logger.own:
        return {}
    from lightning.pytorch.loggers import Logger

    parts = _parts("logger", config.logger.own, "logger.own")
    return {f"{part.key} {part.named}": partial(part.make, expected=Logger) for part in parts}


@contextlib.contextmanager
def blamed(callbacks: Sequence[object]) -> Iterator[None]:
    """Around a training: what a callback of the user's raises is said to be its error, with its traceback.

    Raises:
        CallbackError: in place of an exception that came out of one of `callbacks`.
    """
    try:
        yield
    except Exception as error:
        if (found := _culprit(error, callbacks)) is None or isinstance(error, UserError):
            raise
        named = f"{type(found).__module__}.{type(found).__qualname__}"
        text = "".join(traceback.format_exception(error)).rstrip()
        raise CallbackError(
            f"the callback {named} failed", got=f"\n{text}", fix="mend it, or leave it out of callbacks"
        ) from error


def _culprit(error: BaseException, callbacks: Sequence[object]) -> object | None:
    """Return the callback in one of whose methods the exception was raised, or passed through."""
    known = {id(callback): callback for callback in callbacks}
    frame = error.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        if id(owner) in known:
            return owner
        frame = frame.tb_next
    return None
