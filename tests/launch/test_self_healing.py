"""Runs that are hurt and heal themselves: a short form of `scripts/fault_campaign`."""

from __future__ import annotations

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto")

from tests.lab.fault_kinds import KINDS
from tests.lab.self_healing import campaign
from tests.lab.slow import slow

SHORT = ("kill a rank", "kill the launcher", "hang (SIGSTOP)", "in the restart")


@pytest.mark.parametrize("kinds", [pytest.param(SHORT, id="short"), pytest.param(tuple(KINDS), id="all", marks=slow)])
def test_nobody_is_needed_and_nothing_is_lost(tmp_path, kinds):
    tally = campaign(tmp_path, len(kinds), seed=3, report=lambda tally: None, kinds=kinds, steps=100)
    assert not tally.needs_person
    assert not tally.lost
    assert not tally.different, "the weights are those of a run that nobody hurt"
    done = [fault.kind for fault in tally.faults]
    assert sorted(done) == sorted(kind for kind in kinds if kind not in tally.left_out)
    assert all(fault.start == "none" for fault in tally.faults if fault.kind == "slow rank"), "slow is not dead"
