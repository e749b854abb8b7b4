"""Sends lines of text and metrics from workers to the driver, instead of the complete output that Ray would forward."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

Line = str | tuple[str, dict[str, float]]  # a line of text, or a category and its metrics

# environment variable that `--verbose` sets: show the lines of Ray and the output of the workers
VERBOSE = "FOCUS_RAY_VERBOSE"


def is_verbose() -> bool:
    """Returns whether `--verbose` was given."""
    return os.environ.get(VERBOSE, "") not in ("", "0")


class _MessageQueue:
    """Queue of lines, run as an actor on the node of the driver."""

    def __init__(self) -> None:
        self.lines: list[Line] = []

    def put(self, line: Line) -> None:
        self.lines.append(line)

    def take(self) -> list[Line]:
        lines, self.lines = self.lines, []
        return lines


class Messages:
    """A queue that workers write to and the driver reads. It can be sent to workers."""

    def __init__(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        on_this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._queue: Any = ray.remote(num_cpus=0, max_restarts=1, scheduling_strategy=on_this_node)(
            _MessageQueue
        ).remote()

    def put(self, line: str) -> None:
        """Sends a line. Called by a worker; does not wait."""
        self._queue.put.remote(line)

    def put_figures(self, category: str, figures: Mapping[str, float]) -> None:
        """Sends the metrics of an epoch. Called by a worker; does not wait."""
        self._queue.put.remote((category, dict(figures)))

    def show(
        self,
        log: Callable[[str], None],
        on_epoch: Callable[[str, Mapping[str, float]], None] = lambda category, figures: None,
    ) -> None:
        """Logs the lines that have arrived and passes metrics to `on_epoch`. Called by the driver.

        If the queue is lost, its lines are lost, but no training fails.
        """
        import ray

        try:
            lines: list[Line] = ray.get(self._queue.take.remote(), timeout=10)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return
        for line in lines:
            if isinstance(line, str):
                log(line)
            else:
                on_epoch(*line)


def epoch_callback(messages: Messages, category: str) -> Any:
    """Returns a Ray Train callback that sends the metrics of each epoch of a category as messages."""
    from ray.train import UserCallback

    class EpochCallback(UserCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            if "epoch" in metrics[0]:  # of rank 0; the last report of a training has no epoch
                messages.put_figures(category, metrics[0])

    return EpochCallback()
