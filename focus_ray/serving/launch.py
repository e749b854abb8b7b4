"""Runs the service on this machine (`focus-ray serve`), by default reachable only from this machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from focus_ray.errors import ConfigError
from focus_ray.serving.logs import log_event
from focus_ray.serving.origin import is_loopback_host
from focus_ray.serving.settings import ServiceSettings

APPLICATION = "focus-ray"


def check_host_security(host: str, settings: ServiceSettings) -> None:
    """Checks that a host name or address that other machines can reach is used only with tokens, and then logs a warning.

    Raises: ConfigError: other machines can reach the host, and the settings have no tokens.
    """
    if is_loopback_host(host):
        return
    if settings.tokens is None:
        raise ConfigError(
            f"other machines can reach host {host!r}: set tokens=FILE; create it with `focus-ray token create`"
        )
    log_event(
        f"other machines can reach host {host!r}: put the front proxy before the service (serve/nginx.conf, "
        "docs/operate/operations.md), and let only the proxy reach this port",
        level=logging.WARNING,
    )


def check_port_free(host: str, port: int) -> None:
    """Checks that the service can listen at a port of a host; port 0 means any free port.

    Raises: ConfigError: the port is not free, or the host is not an address of this machine.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"cannot listen at {host}:{port}: {reason}: choose another --port, or end the other program"
        ) from None


@contextmanager
def run_service(settings: ServiceSettings, host: str = "127.0.0.1", port: int = 8000) -> Iterator[str]:
    """Context manager: runs the service while the context is open, and finishes the requests in flight at the end.

    Uses the Ray cluster that this process is connected to, else the cluster of RAY_ADDRESS, else starts a private cluster.
    Without RAY_USAGE_STATS_ENABLED in the environment, sets it to 0.

    Yields: the URL of the service.

    Raises:
        ConfigError: as `check_host_security` and `app.build`.
        TrainingError: Ray does not start, or lacks a private function that the service uses.
        DataError, BundleError, RegistryError: as `app.build`.
    """
    check_host_security(host, settings)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from focus_ray.cluster.connect import connect_to_ray
    from focus_ray.serving.app import build

    started_ray = connect_to_ray()
    try:
        serve.start(http_options={"host": host, "port": port, "request_timeout_s": settings.limits.timeout_s + 30})
        serve.run(
            build(settings.model_dump(mode="json")),
            name=APPLICATION,
            route_prefix="/",
            # no access log of Serve: the service writes its own
            logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
        )
        yield f"http://{host}:{port}"
        serve.delete(APPLICATION)  # waits for requests in flight
    finally:
        serve.shutdown()
        if started_ray:
            ray.shutdown()


def serve_until_interrupted(settings: ServiceSettings, host: str, port: int, log: Callable[[str], None]) -> None:
    """Runs the service until SIGINT or SIGTERM, then finishes the requests in flight. Replaces the handlers of both signals.

    Args: log: called with each message for the user.

    Raises: ConfigError, TrainingError, DataError, BundleError, RegistryError: as `run_service`.
    """
    with run_service(settings, host, port) as url:
        with suppress(KeyboardInterrupt):
            for number in (signal.SIGINT, signal.SIGTERM):  # a shell may have disabled SIGINT
                signal.signal(number, signal.default_int_handler)
            log(f"serving at {url}  (Ctrl-C stops)")
            threading.Event().wait()
        log("stopping: requests in flight are finished first")
