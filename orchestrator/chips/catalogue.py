"""The catalogue of accelerators.

Figures come from `chips.yaml`, where each has a source; what nobody published is `unknown` (a `Figure` whose
value is None), never a guess. A user's own YAML adds chips or overrides single figures. Everything here is in
SI units per chip as sold: FLOP/s, bytes, bytes/s, watts.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import ConfigError

UNVERIFIED = "memory-unverified"
"""The source of a figure that nobody has confirmed."""


@dataclass(frozen=True)
class Figure:
    """A number with its origin.

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
        return self.value is not None

    @property
    def verified(self) -> bool:
        """Whether a source confirms the value. An unverified one must never be shown as published."""
        return self.known and self.source != UNVERIFIED

    def scaled(self, factor: float, note: str) -> Figure:
        """The figure times `factor`; unknown stays unknown."""
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
    """How the chips of one fast domain are wired.

    Attributes:
        kind: `3D torus`, `switched (NVSwitch)`, ...
        domain_chips: chips that the fast links join.
        dims: longest side per dimension of a torus; None where unknown.
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
    """An on-demand list price in USD per chip-hour, and whose it is."""

    usd_per_chip_hour: Figure
    provider: str


@dataclass(frozen=True)
class Chip:
    """One accelerator as it is sold.

    Attributes:
        device_names: what the driver or torch calls exactly this chip.
        intra_bandwidth: bytes/s one way between chips of a fast domain.
        inter_bandwidths: bytes/s one way and chip between hosts, one per deployment (`note` says which).
        logical_devices_per_chip: devices that torch sees per chip.
        server_power: of the whole server, per chip.
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
        """Dense peak of the chip in FLOP/s, for `fp32`, `bf16` or `fp8`.

        Raises:
            ConfigError: no such precision.
        """
        peaks = {"fp32": self.fp32_flops, "bf16": self.bf16_flops, "fp8": self.fp8_flops}
        if precision not in peaks:
            raise ConfigError("there is no peak rate for this precision", got=precision, allowed=", ".join(peaks))
        return peaks[precision]

    def device_peak_flops(self, precision: str) -> Figure:
        """Dense peak of one device as torch counts them: a part of the chip where it has several."""
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


@dataclass(frozen=True)
class Catalogue:
    """Chips by key, with the table of sources. `raw` keeps the file's other sections (facility, collectives)."""

    chips: Mapping[str, Chip]
    sources: Mapping[str, str]
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def get(self, key: str) -> Chip:
        """The chip of that key.

        Raises:
            ConfigError: there is none.
        """
        if key not in self.chips:
            close = difflib.get_close_matches(key.lower(), self.chips, n=1)
            raise ConfigError(
                "there is no such chip in the catalogue",
                got=key,
                allowed=", ".join(self.chips),
                fix=f"did you mean '{close[0]}'?" if close else "add it in a YAML of your own, with its sources",
            )
        return self.chips[key]

    def __iter__(self) -> Iterator[Chip]:
        return iter(self.chips.values())

    def __len__(self) -> int:
        return len(self.chips)

    def match_device_name(self, name: str) -> str | None:
        """The key of the chip that a driver calls `name`; None unless it is surely that one.

        PCIe, NVL and partitioned parts share a family's name and not its figures, so only whole names match.
        """
        wanted = " ".join(name.split()).casefold()
        for chip in self:
            if any(wanted == known.casefold() for known in chip.device_names):
                return chip.key
        return None

    def cite(self, figure: Figure) -> str:
        """The figure's source in full; `unknown` where there is no figure."""
        if figure.source is None:
            return "unknown"
        return self.sources.get(figure.source, figure.source)


def load(extra_path: str | Path | None = None) -> Catalogue:
    """The catalogue, with the chips of the YAML file `extra_path` added or laid over it.

    An entry of a chip that is there already replaces only the fields that it names.

    Raises:
        ConfigError: `extra_path` cannot be read or is no YAML.
        ConfigErrors: wrong entries, each named by its path.
    """
    return _shipped() if extra_path is None else _merged(Path(extra_path))


def match_device_name(name: str) -> str | None:
    """`Catalogue.match_device_name` of the shipped catalogue."""
    return load().match_device_name(name)


@functools.cache
def _shipped() -> Catalogue:
    from orchestrator.chips.parse import parse_catalogue

    return parse_catalogue(_shipped_data(), "chips.yaml")


def _shipped_data() -> dict[str, Any]:
    text = Path(__file__).with_name("chips.yaml").read_text(encoding="utf-8")
    # The parser in C, which most builds have, takes a tenth of the time.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    data: dict[str, Any] = loader(text).get_single_data()
    return data


def _merged(path: Path) -> Catalogue:
    from orchestrator.chips.parse import check_shape, parse_catalogue

    try:
        extra = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            "the chip catalogue cannot be read", got=f"{path}: {reason}", allowed="a YAML file"
        ) from error
    check_shape(extra, path.name)
    base = _shipped_data()
    chips = dict(base["chips"])
    for key, entry in extra.get("chips", {}).items():
        chips[key] = {**chips.get(key, {}), **entry}
    sources = {**base["sources"], **extra.get("sources", {})}
    return parse_catalogue({**base, "chips": chips, "sources": sources}, path.name)
