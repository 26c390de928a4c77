"""Collectives: the formulas of rings and of tori, the two levels of a cluster, and what is not known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.planner.estimate.links import Ring, ring
from orchestrator.planner.evidence.calibration import Calibration
from tests.planner.shapes import cluster

IDEAL = Calibration("test", "nvidia", intra_link=1.0, inter_link=1.0, intra_hop=0.0, inter_hop=0.0)


def test_a_ring_moves_all_but_its_own_part():
    """(n-1)/n of the whole past every device at 450 GB/s; an all-reduce is twice that."""
    eight = ring(cluster("h100-sxm", 8), IDEAL, 8, 1)
    assert (eight.inside, eight.outside) == (8, 1)
    assert eight.gather(8e9) == pytest.approx(8e9 * 7 / 8 / 450e9)
    assert eight.reduce(8e9) == pytest.approx(2 * eight.gather(8e9))


def test_latency_grows_with_the_ring():
    slow = Calibration("test", "nvidia", intra_hop=2e-6, inter_hop=5e-6)
    assert ring(cluster("h100-sxm", 8), slow, 8, 1).gather(0) == pytest.approx(7 * 2e-6)
    assert ring(cluster("h100-sxm", 32), slow, 32, 1).gather(0) == pytest.approx(7 * 2e-6 + 3 * 5e-6)


def test_between_hosts_every_member_brings_its_own_link():
    """32 GPUs on 4 hosts: a host takes in 3/4 of the whole over 8 links; NVLink, faster, does not set the pace."""
    spread = ring(cluster("h100-sxm", 32, inter=25e9), IDEAL, 32, 1)
    assert (spread.inside, spread.outside) == (8, 4)
    assert spread.gather(32e9) == pytest.approx(32e9 * 3 / 4 / (8 * 25e9))
    # Behind a tensor axis of 8 there is one member per host, and one link.
    strided = ring(cluster("h100-sxm", 32), IDEAL, 4, 8)
    assert (strided.inside, strided.outside) == (1, 4)
    assert strided.gather(4e9) == pytest.approx(4e9 * 3 / 4 / 50e9)


def test_a_rack_is_one_domain():
    assert ring(cluster("gb200", 72), IDEAL, 64, 1).outside == 1
    assert ring(cluster("b200", 72), IDEAL, 64, 1).outside == 8


def test_the_clusters_own_network_counts():
    fast = ring(cluster("h100-sxm", 16, inter=10e9), IDEAL, 16, 1)
    slow = ring(cluster("h100-sxm", 16, inter=1e9), IDEAL, 16, 1)
    assert slow.gather(1e9) == pytest.approx(10 * fast.gather(1e9))


def test_an_axis_of_a_torus_has_the_links_of_the_dimensions_it_covers():
    """v5e, 16 x 16: an axis of 16 has 2 of the 4 links of 45 GB/s, one of 256 has all."""
    pod = cluster("tpu-v5e", 256)
    assert ring(pod, IDEAL, 16, 1).intra == pytest.approx(90e9)
    assert ring(pod, IDEAL, 256, 1).intra == pytest.approx(180e9)
    # Slices too short to close their rings use each link one way.
    assert ring(cluster("tpu-v5e", 64), IDEAL, 64, 1).intra == pytest.approx(90e9)


def test_a_full_mesh_gives_a_small_group_only_its_own_links():
    node = cluster("mi300x", 8)
    assert ring(node, IDEAL, 8, 1).intra == pytest.approx(448e9)
    assert ring(node, IDEAL, 2, 1).intra == pytest.approx(448e9 / 7)


def test_logical_devices_share_the_chips_links():
    assert ring(cluster("trn1", 16), IDEAL, 32, 1).intra == pytest.approx(384e9 / 2)


def test_a_link_that_nobody_has_published_is_named_and_takes_no_time():
    two = cluster("tpu-v7x", 9216 * 2)
    two_pods = ring(replace(two, chip=replace(two.chip, inter_bandwidths=())), IDEAL, 2, 9216 * 2)
    assert two_pods.unknown == "inter_bandwidth"
    assert two_pods.gather(1e9) == 0
    assert ring(cluster("tpu-v7x", 9216), IDEAL, 64, 1).unknown is None


def test_tokens_cross_to_a_host_once_however_many_experts_are_there():
    rings = {copies: Ring(8, 4, 1e30, 1e9, 0.0).exchange(1e9, copies) for copies in (1, 2, 8)}
    assert rings[1] == pytest.approx(0.75)
    assert rings[1] < rings[2] < rings[8] < 3.0, "at most to the three other hosts"


def test_alone_nothing_is_sent():
    alone = ring(cluster("h100-sxm", 8), IDEAL, 1, 1)
    assert alone.gather(1e9) == alone.reduce(1e9) == alone.exchange(1e9, 2) == alone.send(1e9) == 0
