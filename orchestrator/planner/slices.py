"""The shapes of TPU slices that Google offers.

A slice is the part of a pod that the fast links join; several slices talk over the data-centre network. From one cube
of 4x4x4 on, a slice of a three-dimensional torus is any box of whole cubes; v5e and v6e have a fixed list.

Sources: docs.cloud.google.com/tpu/docs/v4, v5e, v5p (largest job 96 cubes, 6144 chips), v6e, tpu7x.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from orchestrator.chips.chip import Chip

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_BELOW_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_CUBE = 4
# Longest sides of a slice where they are less than the pod's. v5p: v5p.md of the documentation.
_LONGEST = {"tpu-v5p": (16, 16, 24)}
_ENOUGH = 0.99  # a split into fewer slices is taken if it uses this much of what the best one does

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Slices:
    """Slices of one shape.

    Attributes:
        count: of slices.
        shape: chips along each side.
    """

    count: int
    shape: Shape

    @property
    def chips_each(self) -> int:
        """Chips of one slice."""
        return _size(self.shape)

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.count * self.chips_each

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return shape if self.count == 1 else f"{self.count:,} slices of {shape}"


def is_tpu(chip: Chip) -> bool:
    """Return whether the chip comes in slices.

    Args:
        chip: of the catalogue.
    """
    return chip.vendor == "google"


@functools.cache
def legal_shapes(key: str, domain_chips: int) -> dict[int, Shape]:
    """Map the chips of a slice to its shape, the one nearest to a cube; `domain_chips`: of the whole pod.

    Args:
        key: of the chip.
        domain_chips: chips of a whole pod.
    """
    if key in ("tpu-v5e", "tpu-v6e"):
        return {_size(shape): shape for shape in _FLAT}
    shapes: dict[int, Shape] = {_size(shape): shape for shape in _BELOW_A_CUBE}
    pod_cubes = domain_chips // _CUBE**3
    longest = [
        side // _CUBE for side in _LONGEST.get(key, (16, 16, 16) if key == "tpu-v4" else (_CUBE * pod_cubes,) * 3)
    ]
    for a in range(1, min(longest[0], pod_cubes) + 1):
        for b in range(a, min(longest[1], pod_cubes // a) + 1):
            for c in range(b, min(longest[2], pod_cubes // (a * b)) + 1):
                shape = (_CUBE * a, _CUBE * b, _CUBE * c)
                other = shapes.get(_size(shape))
                if other is None or max(shape) < max(other):
                    shapes[_size(shape)] = shape
    return shapes


def fit_slices(chip: Chip, chips: int) -> Slices | None:
    """Return the slices of one shape that use most of `chips`, few of them; None where not even the smallest fits.

    Args:
        chip: of the catalogue.
        chips: number of chips.
    """
    shapes = legal_shapes(chip.key, chip.topology.domain_chips or 0)
    sizes = sorted(size for size in shapes if size <= chips)
    if not sizes:
        return None
    largest = sizes[-1]
    options = []
    least = chips // largest
    for count in range(least, 2 * least + 2):
        fitting = [size for size in sizes if size * count <= chips]
        if fitting:
            options.append((fitting[-1] * count, count, fitting[-1]))
    most = max(used for used, _, _ in options)
    _, count, size = next(option for option in options if option[0] >= _ENOUGH * most)
    return Slices(count, shapes[size])


def _size(shape: Shape) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
