"""Runs the service on this machine (`focus-ray serve`), by default reachable only from this machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from focus_ray.errors import ConfigError, TrainingError
from focus_ray.serving.logs import log_event
from focus_ray.serving.origin import is_loopback_host
from focus_ray.serving.settings import ScoringPool, ServiceSettings, make_service_paths_absolute

APPLICATION = "focus-ray"
_GPU_SHARE = 0.01  # of a replica; so small that the number of replicas is not limited
_REPORT_EVERY_S = 60.0  # while replicas wait for nodes


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
def run_service(
    settings: ServiceSettings, host: str = "127.0.0.1", port: int = 8000, log: Callable[[str], None] = lambda line: None
) -> Iterator[str]:
    """Context manager: runs the service while the context is open, and finishes the requests in flight at the end.

    Waits until all replicas have started, also for nodes that an autoscaler adds. Resolves relative paths of the settings, since
    replicas run in other folders. Uses the Ray cluster that this process is connected to, else the cluster of RAY_ADDRESS, else
    starts a private cluster. In a private cluster, replicas that reserve no GPU share the GPU of this machine. Without
    RAY_USAGE_STATS_ENABLED in the environment, sets it to 0.

    Args: log: called every minute with each deployment (kind of replica) that has not started yet.

    Yields: the URL of the service.

    Raises:
        ConfigError: as `check_host_security` and `app.build`, or Ray Serve already serves applications on the cluster.
        TrainingError: Ray or a replica does not start, or Ray lacks a private function that the service uses.
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
    _check_serve_unused()
    try:
        serve.start(http_options={"host": host, "port": port, "request_timeout_s": settings.limits.timeout_s + 30})
        if started_ray and ray.cluster_resources().get("GPU"):
            settings = share_gpu(settings)
        application = build(make_service_paths_absolute(settings).model_dump(mode="json"))
        try:
            with _report_waiting(log):
                serve.run(
                    application,
                    name=APPLICATION,
                    route_prefix="/",
                    # no access log of Serve: the service writes its own
                    logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
                )
        except RuntimeError as error:
            reasons = "; ".join(_list_unready_deployments()) or str(error)
            raise TrainingError(f"the service has not started: {reasons}") from error
        yield f"http://{host}:{port}"
        serve.delete(APPLICATION)  # waits for requests in flight
    finally:
        serve.shutdown()
        if started_ray:
            ray.shutdown()


def share_gpu(settings: ServiceSettings) -> ServiceSettings:
    """Returns the settings with a small share of a GPU for each pool that reserves no GPU, unless the device is the CPU.

    Only a replica that reserves a share uses the GPU (`choose_device`).
    """
    if settings.device == "cpu":
        return settings

    def add_share(pool: ScoringPool) -> ScoringPool:
        return pool if pool.num_gpus else pool.model_copy(update={"num_gpus": _GPU_SHARE})

    pins = tuple(pin.model_copy(update={"pool": add_share(pin.pool)}) for pin in settings.pins)
    return settings.model_copy(update={"pool": add_share(settings.pool), "pins": pins})


def _check_serve_unused() -> None:
    """Checks that Ray Serve has no application on the cluster, because all applications share one host, port and end.

    Raises: ConfigError: it has; the service would replace or end the applications of others.
    """
    from ray import serve

    applications = sorted(serve.status().applications)
    if applications:
        raise ConfigError(
            f"Ray Serve already runs on this cluster, with the application {', '.join(applications)}: end it first (if it is "
            "yours: `serve shutdown`), or start this service on another cluster"
        )


@contextmanager
def _report_waiting(log: Callable[[str], None]) -> Iterator[None]:
    """Context manager: every minute, logs each deployment whose replicas have not started yet, with the reason."""
    ended, start = threading.Event(), time.monotonic()

    def report() -> None:
        while not ended.wait(_REPORT_EVERY_S):
            for line in _list_unready_deployments():
                log(f"waiting for {(time.monotonic() - start) / 60:.0f} min: {line}")

    thread = threading.Thread(target=report, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _list_unready_deployments() -> list[str]:
    """Returns one line for each deployment that is not healthy: its name, and Serve's reason or the error of a replica."""
    from ray import serve

    application = serve.status().applications.get(APPLICATION)
    lines = []
    for name, deployment in application.deployments.items() if application else ():
        if deployment.status != "HEALTHY":
            # a message of several lines is a traceback, which ends with the original error
            reason = deployment.message.strip().rpartition("\n")[2] or deployment.status.value
            lines.append(f"{name}: {reason.removeprefix('focus_ray.errors.')}")
    return lines


def serve_until_interrupted(settings: ServiceSettings, host: str, port: int, log: Callable[[str], None]) -> None:
    """Runs the service until SIGINT or SIGTERM, then finishes the requests in flight. Replaces the handlers of both signals.

    Args: log: called with each message for the user.

    Raises: ConfigError, TrainingError, DataError, BundleError, RegistryError: as `run_service`.
    """
    with run_service(settings, host, port, log) as url:
        with suppress(KeyboardInterrupt):
            for number in (signal.SIGINT, signal.SIGTERM):  # a shell may have disabled SIGINT
                signal.signal(number, signal.default_int_handler)
            log(f"serving at {url}  (Ctrl-C stops)")
            threading.Event().wait()
        log("stopping: requests in flight are finished first")
