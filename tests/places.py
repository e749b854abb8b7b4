"""Paths of the repository, its package and configurations, and of the real images and weights next to it."""

from __future__ import annotations

import socket
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "focus_ray"
CONFIGS = REPOSITORY / "configs"
SHARED = REPOSITORY.parent / "shared"


def free_port() -> int:
    """Returns a free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
