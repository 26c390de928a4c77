#!/usr/bin/env bash
# model-signing 1.1.1: `model_signing verify` always hashes whole files with SHA-256, whatever the signature says of its hashes.
# A model signed through the library with BLAKE3, which is meant for large models, verifies through the library, which reads
# the method from the signature. The command line calls the same model changed: "Hash mismatch".
# Seen: sha256: verified by both; blake3: verified by the library, Signature mismatch by the command line.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check model-signing==1.1.1 pyopenssl==26.4.0
cd "$work"
cat >check.py <<'PY'
import pathlib
import subprocess
import sys

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
ways = {
    "sha256": hashing.Config(),
    "blake3": hashing.Config().use_file_serialization(hashing_algorithm="blake3"),
}
found = {}
for name, config in ways.items():
    signer = signing.Config().use_elliptic_key_signer(private_key="ec.pem").set_hashing_config(config)
    signer.sign("model", f"{name}.sig")
    verifying.Config().use_elliptic_key_verifier(public_key="ec.pub.pem").verify("model", f"{name}.sig")
    words = ["verify", "key", "model", "--signature", f"{name}.sig", "--public_key", "ec.pub.pem"]
    done = subprocess.run([sys.executable, "-m", "model_signing", *words], capture_output=True, text=True)
    found[name] = done.returncode == 0
    print(f"{name}: library: verified; command line: {(done.stdout + done.stderr).strip()[:130]}")
assert found == {"sha256": True, "blake3": False}, "it has changed"
PY
"$work/venv/bin/python" check.py
