"""Make a strict JSON schema of a CustomResourceDefinition, as orchestrator/engines/schemas keeps them.

    scripts/crd_schema.py CRD.yaml VERSION "github.com/OWNER/NAME COMMIT" > orchestrator/engines/schemas/KIND.json

Strict: an object takes no key that the definition does not name, where the API server would drop it in silence.
Descriptions, defaults and the status, which controllers write, are left out.
"""

import json
import sys
from typing import Any

import yaml

# What an API server checks of `metadata` by itself; the definition says only that it is an object.
_LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "generateName": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": _LABELS,
        "annotations": _LABELS,
        "finalizers": {"type": "array", "items": {"type": "string"}},
    },
    "additionalProperties": False,
}
_KEPT = ("type", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "required",
         "minProperties", "maxProperties", "format", "uniqueItems")  # fmt: skip
_FORMATS = ("date-time", "duration")  # int32 and the like are no formats of JSON schema
_LIMITS = {"int32": (-(1 << 31), (1 << 31) - 1), "int64": (-(1 << 63), (1 << 63) - 1)}


def strict(node: dict[str, Any]) -> dict[str, Any]:
    """Return the strict schema of a node of an `openAPIV3Schema`."""
    if node.get("x-kubernetes-int-or-string"):
        found: dict[str, Any] = {"type": ["integer", "string"]}
        return {**found, **({"pattern": node["pattern"]} if "pattern" in node else {})}
    found = {key: node[key] for key in _KEPT if key in node}
    if found.get("format") in _LIMITS:
        least, largest = _LIMITS[found["format"]]
        found = {"minimum": least, "maximum": largest, **found}
    if found.get("format") not in (None, *_FORMATS):
        del found["format"]
    for key in ("allOf", "anyOf", "oneOf"):
        if key in node:
            found[key] = [strict(part) for part in node[key]]
    if "items" in node:
        found["items"] = strict(node["items"])
    if node.get("x-kubernetes-embedded-resource") or node.get("x-kubernetes-preserve-unknown-fields"):
        return found
    if "properties" in node:
        found["properties"] = {key: strict(part) for key, part in node["properties"].items()}
        found["additionalProperties"] = False
    elif isinstance(node.get("additionalProperties"), dict):
        found["additionalProperties"] = strict(node["additionalProperties"])
    return found


def shared(schema: dict[str, Any]) -> dict[str, Any]:
    """Keep what stands in several places once, in `$defs`: a pod has three lists of containers."""
    counts: dict[str, int] = {}

    def count(node: Any) -> None:
        if isinstance(node, dict):
            if "properties" in node:
                text = json.dumps(node, sort_keys=True)
                counts[text] = counts.get(text, 0) + 1
                if counts[text] > 1:
                    return
            for part in node.values():
                count(part)
        elif isinstance(node, list):
            for part in node:
                count(part)

    count(schema)
    texts = [text for text, times in counts.items() if times > 1 and len(text) > 200]
    names = {text: f"d{index}" for index, text in enumerate(texts)}

    def replaced(node: Any, top: bool = False) -> Any:
        if isinstance(node, dict):
            if not top and "properties" in node and (name := names.get(json.dumps(node, sort_keys=True))):
                return {"$ref": f"#/$defs/{name}"}
            return {key: replaced(part) for key, part in node.items()}
        return [replaced(part) for part in node] if isinstance(node, list) else node

    return {**replaced(schema, True), "$defs": {name: replaced(json.loads(text), True) for text, name in names.items()}}


def main(path: str, version: str, source: str) -> None:
    """Print the schema of one version of the definition in `path`."""
    with open(path) as file:
        crd = next(document for document in yaml.safe_load_all(file) if document)
    spec = crd["spec"]
    (served,) = [entry for entry in spec["versions"] if entry["name"] == version]
    schema = strict(served["schema"]["openAPIV3Schema"])
    kind, group = spec["names"]["kind"], spec["group"]
    properties = schema["properties"]
    properties.pop("status", None)
    properties["apiVersion"] = {"const": f"{group}/{version}"}
    properties["kind"] = {"const": kind}
    properties["metadata"] = _METADATA
    schema["required"] = sorted({*schema.get("required", []), "apiVersion", "kind", "metadata", "spec"})
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$comment": f"From {source}, Apache-2.0."}
    print(json.dumps({**head, **shared(schema)}, separators=(",", ":"), sort_keys=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
