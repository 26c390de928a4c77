"""The strict schemas of what is sent to Kubernetes, as `schemas/` keeps them: scripts/crd_schema.py makes them.

The schema of a JobSet holds those of the Job and of the pod in it. A key that a definition does not name is an error
here, where an API server may drop it in silence.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jsonschema_rs

from orchestrator.errors import LaunchError, UserError, shown

_SHOWN = 20


def known_kinds() -> list[str]:
    """Return the kinds whose schema is here."""
    folder = resources.files("orchestrator.engines").joinpath("schemas")
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


@functools.cache
def _validator(kind: str) -> Any:
    path = resources.files("orchestrator.engines").joinpath("schemas", f"{kind}.json")
    return jsonschema_rs.validator_for(json.loads(path.read_text()))


def schema_problems(document: Mapping[str, Any]) -> list[UserError]:
    """List what the schema of its kind finds wrong in a document.

    Args:
        document: parsed.
    """
    kind = document.get("kind")
    if kind not in known_kinds():
        what, got = "there is no schema here for an object of this kind", f"kind: {shown(kind)}"
        fix = "create it by kubectl yourself, beside the job"
        return [LaunchError(what, got=got, allowed=", ".join(known_kinds()), fix=fix)]
    found: list[UserError] = []
    for error in _validator(str(kind)).iter_errors(document):
        place = ".".join(str(part) for part in error.instance_path) or "the document"
        found.append(LaunchError(f"{kind}: {place}: {shown(error.message, 300)}"))
        if len(found) == _SHOWN:
            break
    return found
