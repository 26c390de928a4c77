"""What became of every tensor and of every key of `config.json` at an import: for people, and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator.interop.hf_files import FileLayout


@dataclass(frozen=True)
class ImportReport:
    """The report of an import: every tensor and key of the source, and what became of it.

    Attributes:
        source: what was imported.
        format: of the source.
        family: the Hugging Face family; None: none.
        files: of the weights, as they lay there.
        tensors: name in the source -> dtype, shape and what became of it.
        taken: of those, the ones that are weights of the model.
        keys: of config.json -> value and what became of it.
        notes: what a user should know, most of all where something was not as it seemed.
        logits: how they compare with those of transformers.
        difference: largest difference of the logits; None where they were not compared.
    """

    source: str
    format: str
    family: str | None
    files: tuple[FileLayout, ...] = ()
    tensors: Mapping[str, tuple[str, tuple[int, ...], str]] = field(default_factory=dict)
    taken: tuple[str, ...] = ()
    keys: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    logits: str = ""
    difference: float | None = None

    def to_json(self) -> bytes:
        """Serialize to the content of `import.json`."""
        content = {
            "source": self.source,
            "format": self.format,
            "family": self.family,
            "logits": {"text": self.logits, "relative_difference": self.difference},
            "notes": list(self.notes),
            "tensors": [
                {"name": name, "dtype": dtype, "shape": list(shape), "fate": fate}
                for name, (dtype, shape, fate) in self.tensors.items()
            ],
            "config": [{"key": key, "value": _strict(value), "fate": fate} for key, (value, fate) in self.keys.items()],
            "files": [asdict(one) for one in self.files],
        }
        return json.dumps(content, indent=1).encode() + b"\n"

    def summary(self) -> list[str]:
        """Return a few lines: how many tensors were taken, and which were not, and why."""
        lines = [f"{len(self.taken)} tensors taken, {len(self.tensors) - len(self.taken)} not"]
        reasons = Counter(fate for name, (_, _, fate) in self.tensors.items() if name not in set(self.taken))
        for reason, count in reasons.items():
            names = [name for name, (_, _, fate) in self.tensors.items() if fate == reason]
            more = f" and {count - 3} more" if count > 3 else ""
            lines.append(f"  not taken: {', '.join(names[:3])}{more} ({reason})")
        lines += [f"note: {note}" for note in self.notes]
        return [*lines, f"logits: {self.logits}"]

    def table(self) -> list[str]:
        """Every tensor and every key, one a line."""
        rows = [(name, f"{dtype} {list(shape)}", fate) for name, (dtype, shape, fate) in self.tensors.items()]
        keys = [(key, _short(value), fate) for key, (value, fate) in self.keys.items()]
        return (
            [*_aligned("tensor", rows), "", *_aligned("key of config.json", keys)] if keys else _aligned("tensor", rows)
        )


def _strict(value: Any) -> Any:
    """Return a value that every reader of JSON takes: a number that is not finite becomes text."""
    return json.loads(json.dumps(value), parse_constant=str)


def _short(value: Any) -> str:
    text = ascii(json.dumps(value))[1:-1]
    return text if len(text) <= 40 else f"{text[:37]}..."


def _aligned(title: str, rows: list[tuple[str, str, str]]) -> list[str]:
    rows = [(title, "", "what became of it"), *((ascii(name)[1:-1], about, fate) for name, about, fate in rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [f"{first:<{widths[0]}}  {second:<{widths[1]}}  {third}" for first, second, third in rows]


def read_layouts(content: bytes) -> tuple[FileLayout, ...]:
    """Read the files that the weights came in from an `import.json`; none where it does not say.

    Args:
        content: of the file.
    """
    try:
        files = json.loads(content)["files"]
        return tuple(_layout(one) for one in files)
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()


def _layout(one: Any) -> FileLayout:
    return FileLayout(str(one["name"]), tuple(map(str, one["tensors"])), _texts(one["metadata"]))


def _texts(metadata: Any) -> dict[str, Any] | None:
    """Return the metadata as texts: safetensors allows nothing else."""
    if metadata is None:
        return None
    return {str(key): str(value) for key, value in dict(metadata).items()}
