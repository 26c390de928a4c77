#!/usr/bin/env bash
# model-signing 1.1.1: a model signed in shards, as its documentation advises for large ones, cannot be verified by its signature.
# The shard size is recorded through a protobuf Struct, which has no integers: 1000 becomes 1000.0, with which `range` fails
# when the verifier takes its settings from the signature. It verifies only where the caller knows the size and gives it again.
# Seen: recorded 1000.0; verify: TypeError: 'float' object cannot be interpreted as an integer; with the size given: verified.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check model-signing==1.1.1 pyopenssl==26.4.0
cd "$work"
cat >check.py <<'PY'
import base64
import json
import pathlib

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from model_signing import hashing, signing, verifying

key = ec.generate_private_key(ec.SECP256R1())
pem = serialization.Encoding.PEM
pathlib.Path("ec.pem").write_bytes(
    key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
)
pathlib.Path("ec.pub.pem").write_bytes(
    key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
)
pathlib.Path("model").mkdir()
pathlib.Path("model", "weights").write_bytes(bytes(3000))
config = hashing.Config().use_shard_serialization(shard_size=1000)
signer = signing.Config().use_elliptic_key_signer(private_key="ec.pem").set_hashing_config(config)
signer.sign("model", "model.sig")


def verifier():
    return verifying.Config().use_elliptic_key_verifier(public_key="ec.pub.pem")


try:
    verifier().verify("model", "model.sig")
    guessed = "verified"
except TypeError as error:
    guessed = f"TypeError: {error}"
payload = json.loads(base64.b64decode(json.loads(pathlib.Path("model.sig").read_text())["dsseEnvelope"]["payload"]))
config = hashing.Config().use_shard_serialization(shard_size=1000)
verifier().set_hashing_config(config).verify("model", "model.sig")
print("shard size: asked 1000, recorded", payload["predicate"]["serialization"]["shard_size"])
print(f"by what the signature records: {guessed}; where the size is given again: verified")
assert guessed.startswith("TypeError"), "it has changed"
PY
"$work/venv/bin/python" check.py
