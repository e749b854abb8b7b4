"""A proxy in front of a real S3 server that answers a share of the requests with 503, like an overloaded server."""

from __future__ import annotations

import http.client
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


class FaultyProxy(ThreadingHTTPServer):
    """The proxy server.

    Attributes:
        endpoint: URL of the proxy.
        passed, refused: numbers of requests so far.
        requests: method, path, sent bytes and received bytes of each passed request.
    """

    daemon_threads = True

    def __init__(self, target: str, share: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.share, self.random = urlsplit(target).netloc, share, random.Random(0)
        self.lock = threading.Lock()
        self.passed = self.refused = 0
        self.requests: list[tuple[str, str, int, int]] = []
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"

    def draw_refusal(self) -> bool:
        """Returns whether the next request is refused, and counts it."""
        with self.lock:
            refused = self.random.random() < self.share
            self.refused += refused
            self.passed += not refused
        return refused


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _serve(self) -> None:
        body = self._body()
        if self.server.draw_refusal():
            self._answer(503, [("Content-Type", "application/xml")], SLOW_DOWN)
            return
        # the Host header stays: the signature covers it
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("expect", "connection")}
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            content = answer.read()
            with self.server.lock:
                self.server.requests.append((self.command, self.path, len(body), len(content)))
            self._answer(answer.status, answer.getheaders(), content)
        except (OSError, http.client.HTTPException):
            self.close_connection = True  # the server has gone, so the connection of the client ends too
        finally:
            connection.close()

    def _body(self) -> bytes:
        """Returns the bytes of the request body, including the chunk marks of a chunked body."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while True:
            parts.append(self.rfile.readline())
            size = int(parts[-1].split(b";")[0], 16)
            if not size:
                break
            parts.append(self.rfile.read(size + 2))
        while parts[-1] != b"\r\n":  # trailers, and the empty line that ends them
            parts.append(self.rfile.readline())
        return b"".join(parts)

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        length = str(len(content))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value  # the length of the body of a GET request
            elif name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def faulty(target: str, share: float) -> Iterator[FaultyProxy]:
    """Runs a proxy for a server. share: share of the requests that is refused."""
    with FaultyProxy(target, share) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
