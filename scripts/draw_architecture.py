"""Draw the packages in layers, from the table that tests/test_architecture.py enforces: docs/architecture.svg."""

from __future__ import annotations

import random
from pathlib import Path

from tests.test_architecture import ALLOWED

WIDTH, BOX, HIGH, ROW, LEFT, COLUMNS = 980, 112, 34, 84, 20, 7
TRIES = 2000
Point = tuple[float, float]


def layers() -> list[list[str]]:
    """Packages by the length of the longest way down to one that imports none."""
    depth: dict[str, int] = {}
    for package, below in ALLOWED.items():  # each stands after those that it may import
        depth[package] = 1 + max((depth[one] for one in below), default=-1)
    return [[name for name, at in depth.items() if at == level] for level in range(max(depth.values()) + 1)]


def direct(package: str) -> set[str]:
    """The packages below one that it reaches on no longer way: fewer arrows say the same."""
    below = ALLOWED[package]
    return {one for one in below if not any(one in reached(other) for other in below - {one})}


def reached(package: str) -> set[str]:
    found = set(ALLOWED[package])
    for one in ALLOWED[package]:
        found |= reached(one)
    return found


def curve(start: Point, end: Point) -> tuple[Point, Point, Point, Point]:
    """The Bezier points of an arrow from the lower edge of one box to the upper edge of another."""
    (x, y), (to_x, to_y) = start, end
    bend = (y + HIGH + to_y) / 2
    return (x, y + HIGH), (x, bend), (to_x, bend), (to_x, to_y - 2)


def cost(places: dict[str, Point]) -> float:
    """How hard a drawing is to read: boxes that arrows run behind, above all, and the length of the arrows."""
    total = 0.0
    for name, start in places.items():
        for below in direct(name):
            points = curve(start, places[below])
            total += abs(start[0] - places[below][0]) / WIDTH
            for step in range(1, 20):
                at = step / 20
                weights = ((1 - at) ** 3, 3 * at * (1 - at) ** 2, 3 * at**2 * (1 - at), at**3)
                x, y = (sum(w * point[axis] for w, point in zip(weights, points, strict=True)) for axis in (0, 1))
                hidden = [
                    one
                    for one, (left, top) in places.items()
                    if one not in (name, below) and abs(x - left) < BOX / 2 + 6 and top - 4 < y < top + HIGH + 4
                ]
                total += 3 * len(hidden)
    return total


def arrange(rows: list[list[str]]) -> dict[str, Point]:
    """Place the boxes of each row in the columns where the fewest arrows run behind other boxes; always the same."""
    step, chance = (WIDTH - 2 * LEFT) / COLUMNS, random.Random(0)
    columns = {name: column for names in rows for column, name in enumerate(names)}

    def places() -> dict[str, Point]:
        return {
            name: (LEFT + step * (columns[name] + 0.5), 30 + row * ROW)
            for row, names in enumerate(rows)
            for name in names
        }

    best = cost(places())
    for _ in range(TRIES):
        names = chance.choice(rows)
        name, column = chance.choice(names), chance.randrange(COLUMNS)
        before = dict(columns)
        for other in names:
            if columns[other] == column:
                columns[other] = columns[name]
        columns[name] = column
        if (now := cost(places())) <= best:
            best = now
        else:
            columns.update(before)
    return places()


def main() -> None:
    rows = layers()[::-1]
    places = arrange(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {40 + len(rows) * ROW}" '
        'font-family="sans-serif" font-size="14">',
        "<title>Packages in layers; an arrow points to a package that is imported</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#8a94a6"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{40 + len(rows) * ROW}" fill="#ffffff"/>',
    ]
    for name, (x, y) in places.items():
        for below in sorted(direct(name)):
            first, *rest = (f"{at_x:.0f} {at_y:.0f}" for at_x, at_y in curve((x, y), places[below]))
            line = f"M{first} C{' '.join(rest)}"
            parts.append(f'<path d="{line}" fill="none" stroke="#8a94a6" marker-end="url(#tip)"/>')
    for name, (x, y) in places.items():
        parts.append(
            f'<rect x="{x - BOX / 2:.0f}" y="{y:.0f}" width="{BOX}" height="{HIGH}" rx="6" fill="#eef3fb" '
            'stroke="#3b6fb6"/>'
            f'<text x="{x:.0f}" y="{y + 22:.0f}" text-anchor="middle" fill="#16263d">{name}</text>'
        )
    target = Path(__file__).parents[1] / "docs" / "architecture.svg"
    target.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
