"""The catalogue of accelerators, by key, with the table of sources.

Figures come from `chips.yaml`, where each has a source; what is not published is `unknown` (a `Figure` whose
value is None), never a guess. A user's own YAML adds chips or overrides single figures. Everything here is in
SI units per chip as sold: FLOP/s, bytes, bytes/s, watts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.chips.chip import Chip, Figure
from orchestrator.errors import ConfigError


@dataclass(frozen=True)
class Catalogue:
    """Chips by key, with the table of sources. `raw` keeps the file's other sections (facility, collectives)."""

    chips: Mapping[str, Chip]
    sources: Mapping[str, str]
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def get(self, key: str) -> Chip:
        """Return the chip of that key.

        Args:
            key: such as `h100_sxm`.

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
        """Return the key of the chip that a driver calls `name`; None unless it is surely that one.

        PCIe, NVL and partitioned parts share a family's name and not its figures, so only whole names match.
        """
        wanted = " ".join(name.split()).casefold()
        for chip in self:
            if any(wanted == known.casefold() for known in chip.device_names):
                return chip.key
        return None

    def cite(self, figure: Figure) -> str:
        """Return the figure's source in full; `unknown` where there is no figure.

        Args:
            figure: of a chip.
        """
        if figure.source is None:
            return "unknown"
        return self.sources.get(figure.source, figure.source)
