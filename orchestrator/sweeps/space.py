"""What a sweep may choose of a key: one of some values, or a number of an interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Choices:
    """One of some values.

    Attributes:
        values: as they are written in an override.
    """

    values: tuple[str, ...]

    def distribution(self) -> BaseDistribution:
        """Return the same in Optuna's terms."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)

    def text(self, value: Any) -> str:
        """Return a value as an override has it.

        Args:
            value: that a study has stored.

        Raises:
            ConfigError: it is none of these.
        """
        if value not in self.values:
            raise ConfigError("a stored trial has a value that the sweep does not", got=value, allowed=str(self))
        return str(value)

    def __str__(self) -> str:
        return ", ".join(self.values)


@dataclass(frozen=True)
class Between:
    """A number of an interval, its ends included.

    Attributes:
        low: the lower end.
        high: the upper end.
        log: equally likely per octave, not per unit.
        whole: integers only.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def distribution(self) -> BaseDistribution:
        """Return the same in Optuna's terms."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def text(self, value: Any) -> str:
        """Return a value as an override has it.

        Args:
            value: that a study has stored.

        Raises:
            ConfigError: it is no number of the interval.
        """
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.low <= value <= self.high:
            raise ConfigError("a stored trial has a value that the sweep does not", got=value, allowed=str(self))
        return str(int(value)) if self.whole else repr(float(value))

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} from {self.low:g} to {self.high:g}{', log scale' if self.log else ''}"


Domain = Choices | Between


def domain_data(domain: Domain) -> dict[str, Any]:
    """Return a domain as JSON data.

    Args:
        domain: of a key.
    """
    if isinstance(domain, Choices):
        return {"choices": list(domain.values)}
    return {"low": domain.low, "high": domain.high, "log": domain.log, "whole": domain.whole}
