"""Parse the catalogue's YAML into `Chip` objects, strictly: all wrong entries are listed at once, by path."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from orchestrator.chips.catalogue import Catalogue
from orchestrator.chips.chip import Chip, Figure, Price, Topology
from orchestrator.errors import ConfigError, ConfigErrors

# Field of the YAML → attribute of Chip, factor to SI units, unit.
_FIGURES = {
    "fp32_dense_tflops": ("fp32_flops", 1e12, "FLOP/s"),
    "bf16_dense_tflops": ("bf16_flops", 1e12, "FLOP/s"),
    "fp8_dense_tflops": ("fp8_flops", 1e12, "FLOP/s"),
    "int8_dense_tops": ("int8_ops", 1e12, "OP/s"),
    "hbm_tb_per_s": ("hbm_bandwidth", 1e12, "byte/s"),
    "hbm_runtime_gib": ("hbm_runtime_bytes", 2.0**30, "byte"),
    "intra_gb_per_s_oneway": ("intra_bandwidth", 1e9, "byte/s"),
    "ici_gb_per_s_oneway_per_link": ("link_bandwidth", 1e9, "byte/s"),
    "power_w": ("power", 1.0, "W"),
}
_OTHERS = {
    "vendor",
    "name",
    "device_names",
    "hbm",
    "ici_links_per_chip",
    "inter_node_gb_per_s_oneway",
    "topology",
    "logical_devices_per_chip",
    "price_usd_per_chip_hour",
    "achievable_gemm",
    "measured",
    "note",
}
_FIGURE_KEYS = {"value", "source", "note", "where", "unit", "provider", "estimated", "server_w_per_chip", "server_note"}
_TOPOLOGY_COUNTS = ("domain_chips", "chips_per_host", "hosts_per_domain")
_TOPOLOGY_KEYS = {
    *_TOPOLOGY_COUNTS,
    "kind",
    "source",
    "note",
    "dims",
    "max_dims",
    "pod_chips",
    "domain_chips_gen1",
    "logical_devices_per_chip",
}
_MEMORY_UNITS = {"GB (vendor, 1e9)": 1e9, "GB": 1e9, "GiB": 2.0**30}
_TOP_KEYS = {
    "schema",
    "conventions",
    "sources",
    "chips",
    "facility",
    "measured_collectives",
    "capacity_block_prices_late_2024",
}


def check_shape(data: Any, origin: str) -> None:
    """Check the outermost mappings of a catalogue file before its parts are merged.

    Args:
        data: the parsed YAML.
        origin: the file's name, for messages.

    Raises:
        ConfigErrors: a part is no mapping.
    """
    problems: list[ConfigError] = []
    if not isinstance(data, Mapping):
        problems.append(_error(origin, "is not a mapping", data, "a mapping with 'chips' and, where needed, 'sources'"))
    else:
        _check_keys(data, _TOP_KEYS, origin, problems)
        for part in ("chips", "sources"):
            if not isinstance(data.get(part, {}), Mapping):
                problems.append(_error(f"{origin}: {part}", "is not a mapping", data[part], "key: value"))
        chips = data.get("chips", {})
        for key, entry in chips.items() if isinstance(chips, Mapping) else ():
            if not isinstance(entry, Mapping):
                problems.append(_error(f"{origin}: chips.{key}", "is not a mapping", entry, "the chip's fields"))
    if problems:
        raise ConfigErrors(problems)


def parse_catalogue(data: Mapping[str, Any], origin: str) -> Catalogue:
    """Build the catalogue from the plain data of a whole file.

    Args:
        data: the parsed YAML.
        origin: the file's name, for messages.

    Raises:
        ConfigErrors: all wrong entries.
    """
    check_shape(data, origin)
    sources = {str(key): str(text) for key, text in data.get("sources", {}).items()}
    problems: list[ConfigError] = []
    chips = {
        str(key): _Entry(str(key), entry, sources, origin, problems).chip()
        for key, entry in data.get("chips", {}).items()
    }
    if problems:
        raise ConfigErrors(problems)
    return Catalogue(chips, sources, data)


class _Entry:
    """One chip's mapping, read field by field; what is wrong goes to `problems`."""

    def __init__(
        self, key: str, data: Mapping[str, Any], sources: Mapping[str, str], origin: str, problems: list[ConfigError]
    ):
        self._key, self._data, self._sources, self._problems = key, data, sources, problems
        self._path = f"{origin}: chips.{key}"

    def chip(self) -> Chip:
        data = self._data
        _check_keys(data, {*_FIGURES, *_OTHERS}, self._path, self._problems)
        figures = {
            attribute: self._figure(data.get(name), name, factor, unit)
            for name, (attribute, factor, unit) in _FIGURES.items()
        }
        achievable = data.get("achievable_gemm") or {}
        if not isinstance(achievable, Mapping):
            self._wrong(
                "achievable_gemm", "is not a mapping", achievable, "bf16 and fp8, each null or {tflops, source}"
            )
            achievable = {}
        topology = self._topology()
        return Chip(
            key=self._key,
            vendor=self._text("vendor"),
            name=self._text("name"),
            device_names=tuple(str(name) for name in self._list("device_names")),
            hbm_bytes=self._memory(),
            inter_bandwidths=tuple(
                self._figure(item, f"inter_node_gb_per_s_oneway[{index}]", 1e9, "byte/s")
                for index, item in enumerate(self._list("inter_node_gb_per_s_oneway"))
            ),
            server_power=self._server_power(),
            prices=self._prices(),
            achievable_bf16_flops=self._achievable(achievable, "bf16"),
            achievable_fp8_flops=self._achievable(achievable, "fp8"),
            links_per_chip=self._count(data, "ici_links_per_chip", ""),
            logical_devices_per_chip=self._logical_devices(),
            topology=topology,
            note=data.get("note"),
            **figures,
        )

    def _figure(self, entry: Any, name: str, factor: float, unit: str) -> Figure:
        if entry is None:
            return Figure(None, unit)
        if not isinstance(entry, Mapping):
            self._wrong(name, "lacks its source", entry, "{value: number or null, source: where it is published}")
            return Figure(None, unit)
        _check_keys(entry, _FIGURE_KEYS, f"{self._path}.{name}", self._problems)
        value, source, note = entry.get("value"), entry.get("source"), entry.get("note") or entry.get("where")
        if value is None:
            return Figure(None, unit, None, note)
        if not self._is_positive(value, f"{name}.value"):
            return Figure(None, unit, None, note)
        if not self._is_source(source, f"{name}.source"):
            source = None
        return Figure(float(value) * factor, unit, source, note, entry.get("estimated", False) is True)

    def _is_positive(self, value: Any, name: str) -> bool:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        if not good:
            self._wrong(name, "is not a positive number", value, "a positive number, or null where it is unknown")
        return good

    def _is_source(self, source: Any, name: str) -> bool:
        if not isinstance(source, str) or not source.strip():
            self._wrong(
                name, "is missing: a figure needs its source", source, "a key of 'sources', or the source in words"
            )
            return False
        # One bare word is meant as a key; a source in words or an address has a space, a dot or a slash.
        if source not in self._sources and not any(mark in source for mark in " ./"):
            close = difflib.get_close_matches(source, self._sources, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            self._wrong(
                name, "is not in the table of sources", source, f"a key of 'sources', or the source in words{hint}"
            )
            return False
        return True

    def _memory(self) -> Figure:
        entry = self._data.get("hbm")
        unit = entry.get("unit") if isinstance(entry, Mapping) else None
        if isinstance(entry, Mapping) and entry.get("value") is not None and unit not in _MEMORY_UNITS:
            self._wrong("hbm.unit", "is no unit of memory", unit, "GB or GiB")
            return Figure(None, "byte")
        return self._figure(entry, "hbm", _MEMORY_UNITS.get(str(unit), 1.0), "byte")

    def _server_power(self) -> Figure:
        entry = self._data.get("power_w")
        if not isinstance(entry, Mapping) or entry.get("server_w_per_chip") is None:
            return Figure(None, "W")
        value, note = entry["server_w_per_chip"], entry.get("server_note")
        return self._figure({"value": value, "source": note, "note": note}, "power_w.server_w_per_chip", 1.0, "W")

    def _prices(self) -> tuple[Price, ...]:
        prices = []
        for index, item in enumerate(self._list("price_usd_per_chip_hour")):
            name = f"price_usd_per_chip_hour[{index}]"
            figure = self._figure(item, name, 1.0, "USD")
            provider = item.get("provider") if isinstance(item, Mapping) else None
            if not provider:
                self._wrong(f"{name}.provider", "is missing", provider, "whose price it is")
            prices.append(Price(figure, str(provider)))
        return tuple(prices)

    def _achievable(self, achievable: Mapping[str, Any], precision: str) -> Figure:
        entry = achievable.get(precision)
        if entry is None:
            return Figure(None, "FLOP/s")
        name = f"achievable_gemm.{precision}"
        if not isinstance(entry, Mapping):
            self._wrong(name, "is not a mapping", entry, "null, or {tflops, source}")
            return Figure(None, "FLOP/s")
        plain = {"value": entry.get("tflops"), "source": entry.get("source"), "note": entry.get("note")}
        return self._figure(plain, name, 1e12, "FLOP/s")

    def _topology(self) -> Topology:
        entry = self._data.get("topology")
        if entry is None:
            return Topology()
        if not isinstance(entry, Mapping):
            self._wrong("topology", "is not a mapping", entry, "kind, domain_chips, chips_per_host, source")
            return Topology()
        _check_keys(entry, _TOPOLOGY_KEYS, f"{self._path}.topology", self._problems)
        source = entry.get("source")
        self._is_source(source, "topology.source")
        counts = {name: self._count(entry, name, "topology.") for name in _TOPOLOGY_COUNTS}
        dims = tuple(entry.get("max_dims") or entry.get("dims") or ())
        return Topology(entry.get("kind"), **counts, dims=dims, source=source, note=entry.get("note"))

    def _logical_devices(self) -> int:
        topology = self._data.get("topology")
        where = topology if isinstance(topology, Mapping) and "logical_devices_per_chip" in topology else self._data
        return self._count(where, "logical_devices_per_chip", "") or 1

    def _count(self, entry: Mapping[str, Any], name: str, prefix: str) -> int | None:
        value = entry.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self._wrong(prefix + name, "is not a whole number above 0", value, "1, 2, 3, ...")
            return None
        return value

    def _text(self, name: str) -> str:
        value = self._data.get(name)
        if not isinstance(value, str) or not value:
            self._wrong(name, "is missing", value, "a text: a new chip needs vendor and name")
            return ""
        return value

    def _list(self, name: str) -> list[Any]:
        value = self._data.get(name, [])
        if not isinstance(value, list):
            self._wrong(name, "is not a list", value, "a list; [] where nothing is known")
            return []
        return value

    def _wrong(self, name: str, what: str, got: Any, allowed: str) -> None:
        self._problems.append(_error(f"{self._path}.{name}", what, got, allowed))


def _check_keys(data: Mapping[str, Any], known: set[str], path: str, problems: list[ConfigError]) -> None:
    for key in data:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            fix = f"did you mean '{close[0]}'?" if close else None
            problems.append(
                ConfigError(f"{path}: there is no field '{key}'", got=key, allowed=", ".join(sorted(known)), fix=fix)
            )


def _error(path: str, what: str, got: Any, allowed: str) -> ConfigError:
    return ConfigError(f"{path} {what}", got="nothing" if got is None else got, allowed=allowed)
