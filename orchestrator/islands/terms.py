"""How the islands of a run exchange, decided once: what the configuration leaves open is filled in here."""

from __future__ import annotations

from orchestrator.config.islands_schema import IslandsConfig
from orchestrator.islands.island_messages import Terms

_FEW_EXCHANGES = 100


def exchanges_of(islands: IslandsConfig, max_steps: int) -> int:
    """Return how often each tensor of a run is exchanged.

    Args:
        islands: the group.
        max_steps: of the run.
    """
    return max_steps if islands.algorithm == "synchronous" else -(-max_steps // islands.inner_steps)


def terms_of(islands: IslandsConfig, max_steps: int) -> Terms:
    """Return the terms of a run.

    With few exchanges an outer momentum has no time to build up, and the plain mean is better.

    Args:
        islands: the group.
        max_steps: of the run.
    """
    if islands.algorithm == "synchronous":
        return Terms("synchronous", 1, error_feedback=False)
    few = exchanges_of(islands, max_steps) < _FEW_EXCHANGES
    lr, momentum = islands.outer.lr, islands.outer.momentum
    return Terms(
        islands.algorithm,
        min(islands.inner_steps, max_steps),
        islands.fragments,
        islands.overlap_steps,
        islands.overlap_mix,
        islands.eager,
        islands.exchange,
        islands.error_feedback and islands.exchange != "fp32",
        lr=(1.0 if few else 0.7) if lr == "auto" else lr,
        momentum=(0.0 if few else 0.9) if momentum == "auto" else momentum,
        nesterov=islands.outer.nesterov,
    )


def describe_terms(terms: Terms) -> str:
    """Say in a line how islands exchange.

    Args:
        terms: of the run.
    """
    if terms.gradients:
        return "gradients at every step, fp32: as one job trains"
    parts = [f"{terms.algorithm}: every {terms.inner_steps} steps"]
    parts += [f"in {terms.fragments} fragments"] if terms.fragments > 1 else []
    parts += [f"the answer {terms.overlap_steps} steps later"] if terms.overlap_steps else []
    parts += ["eager"] if terms.eager else []
    parts += [f"local weights count {terms.overlap_mix:g} then"] if terms.overlap_mix is not None else []
    parts += [terms.exchange + (" with error feedback" if terms.error_feedback else "")]
    outer = f"outer lr {terms.lr:g}, momentum {terms.momentum:g}"
    return ", ".join([*parts, outer + (" (Nesterov)" if terms.nesterov and terms.momentum else "")])
