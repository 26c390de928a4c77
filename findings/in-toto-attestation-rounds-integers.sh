#!/usr/bin/env bash
# in-toto-attestation 0.9.3: whole numbers in a predicate become floating point, and beyond 2^53 other numbers, without a word.
# A predicate is a protobuf Struct, which has no integers: seeds, sums and counts of 64 bits that a statement attests are
# rounded before they are signed, and also where a statement is read that somebody else signed with the right number in it.
# Seen: 9007199254740993 is attested as 9007199254740992, and a seed of 2**63 - 1 as 2**63; `validate` passes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check in-toto-attestation==0.9.3 protobuf==7.36.2
cd "$work"
cat >check.py <<'PY'
import json

from google.protobuf import json_format
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement

said = {"tokens": 2**53 + 1, "seed": 2**63 - 1}
subject = ResourceDescriptor(name="model", digest={"sha256": "00" * 32}).pb
written = Statement([subject], "https://example.com/training", said)
written.validate()
attested = json.loads(json_format.MessageToJson(written.pb))["predicate"]
text = json.dumps({"predicateType": "https://example.com/training", "predicate": said})
read = json_format.Parse(text, statement_pb2.Statement()).predicate
print("said    ", said)
print("attested", {name: int(value) for name, value in attested.items()})
print("read    ", {name: int(read[name]) for name in said})
rounded = {"tokens": 2**53, "seed": 2**63}
assert attested == rounded and {name: read[name] for name in said} == rounded, "it has changed"
PY
"$work/venv/bin/python" check.py
