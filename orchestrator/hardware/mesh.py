"""Order devices into the mesh by their physical coordinates; the innermost axis gets nearest neighbours.

The idea is that of jax's `mesh_utils` and torch_xla's `HybridMesh`: in each slice the logical axes are laid over the
axes of the torus, the innermost first, and slices make up the outermost one. `HybridMesh` itself (torch_xla 2.9) asks
for the device TPU, has one place for both devices of a chip of v2, v3 and v7x, and sizes the torus by the greatest
tuple of coordinates. NumPy only: the rehearsal uses this in the compiler's environment, without torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.errors import LayoutError


def count_slices(devices: Sequence[Mapping[str, Any]]) -> int:
    """Count the groups of devices between which there is only the data-centre network.

    Args:
        devices: attributes of each device.
    """
    return len({_slice(device) for device in devices})


def order_devices(devices: Sequence[Mapping[str, Any]], degrees: Sequence[int]) -> np.ndarray:
    """Numbers of the devices, in the shape of `degrees`.

    Args:
        devices: attributes of each device, by its number: as the runtime gives them, `coords` (x, y, z of the chip) and
            `core_on_chip` of a TPU, `slice_index` where there are several slices. Without coordinates the numbers say
            who is near.
        degrees: of the mesh axes, the outermost first, with the number of devices as their product.

    Raises:
        LayoutError: the outermost axis does not divide over the slices, or the slices differ in size.
    """
    slices: dict[int, list[int]] = {}
    for number, device in enumerate(devices):
        slices.setdefault(_slice(device), []).append(number)
    sizes = {len(numbers) for numbers in slices.values()}
    if len(sizes) > 1:
        raise LayoutError(
            "the slices differ in size",
            got=", ".join(f"slice {index}: {len(slices[index])} devices" for index in sorted(slices)),
            allowed="the same topology for every slice",
        )
    if problem := slices_problem(degrees[0], len(slices)):
        raise problem
    inner = (degrees[0] // len(slices), *degrees[1:])
    meshes = [_order_slice({n: devices[n] for n in slices[index]}, inner) for index in sorted(slices)]
    return np.concatenate(meshes)


def slices_problem(replicate: int, slices: int) -> LayoutError | None:
    """Return the error of a layout whose outermost axis cannot be laid over the slices; None where it can.

    Args:
        replicate: degree of that axis.
        slices: groups of devices with a slow network between them.
    """
    if replicate % slices == 0:
        return None
    return LayoutError(
        "whole copies of the model go to each slice: the network between slices is slow",
        got=f"layout.replicate={replicate} on {slices} slices",
        allowed=f"a multiple of {slices}",
        fix=f"set layout.replicate={slices}",
    )


def _slice(device: Mapping[str, Any]) -> int:
    # Where there is one slice only, some runtimes leave it out.
    return int(device.get("slice_index") or 0)


def _order_slice(devices: Mapping[int, Mapping[str, Any]], degrees: Sequence[int]) -> np.ndarray:
    torus = _torus(devices)
    if torus is None:
        return np.array(sorted(devices)).reshape(degrees)
    # How many positions of each axis of the torus go to each axis of the mesh; the innermost takes first.
    left = list(torus.shape)
    factors: list[tuple[int, ...]] = []
    for degree in reversed(degrees):
        taken = max(_factorings(degree, left), key=lambda taken: _fitness(taken, left))
        left = [have // take for have, take in zip(left, taken, strict=True)]
        factors.insert(0, taken)
    # Each axis of the torus falls into one dim per axis of the mesh, of which the last one counts neighbours.
    dims, axes = len(torus.shape), len(degrees)
    split = torus.reshape([factors[axis][dim] for dim in range(dims) for axis in range(axes)])
    together = [dim * axes + axis for axis in range(axes) for dim in range(dims)]
    return split.transpose(together).reshape(degrees)


def _torus(devices: Mapping[int, Mapping[str, Any]]) -> np.ndarray | None:
    """Numbers of the devices at [x, y, z, core]; None where they have no coordinates or do not fill a box."""
    if not all("coords" in device for device in devices.values()):
        return None
    places = np.array([(*device["coords"], device.get("core_on_chip", 0)) for device in devices.values()])
    places -= places.min(axis=0)
    torus = np.full(places.max(axis=0) + 1, -1)
    torus[tuple(places.T)] = list(devices)
    return torus if torus.size == len(devices) and (torus >= 0).all() else None


def _factorings(degree: int, sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield the ways to write `degree` as a product of one divisor of each size."""
    divisors = [[d for d in range(1, math.gcd(size, degree) + 1) if math.gcd(size, degree) % d == 0] for size in sizes]
    return (taken for taken in itertools.product(*divisors) if math.prod(taken) == degree)


def _fitness(taken: Sequence[int], left: Sequence[int]) -> tuple[Any, ...]:
    """Better is greater: cores of a chip first, then whole axes, whose ends are joined, then what is compact."""
    whole = math.prod(take for take, have in zip(taken[:-1], left[:-1], strict=True) if take == have)
    return taken[-1], whole, -max(taken[:-1]), tuple(taken)
