"""The metadata servers of Google and Amazon, as far as they say that a machine is taken away."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_TOKEN = "a-token"


class Metadata:
    """What the machine is told; the notice comes when `taken` is set.

    Attributes:
        asked: method and path of each request.
        taken: path -> text of the notices that there are.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.taken: dict[str, str] = {}
        self.host = ""

    def preempt(self) -> None:
        self.taken["/computeMetadata/v1/instance/preempted"] = "TRUE"

    def maintain(self) -> None:
        self.taken["/computeMetadata/v1/instance/maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"

    def interrupt(self, time: str) -> None:
        self.taken["/latest/meta-data/spot/instance-action"] = json.dumps({"action": "terminate", "time": time})


@contextmanager
def serve_metadata() -> Iterator[Metadata]:
    """Serve on a free port of this machine."""
    metadata = Metadata()
    usual = {"preempted": "FALSE", "maintenance-event": "NONE"}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *unused: Any) -> None:
            pass

        def answer(self, code: int, text: str = "") -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_PUT(self) -> None:
            metadata.asked.append(("PUT", self.path))
            asked_for = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
            self.answer(*((200, _TOKEN) if self.path == "/latest/api/token" and asked_for else (400, "")))

        def do_GET(self) -> None:
            metadata.asked.append(("GET", self.path))
            google = self.path.startswith("/computeMetadata/")
            allowed = self.headers.get("Metadata-Flavor") == "Google" if google else False
            allowed = allowed or self.headers.get("X-aws-ec2-metadata-token") == _TOKEN
            if not allowed:
                self.answer(403 if google else 401)
            elif self.path in metadata.taken:
                self.answer(200, metadata.taken[self.path])
            elif google and self.path.rpartition("/")[2] in usual:
                self.answer(200, usual[self.path.rpartition("/")[2]])
            else:
                self.answer(404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    metadata.host = f"127.0.0.1:{server.server_address[1]}"
    try:
        yield metadata
    finally:
        server.shutdown()
        server.server_close()
