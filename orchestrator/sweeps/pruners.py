"""Which runs of a sweep are ended early, by name. The name is stored with a study; no code comes from a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from optuna.pruners import BasePruner


PrunerName = Literal["median", "asha", "hyperband", "none"]
PRUNERS: tuple[str, ...] = get_args(PrunerName)


@dataclass(frozen=True)
class PrunerSettings:
    """How runs are compared while they train.

    Attributes:
        name: `median`: worse than the median of the others at the same step; `asha`: not of the best third at each
            rung, whose steps grow threefold; `hyperband`: several of these beside each other; `none`.
        startup_trials: runs at first that are never ended by `median`.
        warmup_steps: of a run in which it is not ended by `median`; the first rung of the others.
        every: steps between evaluations.
        most: steps of a run.
    """

    name: str
    startup_trials: int
    warmup_steps: int
    every: int
    most: int

    def make(self) -> BasePruner:
        """Return the pruner.

        Raises:
            ConfigError: there is none of that name.
        """
        from optuna import pruners

        first = max(self.warmup_steps, self.every, 1)
        if self.name == "median":
            return pruners.MedianPruner(self.startup_trials, self.warmup_steps)
        if self.name == "asha":
            return pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=3)
        if self.name == "hyperband":
            return pruners.HyperbandPruner(min_resource=first, max_resource=max(self.most, first), reduction_factor=3)
        if self.name == "none":
            return pruners.NopPruner()
        raise ConfigError("there is no such pruner", got=self.name, allowed=", ".join(PRUNERS))

    @classmethod
    def of(cls, data: Any) -> PrunerSettings:
        """Return the settings that a study has stored.

        Args:
            data: JSON, not trusted.

        Raises:
            ConfigError: it is something else.
        """
        try:
            numbers = [int(data[key]) for key in ("startup_trials", "warmup_steps", "every", "most")]
            return cls(str(data["name"]), *numbers)
        except (KeyError, TypeError, ValueError):
            raise ConfigError("the study of the sweep has no pruner that this version knows", got=data) from None
