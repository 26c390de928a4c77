"""What an island says of its steps."""

from __future__ import annotations

import torch

from orchestrator.islands.island_messages import Lease, LeaseStep
from orchestrator.training.island_numbers import IslandNumbers


class _Strategy:
    """Counts programs, as a strategy that compiles."""

    programs = 0

    def compilations(self) -> int:
        return self.programs

    def fetch(self, values):
        return [float(value) for value in values]


def test_numbers_of_a_lease():
    strategy = _Strategy()
    numbers = IslandNumbers(strategy)  # type: ignore[arg-type]
    lease = Lease(3, 0, 4, tuple(LeaseStep(at, ((0, 4),)) for at in range(3)))
    for step, (loss, targets, real) in enumerate(((1.5, 100, True), (float("nan"), 90, True), (1.0, 1, False))):
        strategy.programs += step == 0
        scalars = torch.tensor(loss), torch.tensor(0.5), torch.tensor(targets)
        numbers.heard(*scalars, 0.1, real, 0.0)
        if step == 0:
            assert numbers.since_offer(0) == 100
    assert (numbers.since_offer(0), numbers.since_offer(1)) == (90, 190)  # a step of fillers has learned nothing
    kept = numbers.plain()
    report = numbers.report(lease, 0.25)
    assert report is not None
    assert (report.losses, report.targets, report.norms) == ((1.5, None, 1.0), (100, 90, 0), (0.5,) * 3)
    assert report.waited == 0.25
    assert 0 < report.compiled < report.seconds
    again = IslandNumbers(strategy)  # type: ignore[arg-type]
    again.restore(kept)
    again.heard(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(7), 0.1, True, 0.0)
    assert again.since_offer(1) == 7
    assert again.report(lease, 0.0) is None  # its first steps were those of another process
