#!/usr/bin/env bash
# model-signing 1.1.1: a model with symbolic links, signed with links allowed, cannot be verified as the documentation says.
# The signature records `allow_symlinks: true`, and the verifier takes its settings from there; but `hashing.Config.hash` puts
# its own False in the place of what `use_file_serialization(allow_symlinks=True)` was given. Models in the cache of Hugging
# Face are folders of links. It needs `set_allow_symlinks(True)` on both sides, whatever else was said.
# Seen: recorded true; verifying: "Cannot use ... because it is a symlink"; the argument of use_file_serialization: the same.
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
pathlib.Path("blob").write_bytes(bytes(10))
pathlib.Path("model").mkdir()
pathlib.Path("model", "weights").symlink_to(pathlib.Path("blob").resolve())


def refused(action):
    try:
        action()
    except ValueError as error:
        return "symlink" in str(error)
    return False


signer = signing.Config().use_elliptic_key_signer(private_key="ec.pem")
signer.set_hashing_config(hashing.Config().set_allow_symlinks(True)).sign("model", "model.sig")
payload = json.loads(base64.b64decode(json.loads(pathlib.Path("model.sig").read_text())["dsseEnvelope"]["payload"]))
recorded = payload["predicate"]["serialization"]["allow_symlinks"]


def verifier():
    return verifying.Config().use_elliptic_key_verifier(public_key="ec.pub.pem")


guessed = refused(lambda: verifier().verify("model", "model.sig"))
argument = refused(lambda: hashing.Config().use_file_serialization(allow_symlinks=True).hash("model"))
verifier().set_hashing_config(hashing.Config().set_allow_symlinks(True)).verify("model", "model.sig")
print(f"recorded in the signature: {recorded}; refused by its verifier: {guessed}, with the argument: {argument}")
assert (recorded, guessed, argument) == (True, True, True), "it has changed"
PY
"$work/venv/bin/python" check.py
