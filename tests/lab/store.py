"""An S3 server of its own (moto's, over HTTP), which counts what it serves and fails when told to."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

BUCKET = "bucket"


@dataclass
class Fault:
    """Requests to refuse: those whose `METHOD path?query` matches, so many of them."""

    pattern: str
    status: str = "503 Service Unavailable"
    code: str = "SlowDown"
    times: int = 10**9
    seen: int = 0


@dataclass
class Store:
    """Attributes:
    url: of the server.
    requests: `METHOD path?query` of each request, and the bytes of its answer.
    faults: what is refused.
    """

    url: str = ""
    requests: list[tuple[str, int]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What a user sets to reach it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def fail(self, pattern: str, **options: Any) -> Fault:
        fault = Fault(pattern, **options)
        self.faults.append(fault)
        return fault

    def matching(self, pattern: str) -> list[str]:
        return [text for text, _ in self.requests if re.search(pattern, text)]

    def wrap(self, app: Any) -> Callable[..., Iterable[bytes]]:
        def handle(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            text = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
            for fault in self.faults:
                if fault.seen < fault.times and re.search(fault.pattern, text):
                    fault.seen += 1
                    # The body is read first: closing on a client that still sends is another error.
                    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                    start(fault.status, [("Content-Type", "application/xml")])
                    return [f"<Error><Code>{fault.code}</Code><Message>told to fail</Message></Error>".encode()]
            body = b"".join(app(environ, start))
            self.requests.append((text, len(body) if environ["REQUEST_METHOD"] == "GET" else 0))
            return [body]

        return handle


@contextlib.contextmanager
def serve() -> Iterator[Store]:
    """Start the server with an empty bucket; it ends with the context."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    class Quiet(MotoRequestHandler):
        def log_request(self, *unused: Any) -> None:
            pass

    store = Store()
    app = store.wrap(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    store.url = f"http://127.0.0.1:{server.server_port}"
    try:
        for method, path in (("POST", "/moto-api/reset"), ("PUT", f"/{BUCKET}")):
            request = urllib.request.Request(store.url + path, method=method)
            # As S3's own library would sign it: moto finds the service in there.
            request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request")
            urllib.request.urlopen(request).close()
        store.requests.clear()
        yield store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def reachable(store: Store) -> Iterator[None]:
    """This process's own libraries go to `store`."""
    import s3fs

    saved = dict(os.environ)
    os.environ.update(store.environment)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        os.environ.clear()
        os.environ.update(saved)
