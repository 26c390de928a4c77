"""Evaluation of a model where it is placed: losses of texts, and the tasks of lm-eval, on every layout.

`scoring` and `relay` compute on the devices; `harness_model` and `harness_tasks` alone import lm-eval.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.evaluation.scoring import ScoredText, Scorer, TextScore
else:
    __getattr__, __dir__ = lazy_exports(__name__, {"evaluation.scoring": ["ScoredText", "Scorer", "TextScore"]})

__all__ = ["ScoredText", "Scorer", "TextScore"]
