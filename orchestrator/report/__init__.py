"""HTML pages and terminal texts: the report of a run, and the plan of one. No network, library or server needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.report.compare_page import write_compare_page
    from orchestrator.report.comparison import compare_text
    from orchestrator.report.plan_page import write_page
    from orchestrator.report.plan_text import PlanText
    from orchestrator.report.run_data import RunData, read_run_data
    from orchestrator.report.run_report import write_report
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "report.compare_page": ["write_compare_page"],
            "report.comparison": ["compare_text"],
            "report.plan_page": ["write_page"],
            "report.plan_text": ["PlanText"],
            "report.run_data": ["RunData", "read_run_data"],
            "report.run_report": ["write_report"],
        },
    )

__all__ = [
    "PlanText",
    "RunData",
    "compare_text",
    "read_run_data",
    "write_compare_page",
    "write_page",
    "write_report",
]
