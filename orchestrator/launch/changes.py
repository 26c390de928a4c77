"""What a command line changes of the run that it resumes, and which changes break its promises. No torch.

A resumed run repeats what an uninterrupted one would have done. Some keys undo that without looking like it: a longer
run bends the whole schedule, other data gives a step another batch. They are listed with their effect before the first
step, and what breaks the promise has to be allowed by name (`resume_allow`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.config.batch_sizes import BatchSizes
from orchestrator.config.convert import to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigError, ConfigErrors
from orchestrator.optim.schedule import schedule_of

_SAME_RATE = 0.01  # a learning rate that is off by no more than this is as promised
_SCHEDULE = ("train.max_steps", "optim.schedule.")
_COMPUTED = (
    *("optim.", "model.", "train.seq_len", "train.remat", "train.z_loss", "train.preference.", "train.lora."),
    *("train.ema.", "data.document_mask", "data.skip", "seed"),
)
_NOT_COMPUTED = ("model.name", "optim.name", "train.preference.reference")


@dataclass(frozen=True)
class Change:
    """One key of the configuration that differs from the checkpoint's.

    Attributes:
        key: dotted.
        was: value in the saved run.
        now: value of this command line.
        effect: on the steps that follow.
        needs: the entry of `resume_allow` that allows it; None where nothing that was promised is broken.
    """

    key: str
    was: Any
    now: Any
    effect: str
    needs: str | None = None

    def __str__(self) -> str:
        return f"{self.key} {self.was} -> {self.now}: {self.effect}"


def changes(saved: RunConfig, now: RunConfig, step: int) -> list[Change]:
    """List what the steps after `step` completed ones compute otherwise than in the saved run, by configuration.

    Whether the data is the same is told by its fingerprint, not by its path; see `restoring`.

    Args:
        saved: configuration of the saved run.
        now: configuration of this command line.
        step: optimizer steps completed.
    """
    found = []
    for key, was, is_now in differing(to_dict(saved), to_dict(now)):
        if key == "train.global_batch_tokens":
            effect = f"{is_now:,} tokens per step; the data goes on behind the last sequence that was trained on"
            found.append(Change(key, was, is_now, effect, "batch"))
        elif key == "train.batch_warmup":
            sizes = [BatchSizes.of(config.train).behind(step) for config in (saved, now)]
            effect = f"{sizes[1].at(step):,} tokens at step {step + 1}"
            found.append(Change(key, was, is_now, effect, None if sizes[0] == sizes[1] else "batch"))
        elif key.startswith(_SCHEDULE):
            found.append(Change(key, was, is_now, *_effect_on_rate(saved, now, step)))
        elif key.startswith(_COMPUTED) and key not in _NOT_COMPUTED:
            found.append(Change(key, was, is_now, _effect(key, saved, now, step)))
    return found


def check(found: list[Change], allowed: tuple[str, ...]) -> None:
    """Refuse the changes that break a promise and are not allowed.

    Args:
        found: the changes.
        allowed: as `resume_allow` names them.

    Raises:
        ConfigErrors: one for each of them.
    """
    problems = [
        ConfigError(
            f"{change.key} changes what the resumed run promised",
            got=str(change),
            fix=f"leave it out; or, if that is what you want: 'resume_allow=[{change.needs}]'",
        )
        for change in found
        if change.needs is not None and change.needs not in allowed
    ]
    if problems:
        raise ConfigErrors(problems)


def precision_change(was: object, now: str) -> Change | None:
    """Return the change of the precision that the run really computes in, which `hardware.precision=auto` hides.

    Args:
        was: as the checkpoint's state has it.
        now: that of this run.
    """
    if not isinstance(was, str) or was == now:
        return None
    effect = "losses agree to the tolerance of the lower one only, which the handover check measures"
    return Change("precision", was, now, effect)


def _effect_on_rate(saved: RunConfig, now: RunConfig, step: int) -> tuple[str, str | None]:
    try:
        rates = [_rate(config, step) for config in (saved, now)]
    except ConfigError:  # that of the saved run is not named here, and so not imported
        return "the saved run's schedule is the user's own, whose rate is not known here", "schedule"
    # The schedule alone: a rate that the user has changed is meant so.
    factors = [_rate(config, step) / config.optim.lr for config in (saved, now)]
    jumps = abs(factors[1] - factors[0]) > _SAME_RATE * max(factors)
    effect = f"learning rate of step {step + 1} {_number(rates[0])} -> {_number(rates[1])}"
    if not jumps:
        return effect, None
    return f"{effect}, a jump that an uninterrupted run would not make", "schedule"


def _effect(key: str, saved: RunConfig, now: RunConfig, step: int) -> str:
    if key == "optim.lr":
        return _effect_on_rate(saved, now, step)[0]
    if key.startswith("model."):
        return "another model; the handover check shows by how much"
    if key.startswith("data.") or key in ("seed", "train.seq_len"):
        return "other batches"
    return f"from step {step + 1} on"


def _rate(config: RunConfig, step: int) -> float:
    return schedule_of(config)(step, config.optim.lr)


def _number(value: float) -> str:
    return f"{value:.3g}"


def differing(was: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield each key whose value differs between two configurations as plain data: name, value before, value now.

    Args:
        was: configuration before.
        now: configuration now.
        prefix: of the keys.
    """
    for key, value in now.items():
        before = was.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            yield from differing(before, value, f"{prefix}{key}.")
        elif value != before:
            yield prefix + key, before, value
