"""Compare runs: what each reached, and which keys of their configurations differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import printable
from orchestrator.report.run_data import RunData, headline, read_run_data
from orchestrator.report.run_text import aligned, duration, fixed, flatten, short, value, whole

_OF_A_START = ("resume", "resume_allow", "run_id")  # keys that say how a run was started, and not what it is
UNKNOWN, ABSENT = "unknown", "-"


@dataclass(frozen=True)
class Compared:
    """One of several compared runs.

    Attributes:
        label: a short name, another one for each run.
        data: what its files say.
        config: its configuration, dotted key to value.
    """

    label: str
    data: RunData
    config: Mapping[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        """Headline figures as `run_data.headline`, with `best_loss` and `best_val_loss`."""
        losses = [value for _, value in self.data.series("loss")]
        held_out = [value for _, value in self.data.series("val_loss", self.data.evals)]
        best = {"best_loss": min(losses, default=None), "best_val_loss": min(held_out, default=None)}
        return {"run": self.label, **headline(self.data), **best}


def read_compared(directories: Sequence[Path], configs: Sequence[Mapping[str, Any]]) -> list[Compared]:
    """Read runs.

    Args:
        directories: of the runs.
        configs: their configurations as plain data, in the same order; empty where one is not known.
    """
    runs = []
    for label, directory, config in zip(_labels(directories), directories, configs, strict=True):
        runs.append(Compared(label, read_run_data(directory), flatten(config)))
    return runs


def differences(runs: Sequence[Compared]) -> dict[str, list[str]]:
    """Return the keys whose values are not the same in all runs, with the value of each run as text.

    Args:
        runs: as `read_compared` gives them.
    """
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in _OF_A_START)
    found = {key: [_written(run.config[key]) if key in run.config else ABSENT for run in runs] for key in keys}
    return {key: texts for key, texts in found.items() if len(set(texts)) > 1}


COLUMNS = ("run", "status", "steps", "loss", "best", "val loss", "best val", "tokens", "tokens/s", "time", "goodput")


def rows(runs: Sequence[Compared]) -> list[list[str]]:
    """Return a row of `COLUMNS` for each run.

    Losses are in nats per token; tokens per second are a median of the last leg; time is without that between legs.

    Args:
        runs: as `read_compared` gives them.
    """
    found = []
    for run in runs:
        facts = run.facts
        numbers = [fixed(facts[key]) for key in ("loss", "best_loss", "val_loss", "best_val_loss")]
        spent = [short(facts["tokens"]), whole(facts["tokens_per_second"]), duration(facts["seconds"])]
        spent.append(None if facts["goodput"] is None else f"{facts['goodput']:.1%}")
        steps = None if facts["step"] is None else f"{facts['step']:,}"
        found.append([run.label, str(facts["status"]), *(text or UNKNOWN for text in (steps, *numbers, *spent))])
    return found


def compare_text(runs: Sequence[Compared]) -> str:
    """Return both tables for a terminal.

    Args:
        runs: as `read_compared` gives them.
    """
    changed = differences(runs)
    parts = [aligned([list(COLUMNS), *rows(runs)])]
    if changed:
        parts.append(aligned([["configuration", *(run.label for run in runs)], *([k, *v] for k, v in changed.items())]))
    else:
        parts.append("their configurations are the same")
    return printable("\n\n".join(parts))


def _labels(directories: Sequence[Path]) -> list[str]:
    """Return the last parts of the paths: as few as tell the runs apart, the name and the time at least."""
    parts = [directory.resolve().parts for directory in directories]
    for count in range(2, max(map(len, parts), default=2) + 1):
        labels = ["/".join(path[-count:]) for path in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{number}: {'/'.join(path[-2:])}" for number, path in enumerate(parts)]  # one run, named twice


def _written(item: Any) -> str:
    return repr(item) if isinstance(item, float) else "null" if item is None else value(item)
