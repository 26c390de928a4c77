"""Format what `checkpoint` found. Names come from untrusted files: control characters are escaped."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import CheckpointError, printable

if TYPE_CHECKING:
    from orchestrator.checkpoint.attestation import Examined
    from orchestrator.checkpoint.diff import Changed, TensorDifferences

PICKLE_HELP = "this format is pickle: allow it, for files whose maker you trust"
_MAX_CHANGED_ROWS, _MAX_NAMED = 40, 4
_OF_A_LEG = ("start_step", "end_step", "target", "devices", "layout", "precision")


def clean(text: object) -> str:
    """Return printable text: control characters, which could move the cursor or set colours, and tabs are escaped.

    Args:
        text: anything; `str` of it is used.
    """
    return printable(text).replace("\t", "\\t")


def strict_json(data: Any) -> str:
    """Serialize to JSON that every reader takes: numbers that are not finite become text.

    Args:
        data: plain data.
    """
    return json.dumps(_finite(data), indent=2)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def size_text(count: int) -> str:
    """Format a number of bytes: `1.2 GB`.

    Args:
        count: bytes.
    """
    size, unit = float(count), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{count:,} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def inspect_rows(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that show what `checkpoint.summary.facts` found.

    Args:
        facts: as `checkpoint.summary.facts` gives them.
    """
    rows: list[tuple[str, object]] = [
        ("checkpoint", facts["path"]),
        ("step", f"{facts['step']:,}"),
        ("format", f"version {facts['format_version']}, {_signed(facts)}"),
        ("model", facts["model"] or "unknown"),
        ("parameters", f"{facts['parameters']:,}"),
        *([("adapters of", facts["adapters_beside"])] if facts["adapters_beside"] else []),
        ("tensors", f"{facts['tensors']:,}, {size_text(facts['tensor_bytes'])}"),
        ("on disk", f"{facts['files']} files, {size_text(facts['bytes_on_disk'])}"),
        ("tokenizer", "in it" if facts["tokenizer"] else "none"),
    ]
    rows += [(str(key).replace("_", " "), _plain(value)) for key, value in facts["provenance"].items()]
    rows += [("data", _plain(facts["data"]) if facts["data"] else "no position: weights alone")]
    optimizer = facts["optimizer"]
    if optimizer["state"]:
        rows += [("optimizer", f"{optimizer['name'] or 'unknown'}: {', '.join(optimizer['state'])}")]
    rows += [("schedule", _plain(facts["schedule"]))] if facts["schedule"] else []
    for number, leg in enumerate(facts["legs"]):
        rows.append((f"leg {number}", _plain({key: leg[key] for key in _OF_A_LEG if key in leg})))
    yield from _aligned([(name, clean(value)) for name, value in rows])
    yield ""
    header = ("tensors below", "count", "elements", "bytes", "dtype")
    groups = [
        (one["name"], f"{one['tensors']:,}", f"{one['elements']:,}", size_text(one["bytes"]), ", ".join(one["dtypes"]))
        for one in facts["groups"]
    ]
    yield from _table(header, groups)
    if "tensor_list" in facts:
        yield ""
        yield from _tensor_rows(facts["tensor_list"])


def _signed(facts: Mapping[str, Any]) -> str:
    """Name the signatures that are there; whether they are right, `checkpoint verify` tells."""
    kinds = {
        "signed": "manifest signed",
        "statement": "in-toto statement",
        "model_signature": "OpenSSF model signature",
    }
    return ", ".join(text for key, text in kinds.items() if facts[key]) or "not signed"


def _tensor_rows(tensors: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    rows = []
    for tensor in tensors:
        files = sorted({shard["file"] for shard in tensor["shards"]})
        where = files[0] if len(files) == 1 else f"{len(files)} files"
        shape = " x ".join(map(str, tensor["shape"])) or "scalar"
        rows.append((tensor["name"], tensor["dtype"], shape, f"{len(tensor['shards'])}", where))
    yield from _table(("tensor", "dtype", "shape", "shards", "in"), rows)


def signature_rows(found: Sequence[Examined]) -> Iterator[str]:
    """Yield a line for each signature of a checkpoint.

    Args:
        found: as `checkpoint.attestation.examine` gives them.
    """
    if not found:
        yield "not signed"
    yield from _aligned([(one.name, clean(one.text)) for one in found])


def difference_rows(found: TensorDifferences) -> Iterator[str]:
    """Yield the lines that show what `checkpoint.diff.compare` found.

    Args:
        found: the differences.
    """
    for title, names in (("only in a", found.only_first), ("only in b", found.only_second)):
        yield from (f"{title}  {clean(name)}" for name in names[:_MAX_CHANGED_ROWS])
        if len(names) > _MAX_CHANGED_ROWS:
            yield f"{title}  … {len(names) - _MAX_CHANGED_ROWS:,} more"
    for one in found.mismatched[:_MAX_CHANGED_ROWS]:
        yield f"differs    {clean(one.name)}: {one.first} in a, {one.second} in b"
    if found.changed:
        largest = sorted(found.changed, key=_size_of_change, reverse=True)[:_MAX_CHANGED_ROWS]
        rows = [
            (
                one.name,
                f"{one.differing:,} of {one.elements:,}",
                f"{one.max_abs:.3g}",
                "-" if one.relative_l2 is None else f"{one.relative_l2:.3g}",
            )
            for one in largest
        ]
        yield from _table(("tensor", "elements that differ", "max abs", "relative L2"), rows)
        if len(found.changed) > len(largest):
            yield f"… and {len(found.changed) - len(largest):,} more that differ less (json=true lists all)"
    for side, bad in (("a", found.nonfinite_first), ("b", found.nonfinite_second)):
        if bad:
            more = f" and {len(bad) - _MAX_NAMED} more" if len(bad) > _MAX_NAMED else ""
            yield f"warning: {side} holds NaN or infinity in {clean(', '.join(bad[:_MAX_NAMED]))}{more}"
    if found.equal:
        yield f"bitwise equal: all {found.compared:,} tensors"
        return
    yield f"\ndifferent: {found.same:,} of {found.compared:,} tensors that both have are bitwise equal"


def _size_of_change(one: Changed) -> float:
    relative = one.relative_l2 or 0.0
    return math.inf if math.isnan(relative) else relative


def _aligned(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    width = max((len(name) for name, _ in rows), default=0)
    yield from (f"{name:<{width}}  {text}" for name, text in rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns of text; those of numbers lie right."""
    cells = [list(header), *([clean(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    right = [all(row[column][:1].isdigit() for row in cells[1:]) for column in range(len(header))]
    for row in cells:
        padded = [
            cell.rjust(width) if at_right else cell.ljust(width)
            for cell, width, at_right in zip(row, widths, right, strict=True)
        ]
        yield "  ".join(padded).rstrip()


def _plain(value: Any) -> str:
    """Return a value of JSON in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) if len(value) <= 8 else f"{len(value)} entries"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def allow_pickle(allowed: bool, what: str, note: str) -> None:
    """Warn of a format that can carry code.

    Args:
        allowed: whether the user has allowed it.
        what: the format.
        note: the warning.

    Raises:
        CheckpointError: the user has not allowed it.
    """
    if not allowed:
        raise CheckpointError(
            f"{what} is pickle, a format that can carry code",
            fix="prefer format=hf; or add allow_pickle=true where you trust the maker of the file",
        )
    print(f"WARNING: {what} is pickle, a format that can carry code; {note}", file=sys.stderr)


def how_to_load_adapters(output: str) -> list[str]:
    """Return lines that say how PEFT loads exported adapters.

    Args:
        output: the directory.
    """
    from orchestrator.checkpoint.format import MANIFEST
    from orchestrator.interop.hf_files import ADAPTER_CONFIG

    base = str(json.loads((Path(output) / ADAPTER_CONFIG).read_text())["base_model_name_or_path"])
    lines, place = ["", "Load them:"], base
    if (Path(base) / MANIFEST).exists():
        place = "exported/base"
        export = f"python -m orchestrator checkpoint export {shlex.quote(base)} output={place}"
        lines = ["", "Load them, with their model in the format of transformers:", f"  {export}"]
    model = f"transformers.AutoModelForCausalLM.from_pretrained({place!r})"
    return [*lines, f"  peft.PeftModel.from_pretrained({model}, {output!r})"]
