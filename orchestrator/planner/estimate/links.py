"""Seconds of collectives over the links of a cluster: switched domains, meshes, tori, and the network between them.

Rings move (n-1)/n of what is gathered past every device (Patarasuk and Yuan 2009). In a torus an axis has the
links of the dimensions it covers, both ways (jax-ml/scaling-book, "Sharded matrices"). Between domains every
member of the group has its own share of the network, and the slower of the two levels sets the pace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.planner.evidence.calibration import Calibration
from orchestrator.planner.spec import Cluster


@dataclass(frozen=True)
class Ring:
    """The links among the devices of one axis.

    Attributes:
        inside: devices of the group within a domain.
        outside: domains that the group spans.
        intra: bytes/s within a domain, one way and per device; None where the catalogue does not say.
        inter: the same between domains.
        hops: seconds of latency of one pass.
    """

    inside: int
    outside: int
    intra: float | None
    inter: float | None
    hops: float

    @property
    def size(self) -> int:
        """Devices of the group."""
        return self.inside * self.outside

    @property
    def unknown(self) -> str | None:
        """The figure that is missing to say how long a collective takes."""
        if self.outside > 1 and self.inter is None:
            return "inter_bandwidth"
        return "intra_bandwidth" if self.inside > 1 and self.intra is None else None

    def gather(self, total_bytes: float) -> float:
        """Seconds of an all-gather, or of a reduce-scatter, of `total_bytes` (the whole, not the shard).

        A level whose bandwidth is unknown takes no time here: ask `unknown`.
        """
        if self.size == 1:
            return 0.0
        within = total_bytes * (self.inside - 1) / self.inside / self.intra if self.inside > 1 and self.intra else 0.0
        between = 0.0
        if self.outside > 1 and self.inter:
            between = total_bytes * (self.outside - 1) / self.outside / (self.inter * self.inside)
        return max(within, between) + self.hops

    def reduce(self, total_bytes: float) -> float:
        """Return the seconds of an all-reduce: a reduce-scatter, then an all-gather.

        Args:
            total_bytes: of the whole tensor.
        """
        return 2 * self.gather(total_bytes)

    def exchange(self, token_bytes: float, copies: int) -> float:
        """Seconds to send each token to `copies` experts spread evenly over the group.

        A token crosses to a domain once however many of its experts are there, and is copied inside it.

        Args:
            token_bytes: of one device's tokens, each counted once.
            copies: experts of a token.
        """
        if self.size == 1:
            return 0.0
        domains = self.outside * (1 - (1 - 1 / self.outside) ** copies)
        away = token_bytes * domains * (self.outside - 1) / self.outside
        near = token_bytes * self.inside * (1 - (1 - 1 / self.size) ** copies) * (self.inside - 1) / self.inside
        within = near / self.intra if self.intra else 0.0
        between = away / self.inter if self.inter else 0.0
        return max(within, between) + self.hops

    def send(self, total_bytes: float) -> float:
        """Seconds to hand `total_bytes` to the next device of the group."""
        rate = self.inter if self.outside > 1 else self.intra
        return total_bytes / rate + self.hops / max(self.size - 1, 1) if rate and self.size > 1 else 0.0


def ring(cluster: Cluster, constants: Calibration, size: int, stride: int) -> Ring:
    """Return the group of `size` devices that are `stride` apart.

    Axes are laid out as `sharding.axes.MESH_AXES`, the last one inside.

    Args:
        cluster: chips and links.
        constants: of the software stack.
        size: devices of the group.
        stride: distance of neighbours in the group, in devices.
    """
    if size == 1:
        return Ring(1, 1, None, None, 0.0)
    chip, parts = cluster.chip, cluster.chip.logical_devices_per_chip
    domain = (cluster.domain_chips or chip.topology.domain_chips or chip.topology.chips_per_host or 1) * parts
    inside = min(size, max(1, domain // stride))
    outside = math.ceil(size / inside)
    inter = inter_bandwidth(cluster)
    intra = _intra_bandwidth(cluster, inside, stride, domain)
    torus = "torus" in (chip.topology.kind or "")
    steps = _torus_steps(inside, _dimensions(cluster)) if torus else inside - 1
    hops = steps * constants.intra_hop + (outside - 1) * constants.inter_hop
    return Ring(
        inside,
        outside,
        intra * constants.intra_link if intra else None,
        inter / parts * constants.inter_link if inter else None,
        hops,
    )


def inter_bandwidth(cluster: Cluster) -> float | None:
    """Return the bytes/s, one way and chip, between domains: the cluster's own, or the catalogue's first deployment.

    Args:
        cluster: chips and links.
    """
    if cluster.inter_bandwidth is not None:
        return cluster.inter_bandwidth
    known = cluster.chip.inter_bandwidths
    return known[0].value if known else None


def _intra_bandwidth(cluster: Cluster, inside: int, stride: int, domain: int) -> float | None:
    chip = cluster.chip
    total = chip.intra_bandwidth.value
    if total is None:
        return None
    kind, parts = chip.topology.kind or "", chip.logical_devices_per_chip
    if "mesh" in kind and domain > parts:
        # Each pair of chips has a link of its own: a small group uses only those between its members.
        chips = max(1, inside // max(1, parts // stride)) if parts > 1 else inside
        return total / parts * max(1, chips - 1) / (domain // parts - 1)
    if "torus" not in kind:
        return total / parts
    dimensions = _dimensions(cluster)
    slice_devices = min(domain, cluster.devices)
    side = max(2.0, slice_devices ** (1 / dimensions))
    covered = min(dimensions, max(1, math.ceil(math.log(inside) / math.log(side) - 0.01))) if inside > 1 else 1
    return total / parts * covered / dimensions * _wrap(cluster, slice_devices // parts, dimensions)


def _dimensions(cluster: Cluster) -> int:
    return 3 if "3D" in (cluster.chip.topology.kind or "") else 2


def _wrap(cluster: Cluster, slice_chips: int, dimensions: int) -> float:
    """Share of the links that an axis uses both ways round: a slice too short to close its rings has half."""
    longest = cluster.chip.topology.dims[0] if cluster.chip.topology.dims else None
    needed = 4 if dimensions == 3 else (longest or 4)
    return 1.0 if slice_chips >= needed**dimensions else 0.5


def _torus_steps(inside: int, dimensions: int) -> float:
    return dimensions * (inside ** (1 / dimensions) - 1)
