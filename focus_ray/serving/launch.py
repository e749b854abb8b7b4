"""`focus-ray serve`: the service on this machine, until it is interrupted; bound to loopback unless told otherwise."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from focus_ray.errors import ConfigError
from focus_ray.serving.logs import log
from focus_ray.serving.origin import is_loopback
from focus_ray.serving.settings import Settings

APPLICATION = "focus-ray"


def check_host(host: str, settings: Settings) -> None:
    """Logs a warning if other machines can reach the host.

    Raises: ConfigError: other machines can reach it, and the service asks for no token.
    """
    if is_loopback(host):
        return
    if settings.tokens is None:
        raise ConfigError(f"host {host!r} can be reached by others: set tokens=FILE, made by `focus-ray token create`")
    log(
        f"host {host!r} can be reached by other machines: put the front proxy before the service (serve/nginx.conf, "
        "docs/operate/operations.md), and let nothing else reach this port",
        level=logging.WARNING,
    )


def check_port(host: str, port: int) -> None:
    """Raises: ConfigError: something listens there already, or the port may not be used."""
    if port == 0:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen at {host}:{port}: {error.strerror or error}: give another --port, or end what is there"
            ) from None


@contextmanager
def running(settings: Settings, host: str = "127.0.0.1", port: int = 8000) -> Iterator[str]:
    """The service as a context. Starts a private Ray unless this process is connected or RAY_ADDRESS says where to go.

    Yields: its URL.  Raises: ConfigError: see `check_host`.
    """
    check_host(host, settings)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from focus_ray.cluster.connect import connect
    from focus_ray.serving.app import build

    mine = connect()
    try:
        serve.start(http_options={"host": host, "port": port, "request_timeout_s": settings.limits.timeout_s + 30})
        serve.run(
            build(settings.model_dump(mode="json")),
            name=APPLICATION,
            route_prefix="/",
            logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),  # the service logs its own
        )
        yield f"http://{host}:{port}"
        serve.delete(APPLICATION)  # lets requests under way finish
    finally:
        serve.shutdown()
        if mine:
            ray.shutdown()


def serve_until_interrupted(settings: Settings, host: str, port: int, log: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM, then drains."""
    stop = threading.Event()
    with running(settings, host, port) as url:
        former = {kind: signal.signal(kind, lambda *_: stop.set()) for kind in (signal.SIGINT, signal.SIGTERM)}
        log(f"serving at {url}  (Ctrl-C stops)")
        try:
            stop.wait()
        finally:
            for kind, handler in former.items():
                signal.signal(kind, handler)
        log("stopping: requests under way are finished first")
