"""Servers of objects over HTTP, of S3 and of Google's kind, which count what they serve and fail when told to."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

BUCKET = "bucket"


@dataclass
class Fault:
    """Requests to refuse: those whose line (see `Store`) matches, so many of them.

    Attributes:
    status: of the answer; 0: the connection is cut instead.
    answer_lost: the request is carried out, and only its answer is replaced.
    hold_seconds: how long the answer is kept back.
    """

    pattern: str
    status: int = 503
    message: str = "told to fail"
    times: int = 10**9
    answer_lost: bool = False
    hold_seconds: float = 0
    seen: int = 0


class Store(ABC):
    """A store and its log, one line a request, the same for all kinds of stores:

    START KEY       an upload in parts begins
    PART N KEY      a part that is not the last request of its upload
    COMMIT KEY      an object appears
    ABORT KEY       an upload in parts is given up
    GET KEY, HEAD KEY, LIST PREFIX, DELETE KEY KEY ...
    BUCKET NAME     a bucket is made

    Attributes:
    url: of the server.
    requests: the line of each request that was carried out, and the bytes of its answer.
    faults: what is refused.
    """

    scheme: str

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[tuple[str, int]] = []
        self.faults: list[Fault] = []

    @property
    @abstractmethod
    def environment(self) -> dict[str, str]:
        """What a user sets to reach it."""

    @abstractmethod
    def app(self) -> Callable[..., Iterable[bytes]]:
        """The server as a WSGI application, with an empty bucket."""

    @abstractmethod
    def line(self, environ: Mapping[str, Any], query: Mapping[str, str], body: bytes) -> str:
        """What is asked for, as said above."""

    @abstractmethod
    def error(self, fault: Fault) -> tuple[str, str]:
        """Type and content of an answer of this kind of store."""

    @abstractmethod
    def unfinished(self) -> list[Any]:
        """Uploads in parts that were begun and neither ended nor given up."""

    @property
    def place(self) -> str:
        return f"{self.scheme}://{BUCKET}"

    def fail(self, pattern: str, **options: Any) -> Fault:
        fault = Fault(pattern, **options)
        self.faults.append(fault)
        return fault

    def matching(self, pattern: str) -> list[str]:
        return [text for text, _ in self.requests if re.search(pattern, text)]

    def wrap(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        def handle(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            # The body is read first: closing on a client that still sends is another error.
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            environ["wsgi.input"] = io.BytesIO(body)
            query = {key: values[0] for key, values in parse_qs(environ["QUERY_STRING"], True).items()}
            text = self.line(environ, query, body)
            fault = next((f for f in self.faults if f.seen < f.times and re.search(f.pattern, text)), None)
            if fault is None or fault.answer_lost:
                answer = b"".join(app(environ, start if fault is None else lambda *unused: None))
                self.requests.append((text, len(answer)))
            if fault is not None:
                fault.seen += 1
                time.sleep(fault.hold_seconds)
                if not fault.status:
                    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                kind, content = self.error(fault)
                start(f"{fault.status or 500} Told To Fail", [("Content-Type", kind)])
                answer = content.encode()
            return [answer]

        return handle


class S3Store(Store):
    scheme = "s3"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def app(self) -> Callable[..., Iterable[bytes]]:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from moto.s3.models import s3_backends

        self._backend = s3_backends["123456789012"]["aws"]
        self._backend.reset()
        self._backend.create_bucket(BUCKET, "us-east-1")
        return DomainDispatcherApplication(create_backend_app)

    def line(self, environ: Mapping[str, Any], query: Mapping[str, str], body: bytes) -> str:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        key = path.removeprefix(f"/{BUCKET}").strip("/")
        if "uploads" in query:
            return f"START {key}"
        if "uploadId" in query:
            verb = {"PUT": f"PART {query.get('partNumber')}", "POST": "COMMIT", "DELETE": "ABORT"}[method]
            return f"{verb} {key}"
        if "list-type" in query:
            return f"LIST {query.get('prefix', '')}"
        if "delete" in query:
            return f"DELETE {' '.join(re.findall('<Key>(.*?)</Key>', body.decode()))}"
        if method == "PUT":
            return f"COMMIT {key}" if path.count("/") > 1 else f"BUCKET {path}"
        return f"{method} {key}"

    def error(self, fault: Fault) -> tuple[str, str]:
        code = {403: "AccessDenied", 503: "SlowDown"}.get(fault.status, "InternalError")
        return "application/xml", f"<Error><Code>{code}</Code><Message>{fault.message}</Message></Error>"

    def unfinished(self) -> list[Any]:
        return [upload.key_name for upload in self._backend.list_multipart_uploads(BUCKET).values()]


@contextlib.contextmanager
def serve(scheme: str, *doors: socket.socket) -> Iterator[Store]:
    """Start the server of a kind of store, with an empty bucket; it ends with the context.

    Args:
        scheme: of its URLs.
        doors: sockets that listen where it is to answer beside this machine's own address.
    """
    from werkzeug.serving import WSGIRequestHandler, make_server

    from tests.lab.gcs import GoogleStore

    class Quiet(WSGIRequestHandler):
        def log_request(self, *unused: Any) -> None:
            pass

    store: Store = {"s3": S3Store, "gs": GoogleStore}[scheme]()
    app = store.wrap(store.app())
    servers = [make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)]
    servers += [
        make_server(*door.getsockname(), app, threaded=True, request_handler=Quiet, fd=door.fileno()) for door in doors
    ]
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    store.url = f"http://127.0.0.1:{servers[0].server_port}"
    try:
        yield store
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


@contextlib.contextmanager
def reachable(store: Store) -> Iterator[None]:
    """This process's own libraries go to `store`."""
    import fsspec.config

    from orchestrator.checkpoint.storage import locate

    saved, settings = dict(os.environ), copy.deepcopy(fsspec.config.conf)
    os.environ.update(store.environment)
    fsspec.config.set_conf_env(fsspec.config.conf, store.environment)
    library = type(locate(store.place).fs)
    library.clear_instance_cache()
    try:
        yield
    finally:
        library.clear_instance_cache()
        os.environ.clear()
        os.environ.update(saved)
        fsspec.config.conf.clear()
        fsspec.config.conf.update(settings)
