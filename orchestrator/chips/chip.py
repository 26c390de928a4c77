"""One accelerator: its figures, each with a source or unknown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from orchestrator.errors import ConfigError

UNVERIFIED = "memory-unverified"
"""The source of a figure without a published confirmation."""


@dataclass(frozen=True)
class Figure:
    """A number with its source.

    Attributes:
        value: None where no public figure was found.
        unit: of `value`.
        source: key of `Catalogue.sources`, or the source itself; None only where the value is unknown.
        note: what else must be known to use the number.
        estimated: derived from other figures, not published as such.
    """

    value: float | None
    unit: str
    source: str | None = None
    note: str | None = None
    estimated: bool = False

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return self.value is not None

    @property
    def verified(self) -> bool:
        """Whether a source confirms the value. An unverified one must never be shown as published."""
        return self.known and self.source != UNVERIFIED

    def scaled(self, factor: float, note: str) -> Figure:
        """Return the figure times `factor`; unknown stays unknown.

        Args:
            factor: what it is multiplied by.
            note: what the factor stands for, added to the source.
        """
        if self.value is None:
            return self
        return replace(self, value=self.value * factor, note=f"{self.note}; {note}" if self.note else note)

    def __str__(self) -> str:
        if self.value is None:
            return "unknown"
        flags = [text for flag, text in ((self.estimated, "estimated"), (not self.verified, "unverified")) if flag]
        return f"{self.value:.4g} {self.unit}" + (f" ({', '.join(flags)})" if flags else "")


@dataclass(frozen=True)
class Topology:
    """The wiring of the chips of one fast domain.

    Attributes:
        kind: `3D torus`, `switched (NVSwitch)`, ...
        domain_chips: chips that the fast links join.
        chips_per_host: None where unknown.
        hosts_per_domain: None where unknown.
        dims: longest side per dimension of a torus; None where unknown.
        source: of these figures.
        note: what else is to be known.
    """

    kind: str | None = None
    domain_chips: int | None = None
    chips_per_host: int | None = None
    hosts_per_domain: int | None = None
    dims: tuple[int | None, ...] = ()
    source: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Price:
    """An on-demand list price in USD per chip-hour, and whose it is.

    Attributes:
        usd_per_chip_hour: the price.
        provider: whose price it is.
    """

    usd_per_chip_hour: Figure
    provider: str


@dataclass(frozen=True)
class Chip:
    """One accelerator as it is sold.

    Attributes:
        key: in the catalogue.
        vendor: such as `nvidia`.
        name: for people.
        device_names: what the driver or torch calls exactly this chip.
        fp32_flops: dense peak, FLOP/s.
        bf16_flops: dense peak, FLOP/s.
        fp8_flops: dense peak, FLOP/s.
        int8_ops: dense peak, operations/s.
        hbm_bytes: memory of the chip.
        hbm_runtime_bytes: of it, what the runtime lets a program use.
        hbm_bandwidth: bytes/s.
        intra_bandwidth: bytes/s one way between chips of a fast domain.
        link_bandwidth: bytes/s one way of one link.
        inter_bandwidths: bytes/s one way and chip between hosts, one per deployment (`note` says which).
        power: watts of the chip.
        server_power: of the whole server, per chip.
        prices: on-demand list prices.
        links_per_chip: fast links; None where unknown.
        logical_devices_per_chip: devices that torch sees per chip.
        topology: how a fast domain is wired.
        achievable_*: the best matrix product that was measured.
    """

    key: str
    vendor: str
    name: str
    device_names: tuple[str, ...]
    fp32_flops: Figure
    bf16_flops: Figure
    fp8_flops: Figure
    int8_ops: Figure
    hbm_bytes: Figure
    hbm_runtime_bytes: Figure
    hbm_bandwidth: Figure
    intra_bandwidth: Figure
    link_bandwidth: Figure
    inter_bandwidths: tuple[Figure, ...]
    power: Figure
    server_power: Figure
    prices: tuple[Price, ...]
    achievable_bf16_flops: Figure
    achievable_fp8_flops: Figure
    links_per_chip: int | None = None
    logical_devices_per_chip: int = 1
    topology: Topology = Topology()
    note: str | None = None

    def peak_flops(self, precision: str) -> Figure:
        """Return the dense peak of the chip in FLOP/s.

        Args:
            precision: `fp32`, `bf16` or `fp8`.

        Raises:
            ConfigError: no such precision.
        """
        peaks = {"fp32": self.fp32_flops, "bf16": self.bf16_flops, "fp8": self.fp8_flops}
        if precision not in peaks:
            raise ConfigError("there is no peak rate for this precision", got=precision, allowed=", ".join(peaks))
        return peaks[precision]

    def device_peak_flops(self, precision: str) -> Figure:
        """Return the dense peak of one device in FLOP/s: a part of the chip where torch counts several.

        Args:
            precision: as for `peak_flops`.
        """
        peak = self.peak_flops(precision)
        parts = self.logical_devices_per_chip
        return peak if parts == 1 else peak.scaled(1 / parts, f"per device: {parts} devices per chip")

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """All figures with their names."""
        for name, value in vars(self).items():
            if isinstance(value, Figure):
                yield name, value
        for index, link in enumerate(self.inter_bandwidths):
            yield f"inter_bandwidths[{index}]", link
        for index, price in enumerate(self.prices):
            yield f"prices[{index}]", price.usd_per_chip_hour
