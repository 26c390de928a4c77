#!/usr/bin/env bash
# grain 0.2.18: MapDataset.mix does not mix in the proportions that it is given.
# The weights become small integers (the smallest is scaled to 100), so shares are off by up to 1% of themselves: a
# mixture of 66.5% and 33.5% draws 66.667% and 33.333%, and weights within 1% of each other count as equal. Over a
# trillion tokens that is 1.7 billion tokens of the wrong source.
# Seen: 0.66667 for 0.665, 0.5 for 0.5 / (0.5 + 0.502) = 0.4990.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check grain==0.2.18
cd "$work"
cat >check.py <<'PY'
import logging

logging.getLogger("absl").setLevel(logging.ERROR)
import grain


def share(first, second, draws=60_000):
    parts = [grain.MapDataset.source(range(10**6)).map(lambda _, name=name: name) for name in "ab"]
    mixed = grain.MapDataset.mix(parts, [first, second])
    return sum(mixed[index] == "a" for index in range(draws)) / draws


seen = share(0.665, 0.335), share(0.5, 0.502)
print(f"asked 0.66500, drawn {seen[0]:.5f}; asked 0.49900, drawn {seen[1]:.5f}")
assert abs(seen[0] - 2 / 3) < 1e-4 and seen[1] == 0.5, "it has changed"
PY
"$work/venv/bin/python" check.py
