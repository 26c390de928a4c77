"""The short form of scripts/fuzz_campaign."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_mutants_of_every_kind_are_refused_well_or_harmless():
    """In a process of its own: the uses are forked, and a tokenizer's threads do not outlive a fork."""
    command = [sys.executable, "-m", "scripts.fuzz_campaign", "25", "1"]
    result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=540)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    tally = re.findall(r"^  (\S.*?) {2,}(\S.*?) +(\d+)$", result.stdout, re.M)
    assert sum(int(times) for *_, times in tally) >= 40
    assert any(outcome.startswith("refused") for _, outcome, _ in tally)
