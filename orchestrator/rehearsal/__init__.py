"""A training step without its hardware: compiled by Google's TPU compiler, or traced on fake tensors for its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.rehearsal.memory_trace import Trace, trace_deep, trace_step
    from orchestrator.rehearsal.tpu_compiler import CompileTopology, Verdict, compile_program
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "rehearsal.memory_trace": ["Trace", "trace_deep", "trace_step"],
            "rehearsal.tpu_compiler": ["CompileTopology", "Verdict", "compile_program"],
        },
    )

__all__ = [
    "CompileTopology",
    "Trace",
    "Verdict",
    "compile_program",
    "trace_deep",
    "trace_step",
]
