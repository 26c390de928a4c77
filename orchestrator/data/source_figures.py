"""What a run has taken of each source, exactly: the order of the data is a function, so nothing has to be counted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.data.stream import StepLoader

_PLAIN = re.compile(r"[A-Za-z0-9._-]+")
_GLOB = re.compile(r"[*?\[]")


def labels_of(names: Sequence[str]) -> tuple[str, ...]:
    """Return names that are short, and unlike each other, for what users call by names or paths.

    `web` stays; `/data/web.jsonl` and `/data/web/*.parquet` become `web`, and the second one of them `web-2`.

    Args:
        names: names and paths.
    """
    found: list[str] = []
    taken = {name for name in names if _PLAIN.fullmatch(name)}
    for name in names:
        if _PLAIN.fullmatch(name) and name not in found:
            found.append(name)
            continue
        parts = [part for part in name.split("/") if part and not _GLOB.search(part)]
        short = re.sub(r"[^A-Za-z0-9._-]+", "_", parts[-1].split(".")[0] or parts[-1]) if parts else "data"
        number, label = 1, short
        while label in taken:
            number += 1
            label = f"{short}-{number}"
        taken.add(label)
        found.append(label)
    return tuple(found)


@dataclass(frozen=True)
class SourceFigures:
    """What a run has taken of one source.

    Attributes:
        name: in metrics.
        source: as the user names it.
        sequences: that were trained on.
        tokens: of these sequences.
        epoch_sequences: that the source has.
        epochs: how often it was gone through.
    """

    name: str
    source: str
    sequences: int
    tokens: int
    epoch_sequences: int
    epochs: float


class SourceBook:
    """Tokens and epochs of each source of a run, at any step.

    Args:
        loader: of the run.
        names: of the sources, as users call them.
    """

    def __init__(self, loader: StepLoader, names: Sequence[str]):
        self._loader, self._names, self.labels = loader, names, labels_of(names)

    def at(self, step: int) -> list[SourceFigures]:
        """Return what was taken after `step` optimizer steps, of the data that the run has now.

        Args:
            step: optimizer steps completed.
        """
        windows, length = self._loader.stream.windows, self._loader.stream.seq_len
        rows = zip(self.labels, self._names, self._loader.taken(step), windows, strict=True)
        return [SourceFigures(name, source, n, n * length, all_, n / all_) for name, source, n, all_ in rows]

    def row(self, step: int) -> dict[str, float]:
        """Return the figures for a row of metrics: `epochs`, or with several sources `tokens/NAME` and `epochs/NAME`.

        Args:
            step: optimizer steps completed.
        """
        figures = self.at(step)
        if len(figures) == 1:
            return {"epochs": figures[0].epochs}
        tokens: dict[str, float] = {f"tokens/{one.name}": one.tokens for one in figures}
        return tokens | {f"epochs/{one.name}": one.epochs for one in figures}

    def record(self, step: int) -> list[dict[str, Any]]:
        """Return the figures for `run.json`.

        Args:
            step: optimizer steps completed.
        """
        return [asdict(one) for one in self.at(step)]
