"""Draw the packages in layers, from the table that tests/test_architecture.py enforces: docs/architecture.svg."""

from __future__ import annotations

from pathlib import Path

from tests.test_architecture import ALLOWED

WIDTH, BOX, HIGH, ROW, LEFT = 980, 112, 34, 84, 20


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


def main() -> None:
    rows = layers()[::-1]
    places = {}
    for row, names in enumerate(rows):
        step = (WIDTH - 2 * LEFT) / len(names)
        for column, name in enumerate(names):
            places[name] = (LEFT + step * (column + 0.5), 30 + row * ROW)
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
            to_x, to_y = places[below]
            start, bend = y + HIGH, (y + HIGH + to_y) / 2
            line = f"M{x:.0f} {start:.0f} C{x:.0f} {bend:.0f} {to_x:.0f} {bend:.0f} {to_x:.0f} {to_y - 2:.0f}"
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
