"""Islands that come compute what the others do, within what is declared for their precisions."""

from __future__ import annotations

import pytest

from orchestrator.islands.island_messages import Score
from orchestrator.islands.probes import Probes


def score(loss: float, norm: float = 2.0, precision: str = "fp32", version: int = 3) -> Score:
    return Score("probe", 0, 1, (loss, norm), ("loss", "grad_norm", precision), (version,))


@pytest.mark.parametrize(
    ("other", "agrees"),
    [
        (score(4.0 * (1 + 5e-6)), True),
        (score(4.0 * (1 + 5e-5)), False),
        (score(4.0, 2.0 * (1 + 5e-5)), True),
        (score(4.0, 2.1), False),
        (score(4.0 * (1 + 1e-3), precision="bf16"), True),
    ],
)
def test_the_same_weights_give_the_same_numbers(other, agrees):
    probes = Probes()
    assert probes.heard("a", score(4.0)) is None
    assert probes.heard("b", other).agrees is agrees


def test_other_weights_are_not_compared_nor_is_an_island_with_itself():
    probes = Probes()
    assert probes.heard("a", score(4.0)) is None
    assert probes.heard("b", score(5.0, version=4)) is None
    assert probes.heard("a", score(6.0)) is None
