"""Fleets: which chips, how many, at what price and power; and their short notation.

`h100x1024` is so many chips, `tpu_v7x@1GW` as many as so much power carries, `tpu_v7xx1M@1GW` no more than either,
`h100@$5M` as many as make the run cost no more than that, `2xtpu_v5p:8x16x16` two slices of that shape. A YAML file
says the same with overrides.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from orchestrator.chips.catalogue import Catalogue
from orchestrator.chips.chip import Chip
from orchestrator.errors import ConfigError, ConfigErrors, UserError
from orchestrator.planner.quantity import Value, derive, given, of_figure, unknown, write
from orchestrator.planner.slices import Slices, fit_slices, is_tpu, legal_shapes
from orchestrator.planner.spec import Cluster

GRAMMAR = (
    "CHIPxNUMBER (h100x1024), CHIP@POWER (tpu_v7x@1GW), both (tpu_v7xx1M@1GW), CHIP@$BUDGET (h100@$5M), "
    "CHIP:SHAPE (2xtpu_v5p:8x16x16)"
)
_COUNT = re.compile(r"(?P<chip>.+?)x(?P<number>\d[\d_]*(?:\.\d+)?)(?P<suffix>[kM]?)")
_BOUND = re.compile(r"(?P<chip>[^@]+)@(?P<dollar>\$?)(?P<number>\d[\d_]*(?:\.\d+)?)(?P<suffix>[A-Za-z]*)")
_SHAPE = re.compile(r"(?:(?P<slices>\d+)x)?(?P<chip>[^:]+):(?P<shape>\d+(?:x\d+){1,2})")
_COUNTS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9}
_WATTS = {"kw": 1e3, "mw": 1e6, "gw": 1e9}
_ALIASES = {
    "a100": "a100-80",
    "h100": "h100-sxm",
    "mi250": "mi250x",
    "mi300": "mi300x",
    "mi325": "mi325x",
    "mi355": "mi355x",
    "trainium": "trn1",
    "trainium1": "trn1",
    "trainium2": "trn2",
    "trainium3": "trn3",
    "trillium": "tpu-v6e",
    "ironwood": "tpu-v7x",
    "tpu7x": "tpu-v7x",
    "cpu": "cpu-generic",
}


@dataclass(frozen=True)
class FleetEntry:
    """A fleet as it is asked for: `chip`, one of `chips`, `shape`, `megawatts`, `budget_usd`, and overrides.

    With both `chips` and `megawatts`, as many as both allow.

    Attributes:
        name: of the fleet; None: its chips.
        shape: of a TPU slice; `slices` of them.
        megawatts: of the facility, cooling included.
        budget_usd: that the whole run may cost.
        inter_gb_per_s: one way and chip, between hosts or slices.
        domain_chips: chips that the fast links join; None: the catalogue's.
        price_usd_per_chip_hour: None: the lowest list price.
        watts_per_chip: of the server, per chip.
        pue: facility power over server power; None: by vendor.
        failures_per_chip_day: that stop a job.
    """

    chip: str = ""
    name: str | None = None
    chips: int | None = None
    shape: str | None = None
    slices: int = 1
    megawatts: float | None = None
    budget_usd: float | None = None
    inter_gb_per_s: float | None = None
    domain_chips: int | None = None
    price_usd_per_chip_hour: float | None = None
    watts_per_chip: float | None = None
    pue: float | None = None
    failures_per_chip_day: float | None = None


@dataclass(frozen=True)
class Fleet:
    """A fleet of chips, with price and power.

    Attributes:
        label: for people.
        entry: what was asked for.
        paid_chips: what was asked for; `cluster.chips` of them are whole hosts or slices.
        slices: of a TPU.
        price: USD per chip-hour.
        power: watts of the server, per chip.
        pue: facility power over server power.
        notes: what was rounded or assumed.
    """

    label: str
    entry: FleetEntry
    cluster: Cluster
    paid_chips: int
    slices: Slices | None
    price: Value
    power: Value
    pue: Value
    notes: tuple[str, ...] = ()

    @property
    def domains(self) -> int:
        """Slices; 1 for chips that do not come in slices."""
        return self.slices.count if self.slices else 1


def split_fleets(text: str) -> list[str]:
    """Split `h100x1024`, or several fleets in brackets, into words.

    Args:
        text: one word or several.
    """
    return [word.strip() for word in text.strip().removeprefix("[").removesuffix("]").split(",")]


def parse_fleet(word: str) -> FleetEntry:
    """Parse a fleet in the short form.

    Args:
        word: the short form.

    Raises:
        ConfigError: it is not written as `GRAMMAR` says.
    """
    entry = _parse(word)
    if entry is None:
        raise ConfigError("not a fleet", got=f"fleet={word}", allowed=GRAMMAR)
    return entry


def find_chip(name: str, catalogue: Catalogue) -> Chip:
    """Return the chip that a user calls `name`.

    Args:
        name: of the figure.
        catalogue: of chips.

    Raises:
        ConfigError: no such chip.
    """
    key = name.strip().lower().replace("_", "-")
    key = _ALIASES.get(key, key)
    for candidate in (key, f"tpu-{key}"):
        if candidate in catalogue.chips:
            return catalogue.chips[candidate]
    known = [*catalogue.chips, *_ALIASES]
    close = difflib.get_close_matches(key, known, n=1)
    raise ConfigError(
        "there is no such chip in the catalogue",
        got=name,
        allowed=", ".join(catalogue.chips),
        fix=f"did you mean '{close[0]}'?" if close else "add it in a YAML of your own: chips_file=FILE",
    )


def resolve_fleets(
    items: Sequence[str | FleetEntry], catalogue: Catalogue, defaults: FleetEntry = FleetEntry()
) -> list[Fleet]:
    """Return the fleets with their figures; gaps of an entry are filled from `defaults`, then the catalogue.

    Args:
        items: words or entries.
        catalogue: of chips.
        defaults: for what an entry leaves open.

    Raises:
        ConfigErrors: all that is wrong with all of them.
    """
    problems: list[UserError] = []
    fleets: list[Fleet] = []
    for item in items:
        try:
            entry = parse_fleet(item) if isinstance(item, str) else item
            fleets.append(resolve_fleet(_filled(entry, defaults), catalogue))
        except ConfigErrors as error:
            problems += error.problems
        except UserError as error:
            problems.append(error)
    if problems:
        raise ConfigErrors(problems)
    labels = [fleet.label for fleet in fleets]
    return [
        replace(fleet, label=f"{fleet.label} ({index + 1})") if labels.count(fleet.label) > 1 else fleet
        for index, fleet in enumerate(fleets)
    ]


def resolve_fleet(entry: FleetEntry, catalogue: Catalogue, chips: int | None = None) -> Fleet:
    """Return one fleet with its figures.

    A budget without `chips` gives the smallest fleet that there is.

    Args:
        entry: what is asked for.
        catalogue: of chips.
        chips: how many, where the entry gives a budget and the caller has chosen.

    Raises:
        ConfigError: no such chip or shape, or chips that power does not determine.
    """
    chip = find_chip(entry.chip, catalogue)
    _check_entry(entry, chip)
    price, power, pue = _price(entry, chip, catalogue), _power(entry, chip, catalogue), _pue(entry, chip, catalogue)
    notes: list[str] = []
    asked = _asked(entry, chip, power, pue, notes) if chips is None else chips
    slices: Slices | None = None
    if entry.shape:
        slices = Slices(entry.slices, tuple(map(int, entry.shape.split("x"))))
        used = slices.chips
    elif is_tpu(chip):
        slices = fit_slices(chip, asked)
        used = slices.chips if slices else 0
    else:
        used = _whole_hosts(chip, asked)
    if not used:
        least = min(legal_shapes(chip.key, chip.topology.domain_chips or 0))
        raise ConfigError(f"there is no slice of {chip.key} as small as that", got=asked, allowed=f"{least} or more")
    if used != asked:
        what = str(slices) if slices else f"whole hosts of {chip.topology.chips_per_host}"
        notes.append(f"{asked:,} chips rounded down to {used:,}: {what}")
    domain = slices.chips_each if slices else entry.domain_chips
    bandwidth = entry.inter_gb_per_s * 1e9 if entry.inter_gb_per_s is not None else None
    cluster = Cluster(chip, used, bandwidth, domain)
    paid = used if entry.megawatts is not None or entry.budget_usd is not None else asked
    return Fleet(entry.name or _label(entry, chip, used), entry, cluster, paid, slices, price, power, pue, tuple(notes))


def inter_bandwidth(fleet: Fleet, catalogue: Catalogue) -> Value:
    """Return the bytes/s, one way and chip, between hosts or slices, as the estimators take it.

    Args:
        fleet: the chips.
        catalogue: of chips.
    """
    name, links = "network per chip", fleet.cluster.chip.inter_bandwidths
    if fleet.cluster.inter_bandwidth is not None:
        return given(name, fleet.cluster.inter_bandwidth, "byte/s", "given for this fleet")
    return of_figure(name, links[0], "byte/s", catalogue) if links else unknown(name, "byte/s", "not in the catalogue")


def _parse(word: str) -> FleetEntry | None:
    if match := _SHAPE.fullmatch(word):
        return FleetEntry(chip=match["chip"], shape=match["shape"], slices=int(match["slices"] or 1))
    if match := _BOUND.fullmatch(word):
        return _bounded(match)
    if match := _COUNT.fullmatch(word):
        count = float(match["number"].replace("_", "")) * _COUNTS[match["suffix"]]
        return FleetEntry(chip=match["chip"], chips=int(count)) if count >= 1 else None
    return None


def _bounded(match: re.Match[str]) -> FleetEntry | None:
    """CHIP@POWER or CHIP@$BUDGET; before a power there may be a number of chips too."""
    number, suffix = float(match["number"].replace("_", "")), match["suffix"]
    if match["dollar"]:
        return FleetEntry(chip=match["chip"], budget_usd=number * _COUNTS[suffix]) if suffix in _COUNTS else None
    watts = _WATTS.get(suffix.lower())
    if watts is None:
        return None
    most = _parse(match["chip"]) if _COUNT.fullmatch(match["chip"]) else FleetEntry(chip=match["chip"])
    return None if most is None else replace(most, megawatts=number * watts / 1e6)


def _filled(entry: FleetEntry, defaults: FleetEntry) -> FleetEntry:
    open_fields = [field.name for field in fields(entry) if getattr(entry, field.name) is None]
    return replace(entry, **{name: getattr(defaults, name) for name in open_fields})


def _check_entry(entry: FleetEntry, chip: Chip) -> None:
    problems: list[UserError] = []
    sizes = [name for name in ("chips", "shape", "megawatts", "budget_usd") if getattr(entry, name) is not None]
    if len(sizes) != 1 and sizes != ["chips", "megawatts"]:
        what = f"the fleet of {chip.key} has no size" if not sizes else f"the fleet of {chip.key} has several sizes"
        got = ", ".join(f"{name}={getattr(entry, name)}" for name in sizes) or "none"
        problems.append(
            ConfigError(
                what, got=got, allowed="one of chips, shape, megawatts, budget_usd; or both of chips and megawatts"
            )
        )
    for field in fields(entry):
        value = getattr(entry, field.name)
        if isinstance(value, (int, float)) and not 0 < value < float("inf"):
            problems.append(ConfigError(f"'{field.name}' of {chip.key} is out of range", got=value, allowed="above 0"))
    if entry.pue is not None and entry.pue < 1:
        problems.append(
            ConfigError("a PUE is facility power over the power of the servers", got=entry.pue, allowed="1 or more")
        )
    if entry.shape is not None:
        if not is_tpu(chip):
            problems.append(ConfigError("only TPUs come in slices", got=f"{entry.chip}:{entry.shape}", allowed=GRAMMAR))
        else:
            problems += _check_shape(entry, chip)
    if problems:
        raise ConfigErrors(problems)


def _check_shape(entry: FleetEntry, chip: Chip) -> list[UserError]:
    shape = tuple(sorted(int(side) for side in (entry.shape or "").split("x")))
    size = Slices(1, shape).chips_each
    legal = legal_shapes(chip.key, chip.topology.domain_chips or 0)
    # Any order of the sides is the same slice; of boxes with as many chips only the squarest is listed.
    cubes = len(shape) == 3 and all(side % 4 == 0 for side in shape) and size in legal
    if tuple(sorted(legal.get(size, ()))) == shape or cubes:
        return []
    close = [size for size in legal if size <= max(size, 1)]
    near = "x".join(map(str, legal[max(close, default=min(legal))]))
    return [
        ConfigError(f"there is no such slice of {chip.key}", got=entry.shape, fix=f"the next smaller one is {near}")
    ]


def _asked(entry: FleetEntry, chip: Chip, power: Value, pue: Value, notes: list[str]) -> int:
    if entry.chips is not None and entry.megawatts is None:
        return entry.chips
    if entry.shape is not None:
        return Slices(entry.slices, tuple(map(int, entry.shape.split("x")))).chips
    if entry.megawatts is None:
        return chip.topology.chips_per_host or 1
    megawatts = given("megawatts", entry.megawatts, "MW", "the fleet")
    formula = "megawatts / (server power per chip x PUE)"
    count = derive("chips", "chips", formula, lambda m, w, p: m * 1e6 / (w * p), megawatts, power, pue, falling=(1, 2))
    if count.value is None:
        raise ConfigError(
            f"the power of {chip.key} is not published, so megawatts do not say how many chips there are",
            got=f"{entry.megawatts:g} MW",
            fix="give the server's watts per chip: watts_per_chip=..., or a number of chips",
        )
    notes.append(f"{entry.megawatts:,g} MW carry {count} chips at {power} and PUE {pue}")
    return min(int(count.value), entry.chips or int(count.value))


def _whole_hosts(chip: Chip, chips: int) -> int:
    host = chip.topology.chips_per_host or 1
    return chips if chips < host else chips // host * host


def _price(entry: FleetEntry, chip: Chip, catalogue: Catalogue) -> Value:
    name = "price per chip-hour"
    if entry.price_usd_per_chip_hour is not None:
        return given(name, entry.price_usd_per_chip_hour, "usd/h", "given for this fleet")
    known = [price for price in chip.prices if price.usd_per_chip_hour.known]
    if not known:
        return unknown(name, "usd/h", "no list price found")
    cheapest = min(known, key=lambda price: price.usd_per_chip_hour.value or 0.0)
    value = of_figure(name, cheapest.usd_per_chip_hour, "usd/h", catalogue)
    return replace(value, sources=(f"{cheapest.provider}, on-demand list price; {value.sources[0]}",))


def _power(entry: FleetEntry, chip: Chip, catalogue: Catalogue) -> Value:
    name = "server power per chip"
    if entry.watts_per_chip is not None:
        return given(name, entry.watts_per_chip, "W", "given for this fleet")
    if chip.server_power.known:
        return of_figure(name, chip.server_power, "W", catalogue)
    value = of_figure(name, chip.power, "W", catalogue)
    if value.known and not chip.power.estimated:
        # A chip's power is less than its share of the server's: an honest lower bound.
        return replace(value, bound=1, sources=(f"the chip alone; {value.sources[0]}",))
    return value


def _pue(entry: FleetEntry, chip: Chip, catalogue: Catalogue) -> Value:
    if entry.pue is not None:
        return given("PUE", entry.pue, "", "given for this fleet")
    which = "google_fleet_2024_2025" if is_tpu(chip) else "industry_average"
    figure = catalogue.raw["facility"]["pue"][which]
    source = f"{which.replace('_', ' ')}; {catalogue.sources.get(figure['source'], figure['source'])}"
    return given("PUE", figure["value"], "", source, estimated=True)


def _label(entry: FleetEntry, chip: Chip, used: int) -> str:
    label = f"{chip.key} x {used:,}"
    if entry.megawatts is not None:
        label += f" @ {entry.megawatts / 1000:g} GW" if entry.megawatts >= 1000 else f" @ {entry.megawatts:g} MW"
    return label if entry.budget_usd is None else f"{label} @ {write(entry.budget_usd, 'usd')}"
