"""A pool of worker actors on a Ray cluster. Each worker takes a piece of work, returns its result, and takes the next piece.

Fits, trainers, evaluation and batch inspection all run through it. Ray 2.60 has no feature that does the same:

- A restarted actor keeps its call, so that the piece of a lost node waits for a new node while other workers are idle. Here
  the piece goes to the next free worker.
- `ray.util.ActorPool` gives work to actors that have not started, which on an autoscaled cluster may be never.
- Ray Data ends the whole run when one item fails, and takes its items before it has seen any result.
- Tasks start a new process for every piece that needs a GPU, which costs the import of torch and a CUDA context each time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from focus_ray.cluster.connect import compute_worker_resources
from focus_ray.cluster.failures import describe_root_cause, is_retryable
from focus_ray.cluster.settings import ClusterConfig
from focus_ray.errors import TrainingError
from focus_ray.names import Log

_POLL_INTERVAL_S = 1.0  # between two calls of `listen`
_NOTICE_INTERVAL_S = 60.0  # between two log lines while no worker runs

Piece = TypeVar("Piece")


@dataclass(frozen=True)
class FailedPiece:
    """The result of a piece of work that failed on all attempts. reason: text for the log and the report."""

    reason: str


class _WorkerActor:
    """The Ray actor of a worker: a process on the cluster that runs a function on one piece of work at a time."""

    def ping(self) -> None:
        """Does nothing. A call returns when the actor runs, so it shows that the worker has started."""

    def call_function(self, function: Callable[[Any], Any], piece: Any) -> Any:
        """Calls the function with a piece of work, and returns its result."""
        return function(piece)


@dataclass
class _WorkerCall(Generic[Piece]):
    """A running or failed call of a worker, with its piece of work. `piece` is None while the worker starts."""

    worker: Any
    piece: Piece | None = None
    num_failures: int = 0


@dataclass(frozen=True)
class WorkerPool(Generic[Piece]):
    """Runs pieces of work on worker actors of the cluster that this process has joined, and repeats failed pieces.

    Attributes:
        num_workers: number of workers.
        actor_options: options of `ray.remote`, for instance from `make_worker_options`.
        max_retries: how often a piece is repeated after the loss of its worker or after an error, and how many starts of workers
            may fail.
        log: called with a line for each retry, and each minute while no worker runs.
        listen: called at least once a second while `run_pieces` waits.
        retry_errors: False repeats a piece only after the loss of its worker. Permanent errors, such as wrong settings, are
            never repeated.
    """

    num_workers: int
    actor_options: dict[str, Any]
    max_retries: int
    log: Log
    listen: Callable[[], None] = lambda: None
    retry_errors: bool = True

    def run_pieces(
        self, function: Callable[[Piece], Any], next_piece: Callable[[], Piece | None]
    ) -> Iterator[tuple[Piece, Any]]:
        """Generator: runs a function on pieces of work in the workers, and yields each piece with its result or `FailedPiece`.

        The iteration ends when `next_piece` returns None while no piece runs or waits for a retry. At the end, also after an
        exception in the loop of the caller, the workers are stopped.

        Args:
            function: called with a piece. It must be idempotent: it may run more than once on a piece.
            next_piece: returns the next piece; None if there is no piece at the moment. It is called again after each result.

        Raises: TrainingError: more than `max_retries` starts of workers failed.
        """
        import ray

        actor_class = ray.remote(**self.actor_options)(_WorkerActor)
        shipped_function = ray.put(function)  # once, not with every call
        workers: list[Any] = []
        idle_workers: list[Any] = []
        calls: dict[Any, _WorkerCall[Piece]] = {}
        retries: deque[_WorkerCall[Piece]] = deque()
        num_failed_starts, noticed_at = 0, time.monotonic()

        def start_worker() -> None:
            worker = actor_class.remote()
            workers.append(worker)
            calls[worker.ping.remote()] = _WorkerCall(worker)

        try:
            for _ in range(self.num_workers):
                start_worker()
            while True:
                while idle_workers:
                    if retries:
                        call = retries.popleft()
                    elif (piece := next_piece()) is not None:
                        call = _WorkerCall(None, piece)
                    else:
                        break
                    call.worker = idle_workers.pop()
                    calls[call.worker.call_function.remote(shipped_function, call.piece)] = call
                is_working = any(call.piece is not None for call in calls.values())
                if idle_workers and not is_working and not retries:
                    return
                answers, _ = ray.wait(list(calls), num_returns=1, timeout=_POLL_INTERVAL_S)
                self.listen()
                if not answers and not is_working and time.monotonic() - noticed_at >= _NOTICE_INTERVAL_S:
                    self.log(f"waiting until the cluster has room for one of {self.num_workers} worker(s)")
                    noticed_at = time.monotonic()
                for answer in answers:
                    call = calls.pop(answer)
                    try:
                        outcome = ray.get(answer)
                    except Exception as error:  # the failure of one piece must not end the others
                        is_lost = not isinstance(error, ray.exceptions.RayTaskError)  # the worker or its node
                        if is_lost:
                            ray.kill(call.worker)  # it may still run, but cannot be reached
                            start_worker()
                        else:
                            idle_workers.append(call.worker)
                        call.num_failures += 1
                        if call.piece is None:
                            num_failed_starts += 1
                            if num_failed_starts > self.max_retries:
                                raise TrainingError(f"workers do not start: {describe_root_cause(error)}") from error
                        elif self._is_retry_allowed(call, error, is_lost):
                            self.log(f"retry {call.num_failures} of {self.max_retries}: {describe_root_cause(error)}")
                            retries.append(call)
                            continue
                        attempts = f" ({call.num_failures} attempts)" if call.num_failures > 1 else ""
                        outcome = FailedPiece(describe_root_cause(error) + attempts)
                    else:
                        idle_workers.append(call.worker)
                    if call.piece is not None:
                        yield call.piece, outcome
        finally:
            for worker in workers:
                ray.kill(worker)

    def _is_retry_allowed(self, call: _WorkerCall[Piece], error: Exception, is_lost: bool) -> bool:
        """Returns whether a failed piece of work is repeated.

        Args:
            call: the failed call.
            error: its error.
            is_lost: whether the worker or its node was lost.
        """
        return (self.retry_errors or is_lost) and is_retryable(error) and call.num_failures <= self.max_retries


def make_worker_options(config: ClusterConfig, use_gpu: bool) -> dict[str, Any]:
    """Returns options of `ray.remote` with the resources and node labels that the configuration gives to one worker.

    Args: use_gpu: whether the worker uses a GPU.
    """
    resources = compute_worker_resources(config, use_gpu)
    return {
        "num_cpus": resources["CPU"],
        "num_gpus": resources.get("GPU", 0.0),
        "memory": resources.get("memory"),
        "label_selector": dict(config.labels) or None,
    }
