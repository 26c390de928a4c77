"""The key that the islands of a run and its hub share, and what ZeroMQ's CURVE makes of it.

Who has the key can join the run, and everything on the way is encrypted and authenticated with keys derived from it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError, MissingExtraError

_BYTES = 32


def make(path: Path) -> bytes:
    """Write a new key, that the owner alone may read. One that is there stays.

    Args:
        path: of the file.

    Returns:
        The key.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return read(path)
    key = secrets.token_bytes(_BYTES)
    with os.fdopen(descriptor, "wb") as file:
        file.write(base64.b64encode(key) + b"\n")
    return key


def read(path: Path) -> bytes:
    """Read a key.

    Args:
        path: of the file.

    Raises:
        ConfigError: there is none, or it is no key.
    """
    try:
        text = path.read_bytes()[:1000]
        key = base64.b64decode(text.strip(), validate=True)
    except OSError as error:
        fix = "copy the file islands/key from the run's directory, and name it: islands.key_file=FILE"
        raise ConfigError("the key of the islands cannot be read", got=f"{path}: {error.strerror}", fix=fix) from error
    except binascii.Error:
        key = b""
    if len(key) != _BYTES:
        raise ConfigError(
            "the file holds no key of islands",
            got=str(path),
            allowed=f"{_BYTES} bytes in base64, as islands/key in the run's directory",
            fix="copy that file as it is",
        )
    return key


def import_zmq() -> Any:
    """Import pyzmq.

    Raises:
        MissingExtraError: it, or what frames are hashed with, is not installed.
    """
    try:
        import blake3  # noqa: F401
        import zmq
    except ImportError as error:
        raise MissingExtraError(error.name or "pyzmq", "islands", "training with islands") from error
    return zmq


def curve_pair(key: bytes, role: str) -> tuple[bytes, bytes]:
    """Return the public and the secret key of one side, as ZeroMQ takes them.

    Args:
        key: that the islands share.
        role: `hub` or `island`.
    """
    zmq = import_zmq()
    from zmq.utils import z85

    secret = z85.encode(hashlib.sha256(b"orchestrator islands " + role.encode() + b"\0" + key).digest())
    return zmq.curve_public(secret), secret
