"""Ed25519 signatures of a checkpoint's manifest, which in turn has the hash of every file.

The message that is signed is the content of `manifest.json`, byte for byte. `cryptography` (the extra `signing`) is
imported where a key is used; a signature that was damaged is noticed without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointError, ConfigError, MissingExtraError

FORMAT, VERSION, ALGORITHM = "orchestrator-signature", 1, "ed25519"
MAX_BYTES = 4096
_MAX_KEY_BYTES = 1 << 16
_MAKE_KEY = "openssl genpkey -algorithm ed25519 -out key.pem"
_MAKE_PUBLIC = "openssl pkey -in key.pem -pubout -out key.pub.pem"


@dataclass(frozen=True)
class Trust:
    """The keys whose checkpoints are accepted.

    Attributes:
        keys: raw public keys, of 32 bytes each; where there are any, a signature by another key is refused.
        required: refuse checkpoints without a signature too.
        files: that the keys were read from.
    """

    keys: tuple[bytes, ...] = ()
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
        if not self.keys and not self.required:
            return
        if public not in self.keys:
            raise CheckpointError(
                "the checkpoint is signed by a key that is not trusted",
                got=f"public key {public.hex()} in {where}",
                allowed=", ".join(key.hex() for key in self.keys) or "none is: checkpoint.trusted_keys is empty",
            )
        crypto = _cryptography("checking the signature of a checkpoint")
        try:
            crypto.ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signed, manifest)
        except (crypto.InvalidSignature, ValueError):
            raise CheckpointError(
                "the signature of the checkpoint is not that of its manifest: one of them was changed", got=where
            ) from None


def trust(public_keys: Sequence[str], required: bool) -> Trust:
    """Read the public keys (PEM files).

    Args:
        public_keys: paths of the files.
        required: whether a checkpoint without a signature is refused.

    Raises:
        ConfigError: a file that is no Ed25519 public key.
        MissingExtraError: `cryptography` is not installed.
    """
    return Trust(tuple(_public(path) for path in public_keys), required, tuple(public_keys))


def signer(private_key: str) -> Callable[[bytes], bytes]:
    """Read a private key (PEM file).

    Args:
        private_key: path of the file.

    Returns:
        The function from a manifest to the content of `manifest.sig`.

    Raises:
        ConfigError: the file is no Ed25519 private key, or has a password.
        MissingExtraError: `cryptography` is not installed.
    """
    crypto = _cryptography("signing checkpoints")
    text = _read(private_key, "checkpoint.signing_key", _MAKE_KEY)
    try:
        key: Any = crypto.serialization.load_pem_private_key(text, password=None)
    except (ValueError, TypeError, crypto.UnsupportedAlgorithm) as error:
        raise _no_key(private_key, "private", "checkpoint.signing_key", error, _MAKE_KEY) from None
    if not isinstance(key, crypto.ed25519.Ed25519PrivateKey):
        raise _no_key(private_key, "private", "checkpoint.signing_key", type(key).__name__, _MAKE_KEY)
    public = key.public_key().public_bytes_raw().hex()

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


def _public(path: str) -> bytes:
    crypto = _cryptography("checking the signature of a checkpoint")
    text = _read(path, "checkpoint.trusted_keys", _MAKE_PUBLIC)
    try:
        key: Any = crypto.serialization.load_pem_public_key(text)
    except (ValueError, TypeError, crypto.UnsupportedAlgorithm) as error:
        raise _no_key(path, "public", "checkpoint.trusted_keys", error, _MAKE_PUBLIC) from None
    if not isinstance(key, crypto.ed25519.Ed25519PublicKey):
        raise _no_key(path, "public", "checkpoint.trusted_keys", type(key).__name__, _MAKE_PUBLIC)
    raw: bytes = key.public_bytes_raw()
    return raw


def _read(path: str, setting: str, make: str) -> bytes:
    try:
        # A device would be read, and a pipe waited for, without end. A link may be: keys are often mounted so.
        handle = os.open(Path(path).expanduser(), os.O_RDONLY | os.O_NONBLOCK)
        with open(handle, "rb") as file:
            content = file.read(_MAX_KEY_BYTES + 1) if stat.S_ISREG(os.fstat(handle).st_mode) else None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        fix = f"make one: {make}"
        raise ConfigError(f"the key of {setting} cannot be read: {reason}", got=path, fix=fix) from None
    if content is None or len(content) > _MAX_KEY_BYTES:
        allowed = f"a plain file of at most {_MAX_KEY_BYTES} bytes"
        raise ConfigError(f"{setting} is no key", got=path, allowed=allowed, fix=f"make one: {make}")
    return content


def _no_key(path: str, kind: str, setting: str, why: object, make: str) -> ConfigError:
    # Never the content: it may be a key of another kind.
    said = f"{path} ({why})" if isinstance(why, str) else path
    return ConfigError(
        f"{setting} is no {kind} key that can be used",
        got=said,
        allowed=f"an Ed25519 {kind} key as PEM, without a password",
        fix=f"make one: {make}",
    )


@dataclass(frozen=True)
class _Cryptography:
    ed25519: Any
    serialization: Any
    InvalidSignature: Any
    UnsupportedAlgorithm: Any


def _cryptography(purpose: str) -> _Cryptography:
    try:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise MissingExtraError("cryptography", "signing", purpose) from None
    return _Cryptography(ed25519, serialization, InvalidSignature, UnsupportedAlgorithm)
