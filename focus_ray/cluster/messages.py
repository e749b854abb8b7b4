"""Lines from workers to the driver, in place of what Ray forwards of their whole output."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

VERBOSE = (
    "FOCUS_RAY_VERBOSE"  # environment variable that `--verbose` sets: show Ray's own lines and the workers' output
)


def is_verbose() -> bool:
    return os.environ.get(VERBOSE, "") not in ("", "0")


class _Box:
    """Runs as an actor beside the driver."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def put(self, line: str) -> None:
        self.lines.append(line)

    def take(self) -> list[str]:
        taken, self.lines = self.lines, []
        return taken


class Messages:
    """A box that workers put lines into and the driver empties. Crosses to workers as it is."""

    def __init__(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._box: Any = ray.remote(num_cpus=0, max_restarts=1, scheduling_strategy=here)(_Box).remote()

    def put(self, line: str) -> None:
        """Of a worker: does not wait."""
        self._box.put.remote(line)

    def show(self, log: Callable[[str], None]) -> None:
        """Of the driver: logs what has come. A box that is lost loses lines, and no training."""
        import ray

        try:
            lines = ray.get(self._box.take.remote(), timeout=10)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return
        for line in lines:
            log(line)
