"""An HTTP proxy in front of a Ray dashboard that demands a header and a cookie, as a company's login proxy does."""

from __future__ import annotations

import http.client
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HEADER, COOKIE = ("X-Proxy-Key", "the-key"), ("session", "the-session")


@contextmanager
def run_dashboard_proxy(dashboard: str = "127.0.0.1:1", certificate: Path | None = None) -> Iterator[str]:
    """Runs the proxy, and yields its address. Requests without the header and the cookie get a login page with status 200.

    Args:
        dashboard: HOST:PORT of the dashboard.
        certificate: folder with tls.crt and tls.key; None: plain HTTP.
    """

    class Handler(BaseHTTPRequestHandler):
        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get(HEADER[0]) == HEADER[1] and "=".join(COOKIE) in self.headers.get("Cookie", ""):
                upstream = http.client.HTTPConnection(dashboard, timeout=60)
                headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
                upstream.request(self.command, self.path, body, headers)
                answer = upstream.getresponse()
                status, content = answer.status, answer.read()
                upstream.close()
            else:
                status, content = 200, b"<html>Please log in</html>"
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = forward

        def log_message(self, *_: object) -> None:
            """Prints nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate / "tls.crt", certificate / "tls.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http{'s' if certificate else ''}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
