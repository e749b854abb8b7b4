"""Lines and figures from workers to the driver, in place of what Ray forwards of their whole output."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

Line = str | tuple[str, dict[str, float]]  # for people, or a category's figures

VERBOSE = (
    "FOCUS_RAY_VERBOSE"  # environment variable that `--verbose` sets: show Ray's own lines and the workers' output
)


def is_verbose() -> bool:
    return os.environ.get(VERBOSE, "") not in ("", "0")


class _Box:
    """Runs as an actor beside the driver."""

    def __init__(self) -> None:
        self.lines: list[Line] = []

    def put(self, line: Line) -> None:
        self.lines.append(line)

    def take(self) -> list[Line]:
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

    def put_figures(self, category: str, figures: Mapping[str, float]) -> None:
        """As `put`."""
        self._box.put.remote((category, dict(figures)))

    def show(
        self,
        log: Callable[[str], None],
        epoch: Callable[[str, Mapping[str, float]], None] = lambda category, figures: None,
    ) -> None:
        """Of the driver: logs what has come, and hands figures on. A box that is lost loses lines, and no training."""
        import ray

        try:
            lines: list[Line] = ray.get(self._box.take.remote(), timeout=10)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return
        for line in lines:
            if isinstance(line, str):
                log(line)
            else:
                epoch(*line)


def epoch_callback(messages: Messages, category: str) -> Any:
    """A callback of Ray Train that puts what a category's workers report of an epoch among the messages."""
    from ray.train import UserCallback

    class EpochCallback(UserCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            if "epoch" in metrics[0]:  # of rank 0; the last report of all has none
                messages.put_figures(category, metrics[0])

    return EpochCallback()
