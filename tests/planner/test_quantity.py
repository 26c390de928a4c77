"""Figures that know where they come from: unknown stays unknown, an estimate marks what is built on it."""

from __future__ import annotations

import pytest
from hypothesis import given as forall
from hypothesis import strategies as st

from orchestrator.chips.chip import UNVERIFIED, Figure
from orchestrator.chips.load import load_catalogue
from orchestrator.planner.quantity import Value, derive, given, of_figure, unknown, write

numbers = st.floats(1e-3, 1e9)
values = st.builds(
    Value,
    name=st.just("part"),
    value=st.one_of(st.none(), numbers),
    estimated=st.booleans(),
    bound=st.sampled_from((-1, 0, 1)),
    sources=st.just(("somewhere",)),
)


@forall(st.lists(values, min_size=1, max_size=4))
def test_unknown_and_estimated_travel_through_every_derivation(parts):
    result = derive("sum", "s", "sum of parts", lambda *numbers: sum(numbers), *parts)
    if any(part.value is None for part in parts):
        assert result.value is None
        assert str(result) == "unknown"
    else:
        assert result.value == pytest.approx(sum(part.value for part in parts))
        assert result.value != 0
        if any(part.estimated for part in parts):
            assert result.estimated
            assert "~" in str(result)


@forall(values.filter(lambda value: value.known), values.filter(lambda value: value.known))
def test_bounds_turn_round_where_the_result_falls(above, below):
    result = derive("ratio", "", "above / below", lambda a, b: a / b, above, below, falling=(1,))
    bounds = {above.bound, -below.bound} - {0}
    assert result.bound == (bounds.pop() if len(bounds) == 1 else 0)
    if {above.bound, -below.bound} == {1, -1}:
        assert result.estimated, "bounds that pull both ways leave an estimate"


def test_marks():
    assert str(given("step", 1.5, "s", "x")) == "1.5 s"
    assert str(Value("step", 1.5, "s", estimated=True, bound=1)) == "≥~1.5 s"
    assert str(Value("step", 1.5, "s", bound=-1)) == "≤1.5 s"
    assert str(unknown("power", "W", "not published")) == "unknown"


def test_what_no_source_confirms_is_an_estimate():
    catalogue = load_catalogue()
    assert of_figure("x", Figure(3.0, "W", UNVERIFIED), "W", catalogue).estimated
    assert of_figure("x", Figure(3.0, "W", "stas", estimated=True), "W", catalogue).estimated
    published = of_figure("x", Figure(3.0, "W", "stas"), "W", catalogue)
    assert not published.estimated
    assert published.sources[0].startswith("stas00/ml-engineering")
    assert of_figure("x", Figure(None, "W"), "W", catalogue).value is None


def test_the_derivation_is_a_tree_with_formulas_and_sources():
    step = given("step", 2.0, "s", "time model")
    speed = derive(
        "speed", "tokens/s", "batch / step", lambda b, s: b / s, given("batch", 8.0, "tokens", "given"), step
    )
    twice = derive("both", "", "speed and speed", lambda a, b: a + b, speed, speed)
    lines = twice.explain().splitlines()
    assert lines[0] == "both: 8  = speed and speed"
    assert lines[1] == "  speed: 4 tokens/s  = batch / step"
    assert lines[2] == "    batch: 8 tokens  [given]"
    assert lines[-1] == "  speed: 4 tokens/s  (above)"
    assert set(twice.all_sources()) == {"time model", "given"}


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (13.5e6, "usd", "$13.5M"),
        (3.99, "usd/h", "$3.99/h"),
        (0.462, "ratio", "46.2%"),
        (0.5, "days", "12.0 h"),
        (300, "days", "300.0 days"),
        (0.0021, "s", "2.1 ms"),
        (8 * 2**30, "byte", "8.0 GiB"),
        (1024, "chips", "1,024"),
        (12_000, "MWh", "12 GWh"),
        (0.016, "MW", "16 kW"),
        (50e9, "byte/s", "50 GB/s"),
        (4.7e-4, "1/day", "0.00047/day"),
    ],
)
def test_units(value, unit, text):
    assert write(value, unit) == text
