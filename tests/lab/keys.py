"""Keys to sign with, made as the documentation says."""

from __future__ import annotations

import subprocess
from pathlib import Path


def make_key(folder: Path, name: str, kind: str = "ed25519", curve: str = "P-256") -> tuple[str, str]:
    """Paths of a private key and of its public half."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    how = ["-algorithm", "ed25519"]
    if kind == "ecdsa":
        how = ["-algorithm", "EC", "-pkeyopt", f"ec_paramgen_curve:{curve}"]
    subprocess.run(["openssl", "genpkey", *how, "-out", private], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return str(private), str(public)
