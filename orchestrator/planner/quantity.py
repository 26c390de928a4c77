"""A number with its unit, source and derivation.

Every figure that the planner shows is a `Value`: unknown inputs make unknown results, an estimate marks all that is
built on it, a lower bound stays one, and the formula with its inputs can be printed as a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from orchestrator.chips.catalogue import Catalogue
from orchestrator.chips.chip import Figure

_MARKS = {1: "≥", 0: "", -1: "≤"}


@dataclass(frozen=True)
class Value:
    """One figure, with unit, source and derivation.

    Attributes:
        name: what it is, in words.
        value: None where it is unknown.
        unit: of `value`; one of those that `write` knows.
        estimated: itself, or something that it is derived from, is an estimate or has no confirmed source.
        bound: 1 where the true value is at least this, -1 at most, 0 where it is meant as it stands.
        sources: where an input was published, or who gave it.
        formula: of a derived figure, in words.
        parts: what it was derived from.
    """

    name: str
    value: float | None
    unit: str = ""
    estimated: bool = False
    bound: int = 0
    sources: tuple[str, ...] = ()
    formula: str = ""
    parts: tuple[Value, ...] = ()

    @property
    def known(self) -> bool:
        """Whether there is a number."""
        return self.value is not None

    def __str__(self) -> str:
        if self.value is None:
            return "unknown"
        return f"{_MARKS[self.bound]}{'~' if self.estimated else ''}{write(self.value, self.unit)}"

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {
            "value": self.value,
            "unit": self.unit,
            "estimated": self.estimated,
            "bound": {1: "at least", 0: None, -1: "at most"}[self.bound],
            "sources": sorted(set(self.all_sources())),
            "formula": self.formula or None,
        }

    def all_sources(self) -> Iterator[str]:
        """Yield the sources of the figure and of everything below it."""
        yield from self.sources
        for part in self.parts:
            yield from part.all_sources()

    def explain(self) -> str:
        """Return the derivation as an indented tree; what was shown already is not repeated."""
        return "\n".join(_tree(self, 0, set()))

    def renamed(self, name: str) -> Value:
        """Return the same value under another name.

        Args:
            name: of the figure.
        """
        return replace(self, name=name)


def given(name: str, value: float, unit: str, source: str, *, estimated: bool = False) -> Value:
    """Make an input with its source.

    Args:
        name: of the figure.
        value: the number.
        unit: of the figure.
        source: where the number is from.
        estimated: whether the source confirms it.
    """
    return Value(name, value, unit, estimated, sources=(source,))


def unknown(name: str, unit: str, why: str) -> Value:
    """Make a figure that is not published.

    Args:
        name: of the figure.
        unit: of the figure.
        why: it is unknown.
    """
    return Value(name, None, unit, sources=(why,))


def of_figure(name: str, figure: Figure, unit: str, catalogue: Catalogue) -> Value:
    """Take a figure of the chip catalogue. What no source confirms counts as an estimate.

    Args:
        name: of the figure.
        figure: of the catalogue.
        unit: of the figure.
        catalogue: of chips.
    """
    if figure.value is None:
        return unknown(name, unit, figure.note or "no public figure found")
    note = f"; {figure.note}" if figure.note and figure.note != figure.source else ""
    source = f"{catalogue.cite(figure)}{note}"
    return given(name, figure.value, unit, source, estimated=figure.estimated or not figure.verified)


def derive(
    name: str,
    unit: str,
    formula: str,
    function: Callable[..., float],
    *parts: Value,
    falling: tuple[int, ...] = (),
    estimated: bool = False,
) -> Value:
    """Derive a value from others.

    Args:
        name: of the result.
        unit: of the result.
        formula: in words, with the names of the parts.
        function: of the parts' values; called only where all are known.
        *parts: the values that it is computed from.
        falling: indices of parts in which the result falls: a lower bound of one is an upper bound of the result.
        estimated: the formula itself is an assumption.
    """
    numbers = [part.value for part in parts]
    known = [number for number in numbers if number is not None]
    value = function(*known) if len(known) == len(parts) else None
    bounds = {-part.bound if index in falling else part.bound for index, part in enumerate(parts)} - {0}
    # Bounds that pull both ways leave a figure that is no bound at all: then it is an estimate.
    bound = bounds.pop() if len(bounds) == 1 else 0
    marked = estimated or bool(bounds) or any(part.estimated for part in parts)
    return Value(name, value, unit, marked and value is not None, bound if value is not None else 0, (), formula, parts)


def write(value: float, unit: str) -> str:
    """Format a number with its unit, short enough for a table.

    Args:
        value: the number.
        unit: of the figure.
    """
    if unit == "usd":
        return f"${_short(value)}"
    if unit == "usd/h":
        return f"${value:,.4g}/h"
    if unit == "ratio":
        return f"{value:.1%}"
    if unit == "s":
        return _seconds(value)
    if unit == "days":
        return _seconds(value * 86400)
    if unit == "byte/s":
        return f"{value / 1e9:.4g} GB/s"
    if unit == "1/day":
        return f"{value:.3g}/day"
    if unit in ("bytes", "bit/s"):
        return _decimal(value, unit.replace("bytes", "B"))
    if unit == "byte":
        return f"{value / 2**30:,.1f} GiB"
    if unit in ("chips", "spares", "failures", "replicas"):
        return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"
    if unit == "MWh":
        return f"{_short(value)} MWh" if value < 1e4 else f"{_short(value / 1000)} GWh"
    if unit == "MW":
        return f"{_short(value)} MW" if value >= 0.1 else f"{_short(value * 1000)} kW"
    return f"{_short(value)} {unit}".rstrip()


def _seconds(value: float) -> str:
    for size, name in ((365.25 * 86400, "years"), (86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if value >= 2 * size:
            return f"{value / size:,.1f} {name}"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


def _decimal(value: float, unit: str) -> str:
    """Write what links carry, which counts in thousands."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:,.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _short(value: float) -> str:
    for size, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            divisor = 1e3 if suffix == "k" else size
            return f"{value / divisor:,.3g}{suffix}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _tree(value: Value, depth: int, seen: set[Value]) -> list[str]:
    head = f"{'  ' * depth}{value.name}: {value}"
    if value in seen and value.parts:
        return [f"{head}  (above)"]
    seen.add(value)
    if value.formula:
        head += f"  = {value.formula}"
    if value.sources:
        head += f"  [{'; '.join(value.sources)}]"
    lines = [head]
    for part in value.parts:
        lines += _tree(part, depth + 1, seen)
    return lines
