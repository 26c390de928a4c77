"""Which optimizers an island can train with between two exchanges."""

from __future__ import annotations

import torch

from orchestrator.errors import ConfigError
from orchestrator.islands.island_messages import Terms
from orchestrator.optim.own import OwnOptimizer


def check_inner_optimizer(optimizer: torch.optim.Optimizer, terms: Terms) -> None:
    """Refuse an optimizer whose weights in training are not the model's: outer weights would be written into them.

    Args:
        optimizer: of the island.
        terms: of the exchange.

    Raises:
        ConfigError: it is one of those, such as the schedule-free ones.
    """
    if not terms.gradients and isinstance(optimizer, OwnOptimizer) and hasattr(optimizer.inner, "eval"):
        raise ConfigError(
            "islands exchange weights, and this optimizer trains others than those of the model",
            got=type(optimizer.inner).__name__,
            allowed="optimizers without train() and eval()",
            fix="take another optimizer, or exchange gradients: islands=synchronous",
        )
