"""In-toto statement of a checkpoint: what its files are, and what run they come from.

    provenance.intoto.jsonl   a DSSE envelope, in one line, around a Statement v1

The subjects are the manifest and every file that it lists, each with the SHA-256 of its whole content. The predicate
says in one place what lies in `state.json`, `history.json` and `handover.json`: legs, data, configuration, software,
handover checks. statement.schema.json describes it. No torch, and no library but `cryptography`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from orchestrator.checkpoint.dsse import IN_TOTO, Envelope, seal
from orchestrator.checkpoint.format import CONFIG, FORMAT, STATE, VERSION, parse_json, schema
from orchestrator.checkpoint.keys import PrivateKey
from orchestrator.checkpoint.reference import MEASURED
from orchestrator.errors import CheckpointError, shown

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:orchestrator:checkpoint-provenance:1"
MAX_STATEMENT_BYTES = 1 << 26
HISTORY = "history.json"
TELLS_OF = (STATE, HISTORY, MEASURED)
_HARDWARE = ("target", "device_names", "devices", "hosts", "engine", "layout", "precision")
_LEG = ("leg", "start_step", "end_step", "started", *_HARDWARE, "software")
_EXACT = 1 << 53  # whole numbers up to it are exact in every reader of JSON
_NAMED = 8
_NOT_PARSED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def make_statement(step: int, digests: Mapping[str, str], read: Callable[[str], bytes]) -> dict[str, Any]:
    """Return the statement of a checkpoint.

    Args:
        step: of the manifest.
        digests: SHA-256 of the manifest and of every file that it lists, in hex, by name.
        read: returns the content of one of its small files.

    Raises:
        CheckpointError: a file that it tells of cannot be read.
    """
    state, history, recorded = (_json(name, digests, read) for name in TELLS_OF)
    legs = [leg for leg in history.get("legs", []) if isinstance(leg, dict)]
    handover = {
        "recorded": recorded,
        "checks": [{"leg": leg.get("leg"), **leg["handover"]} for leg in legs if isinstance(leg.get("handover"), dict)],
    }
    predicate = {
        "checkpoint": {"format": FORMAT, "version": VERSION, "step": step, **_some(state, ("written",))},
        "configuration": {"name": CONFIG, "digest": {"sha256": digests[CONFIG]}},
        "data": state.get("data"),
        "hardware": _some(state, _HARDWARE),
        "software": state.get("software"),
        "legs": [_some(leg, _LEG) for leg in legs],
        "handover": {key: value for key, value in handover.items() if value},
    }
    subjects = [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(digests.items())]
    return {
        "_type": STATEMENT_TYPE,
        "subject": subjects,
        "predicateType": PREDICATE_TYPE,
        "predicate": _plain({key: value for key, value in predicate.items() if value}),
    }


def seal_statement(statement: Mapping[str, Any], keys: Sequence[PrivateKey]) -> bytes:
    """Return the content of `provenance.intoto.jsonl`.

    Args:
        statement: what `make_statement` returned.
        keys: that sign it.

    Raises:
        CheckpointError: it is larger than readers allow.
    """
    content = seal(_dump(statement), IN_TOTO, keys)
    if len(content) > MAX_STATEMENT_BYTES:
        what = "the statement of the checkpoint is too large"
        raise CheckpointError(what, got=f"{len(content)} bytes", allowed=f"{MAX_STATEMENT_BYTES} bytes")
    return content


def open_statement(envelope: Envelope) -> dict[str, Any] | None:
    """Parse the statement in an envelope; None where it is one of another kind. Who has signed it is not looked at.

    Args:
        envelope: the envelope.

    Raises:
        CheckpointError: it holds something else.
    """
    try:
        if envelope.payload_type != IN_TOTO:
            raise ValueError(f"its payload is {shown(envelope.payload_type)} instead of {IN_TOTO}")
        statement = parse_json(envelope.payload)
        if statement["predicateType"] != PREDICATE_TYPE:
            return None
        if (problem := next(schema("statement").iter_errors(statement), None)) is not None:
            raise ValueError(f"{'/'.join(map(str, problem.instance_path))}: {problem.message}")
        if len({one["name"] for one in statement["subject"]}) != len(statement["subject"]):
            raise ValueError("a subject is there twice")
    except _NOT_PARSED as error:
        raise CheckpointError(f"the statement is damaged: {shown(error)}") from None
    found: dict[str, Any] = statement
    return found


def other_files(said: Mapping[str, str], found: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each file that is not as a signature says.

    Args:
        said: SHA-256 of each signed file, by name.
        found: SHA-256 of each file that there is.
    """
    for names, text in (
        ([name for name in said if name not in found], "is signed and not in the checkpoint"),
        ([name for name in found if name not in said], "is in the checkpoint and not signed"),
        ([name for name in found if said.get(name, found[name]) != found[name]], "is not the file that was signed"),
    ):
        yield from (f"'{shown(name)}' {text}" for name in names[:_NAMED])
        if len(names) > _NAMED:
            yield f"{len(names) - _NAMED} more files: each {text}"


def untrue(said: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each entry of a predicate that is not what the checkpoint's own files say.

    Entries that only one of the two has are left out: another version of the product may tell of more.

    Args:
        said: the predicate that was signed.
        found: the predicate that `make_statement` makes of the files.
    """
    yield from _untrue("", said, found)


def _untrue(where: str, said: Any, found: Any) -> Iterator[str]:
    if isinstance(said, dict) and isinstance(found, dict):
        for key in said.keys() & found.keys():
            yield from _untrue(f"{where}/{key}" if where else key, said[key], found[key])
    elif isinstance(said, list) and isinstance(found, list) and len(said) == len(found):
        for number, (one, other) in enumerate(zip(said, found, strict=True)):
            yield from _untrue(f"{where}/{number}", one, other)
    elif said != found:
        yield f"it says {shown(said, 60)} for {shown(where)}, the checkpoint {shown(found, 60)}"


def _json(name: str, digests: Mapping[str, str], read: Callable[[str], bytes]) -> dict[str, Any]:
    """Return a small file as JSON; empty where the checkpoint has none."""
    if name not in digests:
        return {}
    try:
        data = parse_json(read(name))
    except _NOT_PARSED as error:
        raise CheckpointError(f"file '{name}' of the checkpoint is damaged: {shown(error)}") from None
    return data if isinstance(data, dict) else {}


def _some(facts: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: facts[key] for key in keys if key in facts}


def _plain(value: Any) -> Any:
    """As every reader of JSON takes it to be the same."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _EXACT:
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _dump(statement: Mapping[str, Any]) -> bytes:
    return json.dumps(statement, allow_nan=False, separators=(",", ":")).encode()
