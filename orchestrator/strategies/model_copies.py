"""What a strategy says of copies of the model that may be lost and come back, and does for them.

Of most strategies all processes are lost together, and the answers here are right; `replica_groups` has others.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from orchestrator.models.protocol import ShardableModel
from orchestrator.sharding.layout import Layout

T = TypeVar("T")


@dataclass(frozen=True)
class CopyChange:
    """From a step on other copies of the model take part than before.

    Attributes:
        step: from 1.
        present: numbers of those that take part.
        came: of those among them that came with this step.
    """

    step: int
    present: tuple[int, ...]
    came: tuple[int, ...]


class Carried(Protocol):
    """What of a run a copy of the model that comes back needs beside weights and optimizer state."""

    def save(self) -> dict[str, Any]:
        """Return it, as JSON data."""
        ...

    def load(self, data: dict[str, Any]) -> None:
        """Take over `data` as `save` of another process of the run has returned it."""
        ...


class ModelCopies:
    """The part of a strategy that is about copies of the model.

    Attributes:
        layout: of the processes of this copy, or of all.
    """

    layout: Layout

    @property
    @abstractmethod
    def rank(self) -> int:
        """Number of this process, from 0."""

    @property
    def job_layout(self) -> Layout:
        """The layout of all processes of the job, of which `layout` may be one copy of the model."""
        return self.layout

    @property
    def changes(self) -> Sequence[CopyChange]:
        """When copies were lost, and came back."""
        return ()

    @property
    def leads(self) -> bool:
        """Whether these processes speak, write and save for the job. The answer may change from step to step."""
        return True

    @property
    def speaks(self) -> bool:
        """Whether this process does."""
        return self.rank == 0 and self.leads

    @property
    def replaceable(self) -> bool:
        """Whether other processes may go on with the run where these fail."""
        return False

    def catch_up(
        self, model: ShardableModel, optimizer: torch.optim.Optimizer, step: int, carried: Carried
    ) -> int | None:
        """Meet the other copies of the model before the first step, and take over their state if they are ahead.

        Args:
            model: sharded, with weights.
            optimizer: with state.
            step: that these processes have completed.
            carried: what else one that comes back needs.

        Returns:
            The step from which all go on; None where the others are concluding the run.
        """
        return step

    def settled(self, model: ShardableModel, step: int, compute: Callable[[], T]) -> T:
        """Return what `compute` makes of a step; it is called again where another copy was lost on the way.

        Args:
            model: sharded.
            step: optimizer steps completed.
            compute: the gradients of the step, and what is returned with them.
        """
        return compute()

    def by_one(self, action: Callable[[], T]) -> T | None:
        """Let one copy of the model do `action`, while others wait. Returns what it returned, or None in those.

        Args:
            action: of all ranks that hold the copy.
        """
        return action()

    def heard(self, signal: int) -> int:
        """Return the request to stop that counts at this step, if other copies are to stop at the same one.

        Args:
            signal: that this process got; 0 for none.
        """
        return signal

    def figures(self, tokens: int) -> dict[str, Tensor]:
        """Return what a step's row of metrics says of the strategy, scalars by name.

        Args:
            tokens: of the global batch.
        """
        return {}
