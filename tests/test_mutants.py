"""The short form of scripts/fuzz_campaign."""

from __future__ import annotations

from tests.lab.mutants import campaign


def test_mutants_of_every_kind_are_refused_well_or_harmless(tmp_path):
    tally = campaign(tmp_path, 25, seed=1)
    assert tally.wrong == []
    assert sum(tally.outcomes.values()) >= 40
    assert any(outcome.startswith("refused") for _, outcome in tally.outcomes)
