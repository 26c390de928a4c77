"""Ed25519 signatures of a checkpoint's manifest, which in turn has the hash of every file.

The message that is signed is the content of `manifest.json`, byte for byte. A signature that was damaged is noticed
without the library that checks it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.checkpoint.keys import ED25519, MAKE_ED25519, PublicKey, private_key, public_key
from orchestrator.errors import CheckpointError, ConfigError

FORMAT, VERSION, ALGORITHM = "orchestrator-signature", 1, ED25519
MAX_BYTES = 4096


@dataclass(frozen=True)
class Trust:
    """The keys whose checkpoints are accepted.

    Attributes:
        keys: those whose signature is believed. Of a manifest, which Ed25519 keys sign, a signature by another key is
            refused where there are any.
        required: refuse checkpoints without a signature too.
        files: that the keys were read from, in their order.
    """

    keys: tuple[PublicKey, ...] = ()
    required: bool = False
    files: tuple[str, ...] = ()

    def is_of(self, public_keys: Sequence[str], required: bool) -> bool:
        """Return whether `public_keys` and `required` are what it was built from, so that keys are not read again."""
        mine, other = (
            [os.path.abspath(os.path.expanduser(file)) for file in files] for files in (self.files, public_keys)
        )
        return mine == other and self.required == required

    def check(self, manifest: bytes, signature: bytes | None, where: object) -> None:
        """Verify the signature of a manifest.

        Args:
            manifest: bytes of `manifest.json`.
            signature: bytes of `manifest.sig`; None where there is none.
            where: the checkpoint, for messages.

        Raises:
            CheckpointError: the signature is damaged, of another manifest or with an untrusted key, or is missing.
            MissingExtraError: it cannot be checked without `cryptography`, and has to be.
        """
        if signature is None:
            if self.required:
                raise CheckpointError(
                    "the checkpoint is not signed",
                    got=where,
                    allowed="a signature by one of checkpoint.trusted_keys",
                    fix="take one that is, or set checkpoint.require_signature=false if you trust where it comes from",
                )
            return
        public, signed = _parse(signature, where)
        mine = [key for key in self.keys if key.kind == ED25519]
        if not mine and not self.required:
            return
        trusted = next((key for key in mine if key.raw == public), None)
        if trusted is None:
            raise CheckpointError(
                "the checkpoint is signed by a key that is not trusted",
                got=f"public key {public.hex()} in {where}",
                allowed=", ".join(key.raw.hex() for key in mine) or "none: checkpoint.trusted_keys has no Ed25519 key",
            )
        if not trusted.signed(signed, manifest):
            raise CheckpointError(
                "the signature of the checkpoint is not that of its manifest: one of them was changed", got=where
            )


def trust(public_keys: Sequence[str], required: bool) -> Trust:
    """Read the public keys (PEM files).

    Args:
        public_keys: paths of the files.
        required: whether a checkpoint whose manifest is not signed is refused.

    Raises:
        ConfigError: a file that is no public key, or none is of the kind that signs what is required.
        MissingExtraError: `cryptography` is not installed.
    """
    keys = tuple(_public(path) for path in public_keys)
    if required and keys and not any(key.kind == ED25519 for key in keys):
        raise ConfigError(
            "a signature is required, and none of the trusted keys is of the kind that signs manifests",
            got=f"checkpoint.trusted_keys={list(public_keys)}, {', '.join(key.scheme for key in keys)}",
            allowed="an Ed25519 public key among them",
            fix=f"sign with checkpoint.signing_key ({MAKE_ED25519}) and trust its public half",
        )
    return Trust(keys, required, tuple(public_keys))


def signer(private_key_file: str) -> Callable[[bytes], bytes]:
    """Read a private key (PEM file).

    Args:
        private_key_file: its path.

    Returns:
        The function from a manifest to the content of `manifest.sig`.

    Raises:
        ConfigError: the file is no Ed25519 private key, or has a password.
        MissingExtraError: `cryptography` is not installed.
    """
    key = private_key(private_key_file, "checkpoint.signing_key", ED25519)
    public = key.public.raw.hex()

    def sign(manifest: bytes) -> bytes:
        body = {
            "format": FORMAT,
            "version": VERSION,
            "algorithm": ALGORITHM,
            "public_key": public,
            "signature": key.sign(manifest).hex(),
        }
        return json.dumps({**body, "digest": _digest(body)}, separators=(",", ":")).encode()

    return sign


def signed_by(signature: bytes, where: object) -> bytes:
    """Return the public key of 32 bytes that a signature names. Whether it has signed is not looked at.

    Args:
        signature: bytes of `manifest.sig`.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: the signature is damaged.
    """
    return _parse(signature, where)[0]


def _parse(content: bytes, where: object) -> tuple[bytes, bytes]:
    """Public key and signature."""
    try:
        data = json.loads(content)
        body = {key: value for key, value in data.items() if key != "digest"}
        # Byte for byte what `sign` writes: nothing that flipped goes unnoticed.
        whole = json.dumps({**body, "digest": _digest(body)}, separators=(",", ":")).encode()
        if whole != content:
            raise ValueError("its digest does not match")
        if (body["format"], body["version"], body["algorithm"]) != (FORMAT, VERSION, ALGORITHM):
            raise ValueError("it is of another kind or version")
        return bytes.fromhex(body["public_key"]), bytes.fromhex(body["signature"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the signature of the checkpoint is damaged: {error}"[:300], got=where) from None


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _public(path: str) -> PublicKey:
    return public_key(path, "checkpoint.trusted_keys")
