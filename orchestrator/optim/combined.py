"""Several optimizers as one: one for the blocks' matrices, another for everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from orchestrator.optim.steps import GuardedOptimizer
from orchestrator.sharding.parts import blocks, heeds_flag, reduced_dims


class CombinedOptimizer(GuardedOptimizer):
    """Steps several optimizers together. It has all their groups and state, so that a checkpoint is complete.

    Args:
        members: over different parameters; those that do not heed `found_inf` step whatever it says.
    """

    def __init__(self, members: Sequence[torch.optim.Optimizer]):
        super().__init__([group for member in members for group in member.param_groups], {})
        self._members = list(members)
        # The very same objects: a rate that is set here is set there, and so is restored state.
        self.param_groups = [group for member in members for group in member.param_groups]
        for member in members:
            self.state.update(member.state)
        for member in members:
            member.state = self.state
        # Whether all of them look at `found_inf` themselves.
        self._step_supports_amp_scaling = all(heeds_flag(member) for member in members)
        self.reduced_dims = {key: dims for member in members for key, dims in reduced_dims(member).items()}
        self.blocks = {key: size for member in members for key, size in blocks(member).items()}

    def update(self) -> None:
        """Step every member, or none where the gradients are not finite."""
        for member in self._members:
            if heeds_flag(member):
                setattr(member, "found_inf", self.found_inf)  # noqa: B010
            member.step()

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("its state is saved and restored tensor by tensor")
