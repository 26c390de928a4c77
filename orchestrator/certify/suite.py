"""All cases of a certificate, in the processes of one job: several layouts one after the other."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from orchestrator.certify.certificate import Case
from orchestrator.certify.device_cases import each_device, matrix_products
from orchestrator.certify.fixture import STEPS, with_layout
from orchestrator.certify.host_side import HostSide
from orchestrator.certify.layout_cases import LayoutCases
from orchestrator.certify.measuring import Found, attempt, farthest
from orchestrator.certify.recorded import recorded
from orchestrator.certify.trial import Trial
from orchestrator.sharding.layout import Layout
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.training.job import make_strategy
from orchestrator.training.resolved import Resolved


@dataclass
class Findings:
    """What the devices have shown.

    Attributes:
        cases: in the order in which they ran.
        losses: of the steps, by layout.
        norms: of their gradients, by layout.
        saved: the checkpoint of each layout; None where there is none.
    """

    cases: list[Case] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    norms: dict[str, list[float]] = field(default_factory=dict)
    saved: dict[str, Path | None] = field(default_factory=dict)


def run_suite(
    resolved: Resolved,
    parallel: ParallelStrategy,
    layouts: Sequence[Layout],
    folder: Path,
    told: Callable[[Case], object] = lambda case: None,
    *,
    bf16: bool = False,
    wanted: frozenset[str] | None = None,
) -> Findings:
    """Run the cases on a strategy that has joined the others. All ranks call it together.

    Every layout takes all processes: a strategy of its own is made for each, over the same processes and the same
    meeting place, so that the devices are opened once.

    Args:
        resolved: the training, on the first layout.
        parallel: its strategy.
        layouts: that are tried; the first is that of `parallel`.
        folder: that all processes see, in which rank 0 has left the host's results.
        told: called with each case as it is done.
        bf16: try matrix products in bf16, too.
        wanted: names of cases; None: all.
    """
    parallel.barrier()
    host, findings = HostSide.read(folder), Findings()

    def note(case: Case) -> None:
        findings.cases.append(case)
        told(case)

    if wanted is None or "matrix_products" in wanted:
        note(attempt(parallel, "matrix_products", "", lambda: matrix_products(parallel)))
    # Where one process drives all devices none of them is asked alone.
    if parallel.size > 1 and parallel.size == parallel.layout.devices and (wanted is None or "each_device" in wanted):
        note(attempt(parallel, "each_device", "", lambda: each_device(resolved, parallel)))
    for number, layout in enumerate(layouts):
        here = replace(resolved, config=with_layout(resolved.config, layout))
        strategy = parallel if number == 0 else _joined(here, parallel)
        cases = LayoutCases(here, strategy, folder, host)
        # The first and the last layout stand for the others where every graph has to be compiled.
        brief = strategy.compilations() is not None and 0 < number < len(layouts) - 1
        for case in cases.run(wanted, brief):
            note(case)
        findings.losses[str(layout)], findings.norms[str(layout)] = cases.losses, cases.norms
        findings.saved[str(layout)] = cases.saved
        del cases, strategy
        gc.collect()  # a model and its hooks are a circle of references
    if bf16 and wanted is None:
        note(_in_bf16(resolved, parallel))
    return findings


def _joined(resolved: Resolved, first: ParallelStrategy) -> ParallelStrategy:
    parallel = make_strategy(resolved, first.target, first.world)
    parallel.join()
    return parallel


def _in_bf16(resolved: Resolved, first: ParallelStrategy) -> Case:
    hardware = replace(resolved.config.hardware, precision="bf16")
    here = replace(resolved, config=replace(resolved.config, hardware=hardware))
    parallel = _joined(here, first)

    def measure() -> Found:
        trial = Trial(here, parallel)
        trial.run(STEPS)
        return farthest(trial.losses, recorded().losses), ""

    return attempt(parallel, "losses_bf16", str(parallel.layout), measure)
