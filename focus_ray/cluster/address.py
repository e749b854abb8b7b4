"""Addresses of Ray clusters: whether a cluster answers, asked before Ray itself is, which waits for minutes."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

from focus_ray.cluster.ray_private import find_local_cluster, is_token_refused

TIMEOUT_S = 4.0
ANSWER_TIMEOUT_S = 20.0  # a busy head node accepts connections at once, and answers later
TOKEN_REFUSED = (
    "it asks for another token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, "
    "to the token of the cluster"
)
ADVICE = "see that the cluster runs, or unset RAY_ADDRESS, and a private Ray starts on this machine"


def why_no_cluster(address: str) -> str:
    """Why no cluster can be joined at an address of RAY_ADDRESS, within 25 s; empty if one answers.

    Args:
        address: HOST:PORT, ray://HOST:PORT, auto or local, as `ray.init` takes them.
    """
    if address == "local":
        return ""
    if address == "auto":
        place = find_local_cluster()
        if place is None:
            return "no cluster runs on this machine"
    else:
        place = address.removeprefix("ray://")
    if place_of(place) is None:
        return "not an address: give HOST:6379, ray://HOST:10001 or auto"
    return unreachable(place) or _why_no_answer(place, is_token_known=address != "auto")


def _why_no_answer(host_and_port: str, is_token_known: bool) -> str:
    """Why what takes connections there is no Ray that lets us in: Ray's servers speak gRPC; empty if they do.

    Args: is_token_known: whether Ray would send the token of RAY_AUTH_TOKEN, and not look for one itself.
    """
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return ""  # needs Ray's own certificates
    import grpc

    options = [("grpc.enable_http_proxy", 0)]  # Ray goes past proxies too
    with grpc.insecure_channel(host_and_port, options=options) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_TIMEOUT_S)
        except grpc.FutureTimeoutError:
            return f"something takes connections there, and does not answer as Ray does within {ANSWER_TIMEOUT_S:g} s"
        if is_token_known and is_token_refused(channel, ANSWER_TIMEOUT_S):
            return TOKEN_REFUSED
    return ""


def current_cluster() -> str | None:
    """The address in Ray's own note of the cluster started last on this machine; None without a note."""
    try:
        text = (ray_folder() / "ray_current_cluster").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    return text or None


def ray_folder() -> Path:
    """Where Ray keeps sessions of this user: its own rule."""
    top = os.environ.get("RAY_TMPDIR") or (os.environ.get("TMPDIR") if sys.platform == "linux" else None) or "/tmp"
    return Path(top) / "ray"


def place_of(host_and_port: str) -> tuple[str, int] | None:
    """Host and port of HOST:PORT; None for text of another form."""
    try:
        parts = urlsplit(f"//{host_and_port}")
        return (parts.hostname, parts.port) if parts.hostname and parts.port else None
    except ValueError:
        return None


def unreachable(host_and_port: str) -> str:
    """Why no connection can be made, within TIMEOUT_S; empty where one can."""
    place = place_of(host_and_port)
    if place is None:
        return "not of the form HOST:PORT"
    try:
        socket.create_connection(place, timeout=TIMEOUT_S).close()
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    return ""
