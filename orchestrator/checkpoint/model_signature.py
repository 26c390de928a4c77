"""Signatures in the format of OpenSSF Model Signing, by its own library (`model-signing`, the extra `model-signing`).

    model.sig   a Sigstore bundle: a list of files with the SHA-256 of each, signed by an ECDSA key

`model_signing verify key CHECKPOINT --signature CHECKPOINT/model.sig --public_key ec.pub.pem` checks it without this
product. The library makes and checks the signature; the files are hashed here, where they are written or read anyway,
also in a store. It takes no Ed25519 keys.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.dsse import decode
from orchestrator.checkpoint.format import MODEL_SIGNATURE, SIGNATURES, parse_json
from orchestrator.checkpoint.keys import ECDSA, PrivateKey, PublicKey
from orchestrator.errors import CheckpointError, MissingExtraError, shown

MAX_MODEL_SIGNATURE_BYTES = 1 << 26
_METHOD = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
_NOT_PARSED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


class ModelSigner:
    """Signs lists of files.

    Args:
        key: an ECDSA key.

    Raises:
        MissingExtraError: `model-signing` is not installed.
    """

    def __init__(self, key: PrivateKey):
        library = _library("signing checkpoints in the format of OpenSSF Model Signing")
        self._library = library
        self._signing = library.signing.Config().use_elliptic_key_signer(private_key=key.file)

    def sign(self, name: str, digests: Mapping[str, str]) -> bytes:
        """Return the content of `model.sig`.

        Args:
            name: of the model, which readers show: that of the checkpoint's directory.
            digests: SHA-256 of each file, in hex, by name.

        Raises:
            CheckpointError: it is larger than readers allow.
        """
        with tempfile.TemporaryDirectory(prefix="signature-") as folder:
            path = Path(folder, MODEL_SIGNATURE)
            self._signing.set_hashing_config(_Hashed(self._library, digests)).sign(name, path)
            content = path.read_bytes()
        if len(content) > MAX_MODEL_SIGNATURE_BYTES:
            what = "the model signature of the checkpoint is too large"
            raise CheckpointError(what, got=f"{len(content)} bytes", allowed=f"{MAX_MODEL_SIGNATURE_BYTES} bytes")
        return content


@dataclass(frozen=True)
class ModelSignature:
    """What a `model.sig` says of itself. Nothing of it is believed before `check`.

    Attributes:
        content: of the file.
        hint: SHA-256 of the PEM of the key that signed, in hex; empty where it was a certificate or Sigstore.
        unknown: why it cannot be checked here; empty where it can.
        ignored: names that it leaves out.
        signed: names of the files that it lists.
    """

    content: bytes
    hint: str
    unknown: str
    ignored: tuple[str, ...]
    signed: tuple[str, ...]

    def check(self, keys: Sequence[PublicKey], name: str, digests: Mapping[str, str]) -> PublicKey | None:
        """Return the key that signed it, where that is one of `keys`; None otherwise.

        Args:
            keys: public keys that are trusted.
            name: of the checkpoint's directory.
            digests: SHA-256 of each file that there is, in hex, by name.

        Raises:
            CheckpointError: it is not the signature of these files by that key.
            MissingExtraError: `model-signing` is not installed.
        """
        key = next((key for key in keys if key.kind == ECDSA and key.hint == self.hint), None)
        if key is None:
            return None
        library = _library("checking a signature in the format of OpenSSF Model Signing")
        with tempfile.TemporaryDirectory(prefix="signature-") as folder, contextlib.redirect_stdout(io.StringIO()):
            public, signature = Path(folder, "key.pub.pem"), Path(folder, MODEL_SIGNATURE)
            public.write_bytes(key.pem)
            signature.write_bytes(self.content)
            verifying = library.verifying.Config().use_elliptic_key_verifier(public_key=public)
            try:
                verifying.set_hashing_config(_Hashed(library, digests)).verify(name, signature)
            except Exception as error:  # the library's, and those of what it parses with
                raise CheckpointError(f"the model signature is not that of these files: {_said(error)}") from None
        return key


def parse_model_signature(content: bytes) -> ModelSignature:
    """Parse a bundle, as far as tells who can check it.

    Args:
        content: of `model.sig`, of bounded size.

    Raises:
        CheckpointError: it is none.
    """
    try:
        data = parse_json(content)
        material = data["verificationMaterial"]
        hint = str((material.get("publicKey") or {}).get("hint") or "")
        payload = parse_json(decode(data["dsseEnvelope"]["payload"]))
        for one in data["dsseEnvelope"]["signatures"]:
            decode(one["sig"])
        predicate = payload["predicate"]
        how = {key: predicate["serialization"].get(key) for key in _METHOD}
        ignored = tuple(str(name) for name in predicate["serialization"].get("ignore_paths") or ())
        signed = tuple(str(one["name"]) for one in predicate["resources"])
    except _NOT_PARSED as error:
        raise CheckpointError(f"the model signature is damaged: {shown(error)}") from None
    unknown = ""
    if not hint:
        unknown = "signed by a certificate or through Sigstore"
    elif how != _METHOD:
        unknown = f"made by another method: {shown(', '.join(map(str, how.values())))}"
    return ModelSignature(content, hint, unknown, ignored, signed)


class _Hashed:
    """In the place of the library's `hashing.Config`, which reads a directory of this machine: the hashes are known."""

    def __init__(self, library: Any, digests: Mapping[str, str]):
        self._library, self._digests = library, digests

    def hash(self, model_path: object, *, files_to_hash: object = None) -> Any:
        """Return the library's manifest of the files."""
        module = self._library.manifest
        how = module.SerializationType.from_args({**_METHOD, "ignore_paths": list(SIGNATURES)})
        digest = self._library.hashing.hashing.Digest
        items = [how.new_item(name, digest("sha256", bytes.fromhex(text))) for name, text in self._digests.items()]
        return module.Manifest(str(model_path), items, how)

    def add_ignored_paths(self, *, model_path: object, paths: Iterable[object]) -> None:
        """Do nothing: what a signature leaves out, the caller has left out of the files."""


def _library(purpose: str) -> Any:
    try:
        import model_signing
    except ImportError as error:
        missing = "pyopenssl" if (error.name or "").partition(".")[0] == "OpenSSL" else "model-signing"
        raise MissingExtraError(missing, "model-signing", purpose) from None
    return model_signing


def _said(error: Exception) -> str:
    return shown(str(error) or type(error).__name__, 400)
