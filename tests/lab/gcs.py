"""Google Cloud Storage for tests: gcp-storage-emulator, and what the real service documents and the emulator lacks.

- `ifGenerationMatch` of a simple upload: 412 where it does not hold. An upload in parts with one is refused: it is not
  emulated.
- `DELETE` of an upload in parts: 499, and what was sent is gone.
- Parts before the last are a multiple of 256 KiB, else 400. What was sent already is ignored when it is sent again.
- A range that begins behind the end: 416.
- Where `bearer` is set, who does not bring that token gets 401; `/token` gives it to a service account (RFC 7523).
- Where `payer` is set, who does not name that project gets 400, as of a bucket whose requester pays.
https://cloud.google.com/storage/docs/request-preconditions
https://cloud.google.com/storage/docs/performing-resumable-uploads
https://cloud.google.com/storage/docs/json_api/v1/status-codes
"""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote

from tests.lab.store import BUCKET, Fault, Store

# gcsfs knows the real service by its address, and deletes in batches there and nowhere else.
_HOST = "/storage.googleapis.com"
_PART_UNIT = 1 << 18


class GoogleStore(Store):
    scheme = "gs"

    def __init__(self) -> None:
        super().__init__()
        self.bearer = self.payer = ""
        self._lock = threading.Lock()
        self._parts: dict[str, list[str]] = {}

    @property
    def environment(self) -> dict[str, str]:
        return {"STORAGE_EMULATOR_HOST": self.url + _HOST, "FSSPEC_GS_TOKEN": "anon"}

    def app(self) -> Callable[..., Iterable[bytes]]:
        from gcp_storage_emulator.handlers.buckets import create_bucket
        from gcp_storage_emulator.storage import Storage

        self._storage = Storage(use_memory_fs=True)
        create_bucket(BUCKET, self._storage)
        return self._serve

    def error(self, fault: Fault) -> tuple[str, str]:
        return _error(fault.status, fault.message)

    def unfinished(self) -> list[Any]:
        return [about["name"] for about in self._storage.resumable.values()]

    def line(self, environ: Mapping[str, Any], query: Mapping[str, str], body: bytes) -> str:
        method, path = environ["REQUEST_METHOD"], _path(environ)
        key = unquote(path.partition("/o/")[2])
        if path == "/token":
            return "TOKEN"
        if path.startswith("/batch/"):
            return f"DELETE {' '.join(unquote(key) for key in re.findall('/o/([^ ?]+)', body.decode()))}"
        if path.startswith("/upload/"):
            return self._upload(method, environ.get("HTTP_CONTENT_RANGE", ""), query, body)
        if path.startswith("/download/"):
            return f"GET {key}"
        if key:
            return f"{'HEAD' if method == 'GET' else method} {key}"
        return f"LIST {query.get('prefix', '')}" if method == "GET" else f"BUCKET {body.decode()}"

    def _upload(self, method: str, content_range: str, query: Mapping[str, str], body: bytes) -> str:
        name = query.get("name") or json.loads(re.findall(rb"{.*}", body)[0])["name"]
        if "upload_id" not in query:
            return f"START {name}" if query["uploadType"] == "resumable" else f"COMMIT {name}"
        if method == "DELETE":
            return f"ABORT {name}"
        if not content_range.endswith("/*"):
            return f"COMMIT {name}"
        parts = self._parts.setdefault(query["upload_id"], [])
        if content_range not in parts:
            parts.append(content_range)
        return f"PART {parts.index(content_range) + 1} {name}"

    def _serve(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        from gcp_storage_emulator.server import Router

        body = environ["wsgi.input"].read()
        query = {key: values[0] for key, values in parse_qs(environ["QUERY_STRING"]).items()}
        if _path(environ) == "/token":
            start("200 OK", [("Content-Type", "application/json")])
            return [json.dumps({"access_token": self.bearer, "expires_in": 3600, "token_type": "Bearer"}).encode()]
        with self._lock:  # the emulator knows one request at a time
            call = _Call(environ, body, self._storage)
            refused = self._refused(environ, query, body) or self._resent(environ, query, call)
            if refused:
                kind, content = _error(*refused)
                start(f"{refused[0]} {refused[1]}", [("Content-Type", kind)])
                return [content.encode()]
            Router(call).handle(environ["REQUEST_METHOD"])
        start(call.status, call.answered)
        return [call.wfile.getvalue()]

    def _refused(self, environ: Mapping[str, Any], query: Mapping[str, str], body: bytes) -> tuple[int, str] | None:
        """What the real service answers and the emulator does not."""
        method, path = environ["REQUEST_METHOD"], _path(environ)
        objects = self._storage.objects.get(BUCKET, {})
        if self.bearer and environ.get("HTTP_AUTHORIZATION") != f"Bearer {self.bearer}":
            return 401, "Anonymous caller does not have storage.objects.create access"
        if self.payer and query.get("userProject") != self.payer:
            return 400, "Bucket is a requester pays bucket but no user project provided."
        if "ifGenerationMatch" in query:
            if query.get("uploadType") != "multipart":
                return 501, "not emulated"
            there = objects.get(self._upload(method, "", query, body).partition(" ")[2], {"generation": "0"})
            if there["generation"] != query["ifGenerationMatch"]:
                return 412, "At least one of the pre-conditions you specified did not hold."
        if method == "DELETE" and "upload_id" in query:
            self._storage.delete_resumable_file_obj(query["upload_id"])
            return 499, "Client Closed Request"
        begin = re.match(r"bytes=(\d+)-", environ.get("HTTP_RANGE", ""))
        about = objects.get(unquote(path.partition("/o/")[2]))
        if begin and about and int(begin[1]) >= int(about["size"]):
            return 416, "Request range not satisfiable"
        return None

    def _resent(self, environ: dict[str, Any], query: Mapping[str, str], call: _Call) -> tuple[int, str] | None:
        """Check a part of an upload, and leave out of it what is there already."""
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\S+)", environ.get("HTTP_CONTENT_RANGE", ""))
        if not found:
            return None
        begin, end, total = int(found[1]), int(found[2]) + 1, found[3]
        if total == "*" and (end - begin) % _PART_UNIT:
            return 400, "parts are a multiple of 256 KiB"
        received = self._storage.get_resumable_byte_count(query["upload_id"])
        if begin < received:
            call.rfile.seek(received - begin)
            environ["HTTP_CONTENT_RANGE"] = f"bytes {received}-{end - 1}/{total}"
            environ["CONTENT_LENGTH"] = str(end - received)
        return None


class _Call:
    """A request as the emulator expects it of `http.server`, and the answer for WSGI."""

    def __init__(self, environ: dict[str, Any], body: bytes, storage: Any):
        from werkzeug.datastructures import EnvironHeaders

        self.path = f"{_path(environ)}?{environ['QUERY_STRING']}"
        self.headers, self.storage = EnvironHeaders(environ), storage
        self.server = SimpleNamespace(server_address=("127.0.0.1", 0))
        self.rfile, self.wfile = io.BytesIO(body), io.BytesIO()
        self.status = ""
        self.answered: list[tuple[str, str]] = []

    def send_response(self, code: int, phrase: str) -> None:
        self.status, self.answered = f"{code} {phrase}", []

    def send_header(self, name: str, value: str) -> None:
        self.answered.append((name, value))

    def end_headers(self) -> None:
        pass


def _path(environ: Mapping[str, Any]) -> str:
    """As it was sent: the / within a key is quoted there."""
    return str(environ["RAW_URI"]).partition("?")[0].removeprefix(_HOST)


def _error(status: int, message: str) -> tuple[str, str]:
    return "application/json", json.dumps({"error": {"code": status, "message": message}})
