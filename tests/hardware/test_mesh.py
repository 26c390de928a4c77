"""Where devices stand in the mesh, on made-up topologies of every kind of TPU."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import LayoutError
from orchestrator.hardware.mesh import count_slices, order_devices

# Chips of a slice along x, y, z, and devices of a chip.
V5E_HOST, V5E_POD = ((2, 4, 1), 1), ((16, 16, 1), 1)
V6E_POD, V4_CUBE, V5P_POD = ((16, 16, 1), 1), ((4, 4, 4), 1), ((16, 16, 24), 1)
V7X_HOST, V7X_CUBE, V3_POD = ((2, 2, 1), 2), ((4, 4, 4), 2), ((4, 8, 1), 2)


def devices(size, cores=1, slices=1, seed=0):
    """Attributes as a runtime gives them, numbered by chance."""
    found = [
        {"coords": list(reversed(place)), "core_on_chip": core, "slice_index": index}
        for index in range(slices)
        for place in itertools.product(*(range(length) for length in reversed(size)))
        for core in range(cores)
    ]
    random.Random(seed).shuffle(found)
    if slices == 1:
        for device in found:
            del device["slice_index"]
    return found


def distance(one, other, size):
    """Hops between two chips of a torus whose axes are joined at their ends."""
    steps = [abs(a - b) for a, b in zip(one["coords"], other["coords"], strict=True)]
    return sum(min(step, length - step) for step, length in zip(steps, size, strict=True))


def lines(mesh, axis):
    """The numbers along one axis of the mesh, wherever it is cut."""
    return np.moveaxis(mesh, axis, -1).reshape(-1, mesh.shape[axis])


@pytest.mark.parametrize(
    ("topology", "degrees"),
    [
        (V5E_HOST, (1, 1, 1, 8)),
        (V5E_HOST, (1, 4, 1, 2)),
        (V5E_POD, (1, 256, 1, 1)),
        (V5E_POD, (1, 16, 1, 16)),
        (V5E_POD, (2, 16, 2, 4)),
        (V6E_POD, (1, 32, 1, 8)),
        (V4_CUBE, (1, 16, 1, 4)),
        (V4_CUBE, (4, 4, 1, 4)),
        (V5P_POD, (6, 128, 1, 8)),
        (V5P_POD, (1, 96, 4, 16)),
        (V7X_HOST, (1, 4, 1, 2)),
        (V7X_CUBE, (1, 32, 1, 4)),
        (V3_POD, (1, 32, 1, 2)),
    ],
)
def test_every_device_once_and_the_innermost_axis_among_neighbours(topology, degrees):
    size, cores = topology
    found = devices(size, cores)
    mesh = order_devices(found, degrees)
    assert mesh.shape == degrees
    assert sorted(mesh.flat) == list(range(len(found)))
    tensor = degrees[-1]
    for line in lines(mesh, 3):
        chips = {tuple(found[number]["coords"]) for number in line}
        assert len(chips) == math.ceil(tensor / cores)  # devices of one chip first
        box = np.ptp(np.array(sorted(chips)), axis=0) + 1
        assert math.prod(box) == len(chips)  # a box without holes
        if tensor <= 4 * cores:  # a ring or a square: nobody is further away than its opposite
            hops = [distance(found[a], found[b], size) for a, b in itertools.combinations(line, 2)]
            assert max(hops, default=0) <= 2


def test_a_whole_axis_is_a_ring():
    found = devices((4, 4, 4))
    for line in lines(order_devices(found, (1, 16, 1, 4)), 3):
        around = itertools.pairwise([*line, line[0]])
        assert [distance(found[a], found[b], (4, 4, 4)) for a, b in around] == [1, 1, 1, 1]


def test_both_devices_of_a_chip_are_neighbours():
    found = devices((2, 2, 1), cores=2)
    for one, other in lines(order_devices(found, (1, 4, 1, 2)), 3):
        assert found[one]["coords"] == found[other]["coords"]
        assert (found[one]["core_on_chip"], found[other]["core_on_chip"]) == (0, 1)


@pytest.mark.parametrize("degrees", [(2, 8, 1, 1), (4, 4, 1, 1), (2, 2, 1, 4), (8, 1, 1, 2)])
def test_only_the_outermost_axis_leaves_a_slice(degrees):
    found = devices((2, 4, 1), slices=2)
    mesh = order_devices(found, degrees)
    assert sorted(mesh.flat) == list(range(16))
    assert count_slices(found) == 2
    index = np.array([device["slice_index"] for device in found])[mesh]
    assert (index == index[:, :1, :1, :1]).all()
    assert list(index[:, 0, 0, 0]) == sorted(index[:, 0, 0, 0])  # copies of one slice are together


def test_slices_that_the_layout_does_not_go_over():
    with pytest.raises(LayoutError, match=r"layout.replicate=3 on 2 slices(.|\n)*a multiple of 2(.|\n)*replicate=2"):
        order_devices(devices((3, 2, 1), slices=2), (3, 4, 1, 1))


def test_slices_that_differ():
    found = devices((2, 2, 1), slices=2)
    found.remove(next(device for device in found if device["slice_index"] == 1))
    with pytest.raises(LayoutError, match=r"slice 0: 4 devices, slice 1: 3 devices"):
        order_devices(found, (7, 1, 1, 1))


def test_without_coordinates_the_numbers_count():
    """NeuronCores, virtual devices; and chips that do not fill a box."""
    assert order_devices([{"name": f"CPU:{n}"} for n in range(8)], (2, 2, 1, 2)).flatten().tolist() == list(range(8))
    holes = devices((2, 2, 1))
    holes[0]["coords"] = [5, 5, 0]
    assert order_devices(holes, (1, 4, 1, 1)).flatten().tolist() == [0, 1, 2, 3]
    neuron = [{"slice_index": None} for _ in range(4)]
    assert (count_slices(neuron), order_devices(neuron, (1, 4, 1, 1)).size) == (1, 4)


def test_a_part_of_a_slice_need_not_begin_at_zero():
    found = devices((2, 2, 1))
    for device in found:
        device["coords"] = [device["coords"][0] + 4, device["coords"][1] + 2, 0]
    mesh = order_devices(found, (1, 2, 1, 2))
    for one, other in lines(mesh, 3):
        assert distance(found[one], found[other], (99, 99, 99)) == 1


@given(st.data())
def test_any_layout_of_any_box_is_a_permutation(data):
    size = tuple(data.draw(st.sampled_from([1, 2, 3, 4, 6]), label=f"axis {axis}") for axis in "xyz")
    cores = data.draw(st.sampled_from([1, 2]), label="cores")
    left, degrees = math.prod(size) * cores, []
    for _ in range(3):
        degrees.append(data.draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0])))
        left //= degrees[-1]
    mesh = order_devices(devices(size, cores), (*degrees, left))
    assert sorted(mesh.flat) == list(range(math.prod(size) * cores))
