"""DSSE envelopes (https://github.com/secure-systems-lab/dsse): a payload, its type, and who has signed both.

An envelope is read only in the one spelling in which it is written here, so that no bit of it can change unnoticed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.checkpoint.format import parse_json
from orchestrator.checkpoint.keys import PrivateKey, PublicKey
from orchestrator.errors import CheckpointError, shown

IN_TOTO = "application/vnd.in-toto+json"
_MAX_SIGNATURES = 64


@dataclass(frozen=True)
class Envelope:
    """An envelope.

    Attributes:
        payload: what was signed.
        payload_type: its media type.
        signatures: the name of each key, and its signature.
    """

    payload: bytes
    payload_type: str
    signatures: tuple[tuple[str, bytes], ...]

    def signed_by(self, keys: Sequence[PublicKey]) -> list[PublicKey]:
        """Return those of `keys` that have signed it.

        Args:
            keys: public keys.

        Raises:
            CheckpointError: a signature that names one of them is not its signature.
            MissingExtraError: `cryptography` is not installed.
        """
        message, known = _message(self.payload_type, self.payload), {key.keyid: key for key in keys}
        found = []
        for keyid, signature in self.signatures:
            if (key := known.get(keyid)) is None:
                continue
            if not key.signed(signature, message):
                raise CheckpointError(
                    "a signature of the statement is not that of its content: one of them was changed",
                    got=f"key {keyid}",
                )
            found.append(key)
        return found


def seal(payload: bytes, payload_type: str, keys: Sequence[PrivateKey]) -> bytes:
    """Return the JSON of an envelope, in one line.

    Args:
        payload: what is signed.
        payload_type: its media type.
        keys: one or more that sign it.
    """
    message = _message(payload_type, payload)
    return _to_json(Envelope(payload, payload_type, tuple((key.public.keyid, key.sign(message)) for key in keys)))


def unseal(content: bytes) -> Envelope:
    """Parse an envelope. Nothing in it is believed by that: see `Envelope.signed_by`.

    Args:
        content: its JSON.

    Raises:
        CheckpointError: it is none, or is spelled in another way than `seal` does.
    """
    try:
        data = parse_json(content)
        if not isinstance(data["signatures"], list) or len(data["signatures"]) > _MAX_SIGNATURES:
            raise ValueError(f"it has no list of at most {_MAX_SIGNATURES} signatures")
        signatures = tuple((str(one["keyid"]), decode(one["sig"])) for one in data["signatures"])
        envelope = Envelope(decode(data["payload"]), str(data["payloadType"]), signatures)
        if _to_json(envelope) != content:
            raise ValueError("it is not spelled as it is written")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"the statement is damaged: {shown(error)}") from None
    return envelope


def _to_json(envelope: Envelope) -> bytes:
    signatures = [{"keyid": keyid, "sig": _encode(signature)} for keyid, signature in envelope.signatures]
    data = {"payload": _encode(envelope.payload), "payloadType": envelope.payload_type, "signatures": signatures}
    return json.dumps(data, separators=(",", ":")).encode() + b"\n"


def _message(payload_type: str, payload: bytes) -> bytes:
    """Return what is signed: DSSE's encoding of type and payload."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _encode(content: bytes) -> str:
    return base64.b64encode(content).decode()


def decode(text: Any) -> bytes:
    """Decode base64 in its one spelling: the last bits of another one would change nothing.

    Args:
        text: base64 of RFC 4648, with padding.

    Raises:
        ValueError: it is none, or spelled in another way.
        TypeError: it is no text.
    """
    content = base64.b64decode(text, validate=True)
    if _encode(content) != text:
        raise ValueError("base64 that is not spelled as it is written")
    return content
