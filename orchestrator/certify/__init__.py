"""A certificate that devices compute what they should: the cases, their reference, and the document.

`fixture` is the small training, `recorded` what a CPU gave for it, `kinds` what is measured and how far it may be off;
`suite` runs the cases in the processes of a job, `certificate` is what is kept, `differences` compares several.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.certify.certificate import Case, Certificate
    from orchestrator.certify.differences import Sides
    from orchestrator.certify.kinds import KINDS
    from orchestrator.certify.suite import run_suite
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "certify.certificate": ["Case", "Certificate"],
            "certify.differences": ["Sides"],
            "certify.kinds": ["KINDS"],
            "certify.suite": ["run_suite"],
        },
    )

__all__ = [
    "KINDS",
    "Case",
    "Certificate",
    "Sides",
    "run_suite",
]
