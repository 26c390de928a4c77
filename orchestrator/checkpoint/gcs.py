"""Workarounds for gcsfs, the library of Google Cloud Storage."""

from __future__ import annotations

import errno
import logging
import re

SCHEMES = ("gs", "gcs")
_NO_LOGIN = "log in (gcloud auth application-default login) or set GOOGLE_APPLICATION_CREDENTIALS"
_UPLOAD_TO = re.compile(r"/upload/storage/v1/b/([^/]+)/o(.*upload_id=)?")


def prepare() -> None:
    """Choose how gcsfs works, for this process.

    Raises:
        ImportError: it is not installed.
    """
    from fsspec import register_implementation
    from gcsfs.core import GCSFileSystem

    # The class it takes by itself first asks by gRPC what kind of bucket it has; where only HTTP gets through, for a
    # minute and again at every request. And in a zonal bucket it shows objects half written, and lets everybody claim
    # what is claimed.
    for scheme in SCHEMES:
        register_implementation(scheme, GCSFileSystem, clobber=True)
    logger = logging.getLogger("gcsfs")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL)  # what it logs with a traceback, it also raises


def understood(error: Exception) -> OSError | None:
    """Return the system's error that an error of gcsfs stands for; None where it is one itself.

    Args:
        error: what was raised.
    """
    text = str(error)
    upload = _UPLOAD_TO.search(text)
    if isinstance(error, FileNotFoundError):
        if upload is None:
            return None
        if upload[2]:
            return OSError(errno.EIO, "the store knows an upload in parts no more")
        return FileNotFoundError(errno.ENOENT, f"there is no bucket '{upload[1]}'")
    # The service's words are the second line. The first is the address, which is enough to go on uploading.
    kind, _, said = text.partition("\n")
    if kind.startswith("Forbidden: "):
        return PermissionError(errno.EACCES, said or "Forbidden")
    if kind.startswith("Bad Request: "):
        return OSError(errno.EINVAL, said or "Bad Request")
    if getattr(error, "code", None) == 401:
        return PermissionError(errno.EACCES, f"{text}: {_NO_LOGIN}")
    if "requester pays" in text:
        return PermissionError(errno.EACCES, "the bucket is requester pays: set FSSPEC_GS_REQUESTER_PAYS=PROJECT")
    return None
