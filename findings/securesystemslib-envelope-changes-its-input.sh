#!/usr/bin/env bash
# securesystemslib 1.6.0: reading a DSSE envelope changes the dictionary that it is read from, so a second reading finds no signature.
# `Envelope.from_dict` takes the signatures out of its argument. Who checks parsed JSON and stores it afterwards stores an
# envelope without signatures; who reads it twice, for two sets of keys, gets a KeyError. `Envelope.to_dict` gives it back.
# Seen: signatures before: keyid and sig; after the first reading, which verified: [{}]; second reading: KeyError.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check securesystemslib==1.6.0 cryptography==50.0.2
cd "$work"
cat >check.py <<'PY'
import copy

from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner

signer = CryptoSigner.generate_ed25519()
envelope = Envelope(b"{}", "application/vnd.in-toto+json", {})
envelope.sign(signer)
data = envelope.to_dict()
before = copy.deepcopy(data)
Envelope.from_dict(data).verify([signer.public_key], 1)
try:
    Envelope.from_dict(data)
    again = "an envelope"
except KeyError:
    again = "KeyError"
print("signatures before the first reading:", [sorted(one) for one in before["signatures"]])
print(f"after it, verified: {data['signatures']}; second reading: {again}")
assert (data["signatures"], again) == ([{}], "KeyError"), "it has changed"
PY
"$work/venv/bin/python" check.py
