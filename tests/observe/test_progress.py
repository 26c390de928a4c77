"""What a person sees of work that is no step."""

from __future__ import annotations

from types import SimpleNamespace

from orchestrator.observe import progress
from orchestrator.observe.progress import Progress


def test_a_long_validation_says_how_far_it_is(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    seen = []
    for item in Progress(SimpleNamespace(latest={}), 0, 10).watch("validating", range(12)):
        seen.append(item)
        now[0] += 3
    assert seen == list(range(12))
    assert capsys.readouterr().out.splitlines() == ["validating 5/12", "validating 9/12"]


def test_a_short_one_says_nothing(capsys):
    assert list(Progress(SimpleNamespace(latest={}), 0, 10).watch("validating", [1, 2])) == [1, 2]
    assert capsys.readouterr().out == ""
