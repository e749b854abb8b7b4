"""Sends lines of text and metrics from workers to the driver (the process that started the run).

Ray would instead forward the complete output of the workers. `ray.util.queue.Queue` does not fit: its `put` waits for an answer,
and fails if the queue is lost.
"""

from __future__ import annotations

import os
from typing import Any

Message = str | tuple[str, dict[str, float]]  # a line of text, or a category and the metrics of an interval

# environment variable that `--verbose` sets: show the lines of Ray and the output of the workers
VERBOSE_VARIABLE = "FOCUS_RAY_VERBOSE"


def is_verbose() -> bool:
    """Returns whether the user gave `--verbose`, which shows the output of Ray and of the workers."""
    return os.environ.get(VERBOSE_VARIABLE, "") not in ("", "0")


class _MessageQueueActor:
    """The Ray actor that stores messages from workers until the driver (the process that started the run) takes them."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def put(self, message: Message) -> None:
        """Stores a message of a worker until `take_all` is called."""
        self.messages.append(message)

    def take_all(self) -> list[Message]:
        """Returns the messages that workers have sent since the last call, and removes them."""
        messages, self.messages = self.messages, []
        return messages


class MessageQueue:
    """A queue of messages that workers write to and the driver (the process that started the run) reads. It can be pickled."""

    def __init__(self) -> None:
        import ray

        self._queue: Any = ray.remote(max_restarts=1, **make_actor_options_for_this_node())(_MessageQueueActor).remote()

    def put(self, message: Message) -> None:
        """Sends a message from a worker to the driver, without waiting for an answer."""
        self._queue.put.remote(message)

    def take_all(self) -> list[Message]:
        """Returns the messages that have arrived since the last call, and removes them.

        If the queue is lost or does not answer within 10 s, returns an empty list. Messages may then be lost, but no training
        fails for this reason.
        """
        import ray

        try:
            return ray.get(self._queue.take_all.remote(), timeout=10)  # type: ignore[no-any-return]
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return []


def make_actor_options_for_this_node() -> dict[str, Any]:
    """Returns options of `ray.remote` that start an actor on the node of this process, without a reserved CPU.

    An actor on this node survives the loss of other nodes.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node_id = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}
