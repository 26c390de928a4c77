"""Keys that sign and check checkpoints: Ed25519, or ECDSA on P-256, P-384 and P-521, as PEM files.

`cryptography` (the extra `signing`) is imported where a key is read or used.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError, MissingExtraError

ED25519, ECDSA = "ed25519", "ecdsa"
MAKE_ED25519 = "openssl genpkey -algorithm ed25519 -out key.pem"
MAKE_ECDSA = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out ec.pem"
MAKE_PUBLIC = "openssl pkey -in key.pem -pubout -out key.pub.pem"
_CURVES = {
    "secp256r1": ("SHA256", "ecdsa-sha2-nistp256"),
    "secp384r1": ("SHA384", "ecdsa-sha2-nistp384"),
    "secp521r1": ("SHA512", "ecdsa-sha2-nistp521"),
}
_NAMES = {ED25519: "an Ed25519", ECDSA: "an ECDSA (P-256, P-384, P-521)"}
_MAKE = {ED25519: MAKE_ED25519, ECDSA: MAKE_ECDSA}
_MAX_KEY_BYTES = 1 << 16


@dataclass(frozen=True)
class PublicKey:
    """A public key.

    Attributes:
        kind: `ed25519` or `ecdsa`.
        scheme: key, curve and hash by the names of in-toto: `ed25519`, `ecdsa-sha2-nistp256`.
        pem: SubjectPublicKeyInfo.
        raw: the 32 bytes of an Ed25519 key; empty for another.
    """

    kind: str
    scheme: str
    pem: bytes
    raw: bytes = b""

    @property
    def keyid(self) -> str:
        """Its name in an envelope, as `securesystemslib` and in-toto compute it: 64 hex digits."""
        public = self.raw.hex() if self.kind == ED25519 else self.pem.decode()
        # OLPC's canonical JSON: line breaks stand as they are.
        value = json.dumps(public).replace("\\n", "\n")
        text = f'{{"keytype":"{self.kind}","keyval":{{"public":{value}}},"scheme":"{self.scheme}"}}'
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def hint(self) -> str:
        """Its name in an OpenSSF model signature: SHA-256 of the PEM, in hex."""
        return hashlib.sha256(self.pem).hexdigest()

    def signed(self, signature: bytes, message: bytes) -> bool:
        """Return whether `signature` is one of `message` by this key.

        Args:
            signature: Ed25519: 64 bytes; ECDSA: DER.
            message: what was signed.

        Raises:
            MissingExtraError: `cryptography` is not installed.
        """
        crypto = cryptography("checking the signature of a checkpoint")
        key: Any = crypto.serialization.load_pem_public_key(self.pem)
        try:
            key.verify(signature, message, *_how(crypto, key))
        except (crypto.InvalidSignature, ValueError):
            return False
        return True


@dataclass(frozen=True)
class PrivateKey:
    """A private key.

    Attributes:
        public: its public half.
        file: that it was read from.
    """

    public: PublicKey
    file: Path
    _key: Any

    def sign(self, message: bytes) -> bytes:
        """Return the signature of `message`, as `PublicKey.signed` takes it."""
        signature: bytes = self._key.sign(message, *_how(cryptography("signing checkpoints"), self._key))
        return signature


def private_key(path: str, setting: str, kind: str) -> PrivateKey:
    """Read a private key.

    Args:
        path: of the PEM file.
        setting: that names it, for messages.
        kind: `ed25519` or `ecdsa`.

    Raises:
        ConfigError: the file is no such key, or has a password.
        MissingExtraError: `cryptography` is not installed.
    """
    crypto = cryptography("signing checkpoints")
    text = _read(path, setting, _MAKE[kind])
    try:
        key: Any = crypto.serialization.load_pem_private_key(text, password=None)
    except (ValueError, TypeError, crypto.UnsupportedAlgorithm) as error:
        raise _no_key(path, "private", setting, error, (kind,)) from None
    if _scheme(crypto, key)[0] != kind:
        raise _no_key(path, "private", setting, type(key).__name__, (kind,))
    return PrivateKey(_describe(crypto, key.public_key()), Path(path).expanduser(), key)


def public_key(path: str, setting: str) -> PublicKey:
    """Read a public key.

    Args:
        path: of the PEM file.
        setting: that names it, for messages.

    Raises:
        ConfigError: the file is no public key of a kind that is used here.
        MissingExtraError: `cryptography` is not installed.
    """
    crypto = cryptography("checking the signature of a checkpoint")
    text = _read(path, setting, MAKE_PUBLIC)
    try:
        key: Any = crypto.serialization.load_pem_public_key(text)
    except (ValueError, TypeError, crypto.UnsupportedAlgorithm) as error:
        raise _no_key(path, "public", setting, error, (ED25519, ECDSA)) from None
    if not _scheme(crypto, key)[0]:
        raise _no_key(path, "public", setting, type(key).__name__, (ED25519, ECDSA))
    return _describe(crypto, key)


def _describe(crypto: Cryptography, key: Any) -> PublicKey:
    form = crypto.serialization.PublicFormat.SubjectPublicKeyInfo
    pem = key.public_bytes(crypto.serialization.Encoding.PEM, form)
    kind, scheme = _scheme(crypto, key)
    return PublicKey(kind, scheme, pem, key.public_bytes_raw() if kind == ED25519 else b"")


def _scheme(crypto: Cryptography, key: Any) -> tuple[str, str]:
    """Kind and scheme of a key; empty where it is none of these."""
    if isinstance(key, (crypto.ed25519.Ed25519PrivateKey, crypto.ed25519.Ed25519PublicKey)):
        return ED25519, ED25519
    curve = getattr(getattr(key, "curve", None), "name", "")
    if curve in _CURVES and isinstance(key, (crypto.ec.EllipticCurvePrivateKey, crypto.ec.EllipticCurvePublicKey)):
        return ECDSA, _CURVES[curve][1]
    return "", ""


def _how(crypto: Cryptography, key: Any) -> tuple[Any, ...]:
    """Return what `sign` and `verify` of a key take beside the message."""
    if _scheme(crypto, key)[0] == ED25519:
        return ()
    return (crypto.ec.ECDSA(getattr(crypto.hashes, _CURVES[key.curve.name][0])()),)


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


def _no_key(path: str, half: str, setting: str, why: object, kinds: tuple[str, ...]) -> ConfigError:
    # Never the content: it may be a key of another kind.
    said = f"{path} ({why})" if isinstance(why, str) else path
    names = " or ".join(_NAMES[kind] for kind in kinds)
    return ConfigError(
        f"{setting} is no {half} key that can be used",
        got=said,
        allowed=f"{names} {half} key as PEM, without a password",
        fix=f"make one: {MAKE_PUBLIC if half == 'public' else _MAKE[kinds[0]]}",
    )


@dataclass(frozen=True)
class Cryptography:
    """The parts of `cryptography` that are used."""

    ed25519: Any
    ec: Any
    hashes: Any
    serialization: Any
    InvalidSignature: Any
    UnsupportedAlgorithm: Any


def cryptography(purpose: str) -> Cryptography:
    """Import the library.

    Args:
        purpose: what it is needed for, for the message.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    except ImportError:
        raise MissingExtraError("cryptography", "signing", purpose) from None
    return Cryptography(ed25519, ec, hashes, serialization, InvalidSignature, UnsupportedAlgorithm)
