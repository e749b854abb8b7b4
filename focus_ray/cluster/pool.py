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

from focus_ray.cluster.capacity import ClusterCapacity
from focus_ray.cluster.failures import describe_root_cause, is_retryable
from focus_ray.cluster.resource_wait import ResourceWait
from focus_ray.errors import TrainingError
from focus_ray.names import Log

MAX_LOST_NODES = 20  # of one piece: the loss of a node is no failure of the piece, but a piece may overload every node
_POLL_INTERVAL_S = 1.0  # between two calls of `listen`
_RELEASE_PAUSE_S = 5.0  # after a worker was stopped for another run, which needs some time to take its resources

Piece = TypeVar("Piece")


@dataclass(frozen=True)
class FailedPiece:
    """The result of a piece of work that failed and is not repeated. reason: text for the log and the report."""

    reason: str


class _WorkerActor:
    """The Ray actor of a worker: a process on the cluster that runs a function on one piece of work at a time."""

    def get_node_id(self) -> str:
        """Returns the id of the worker's node. The call returns when the actor runs, so it shows that the worker has started."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def call_function(self, function: Callable[[Any], Any], piece: Any) -> Any:
        """Calls the function with a piece of work, and returns its result."""
        return function(piece)


@dataclass
class _Worker:
    """A worker of a pool. actor: handle of its actor; node_id: id of its node, None while it starts."""

    actor: Any
    node_id: str | None = None


@dataclass
class _WorkerCall(Generic[Piece]):
    """A waiting, running or failed call of a worker, with its piece of work.

    Attributes:
        worker: the worker; None before a worker takes the piece.
        piece: the piece of work; None while the worker starts.
        num_failures: number of failed attempts, without those that ended with the loss of a node.
        num_lost_nodes: number of attempts that ended with the loss of a node.
    """

    worker: _Worker | None
    piece: Piece | None = None
    num_failures: int = 0
    num_lost_nodes: int = 0


@dataclass(frozen=True)
class WorkerPool(Generic[Piece]):
    """Runs pieces of work on worker actors of the cluster that this process has joined, and repeats failed pieces.

    There are never more workers than pieces. Workers are added when the cluster gets room for them. On a cluster that can grow,
    workers are requested for all pieces, so that the autoscaler adds nodes. While another run waits for resources, a worker is
    stopped after its piece.

    Attributes:
        capacity: gives the number of workers.
        actor_options: options of `ray.remote`, for instance from `make_worker_options`.
        max_retries: how often a piece is repeated after the loss of its worker or after an error, and how many starts of workers
            may fail. Attempts that ended with the loss of a node, such as a spot node, do not count.
        log: called with a line for each retry, and each minute while the run waits for resources.
        listen: called at least once a second while `run_pieces` waits.
        runs_trainers: True if the function of a piece runs a trainer of Ray Train, which has its own workers and repeats errors
            itself. A piece is then repeated only after the loss of its worker.
    """

    capacity: ClusterCapacity
    actor_options: dict[str, Any]
    max_retries: int
    log: Log
    listen: Callable[[], None] = lambda: None
    runs_trainers: bool = False

    def run_pieces(
        self, function: Callable[[Piece], Any], next_piece: Callable[[], Piece | None]
    ) -> Iterator[tuple[Piece, Any]]:
        """Generator: runs a function on pieces of work in the workers, and yields each piece with its result or `FailedPiece`.

        The iteration ends when `next_piece` returns None while no piece runs or waits for a retry. At the end, also after an
        exception in the loop of the caller, the workers are stopped. Permanent errors, such as wrong settings, are not repeated.

        Args:
            function: called with a piece. It must be idempotent: it may run more than once on a piece.
            next_piece: returns the next piece; None if there is no piece at the moment. After None, it is called again after
                each result, and about once a second while a worker is idle and another worker still runs a piece.

        Raises: TrainingError: more than `max_retries` starts of workers failed, or the run waited too long for resources.
        """
        run = _PoolRun(self, function, next_piece)
        try:
            while run.assign_pieces():
                yield from run.collect_results()
        finally:
            run.stop_workers()


class _PoolRun(Generic[Piece]):
    """The state of one call of `WorkerPool.run_pieces`: its workers, and the pieces that wait or run."""

    def __init__(
        self, pool: WorkerPool[Piece], function: Callable[[Piece], Any], next_piece: Callable[[], Piece | None]
    ) -> None:
        import ray

        self.pool, self.next_piece = pool, next_piece
        self.actor_class = ray.remote(**pool.actor_options)(_WorkerActor)
        self.function = ray.put(function)  # once, not with every call
        self.workers: list[_Worker] = []
        self.idle_workers: list[_Worker] = []
        self.calls: dict[Any, _WorkerCall[Piece]] = {}
        self.backlog: deque[_WorkerCall[Piece]] = deque()
        self.num_failed_starts, self.released_at, self.should_give_way = 0, -_RELEASE_PAUSE_S, False
        self.wait = ResourceWait(pool.capacity, pool.log)

    @property
    def num_working(self) -> int:
        """Number of workers that run a piece."""
        return sum(call.piece is not None for call in self.calls.values())

    def assign_pieces(self) -> bool:
        """Gives pieces to idle workers, and starts workers for further pieces. Returns False if no piece is left."""
        limit = self.pool.capacity.count_trainings(len(self.workers))
        if self.workers and time.monotonic() - self.released_at < _RELEASE_PAUSE_S:
            limit = min(limit, len(self.workers))
        num_available = len(self.workers) - self.num_working  # idle or starting
        num_takers = num_available + max(0, limit - len(self.workers))
        while len(self.backlog) < num_takers and (piece := self.next_piece()) is not None:
            self.backlog.append(_WorkerCall(None, piece))
        for _ in range(min(len(self.backlog), num_takers) - num_available):
            self._start_worker()
        while self.idle_workers and self.backlog:
            call = self.backlog.popleft()
            call.worker = self.idle_workers.pop()
            self.calls[call.worker.actor.call_function.remote(self.function, call.piece)] = call
        return bool(self.backlog) or self.num_working > 0

    def collect_results(self) -> Iterator[tuple[Piece, Any]]:
        """Generator: waits up to a second for answers of workers, and yields finished pieces with their results."""
        import ray

        answers, _ = ray.wait(list(self.calls), num_returns=1, timeout=_POLL_INTERVAL_S)
        self.pool.listen()
        self.should_give_way = self.pool.capacity.do_others_wait()
        num_working = self.num_working
        self.wait.check(len(self.calls) - num_working, is_working=num_working > 0 and not self.pool.runs_trainers)
        for answer in answers:
            call = self.calls.pop(answer)
            assert call.worker is not None
            try:
                outcome = ray.get(answer)
            except Exception as error:  # the failure of one piece must not end the others
                outcome = self._handle_failure(call, error)
                if outcome is None:
                    continue
            else:
                if call.piece is None:
                    call.worker.node_id = outcome
                self._keep_or_release(call.worker)
            if call.piece is not None:
                yield call.piece, outcome

    def stop_workers(self) -> None:
        """Stops all workers."""
        import ray

        for worker in self.workers:
            ray.kill(worker.actor)

    def _start_worker(self) -> None:
        """Starts a worker. A call without a piece, which returns when the worker runs, is added to `calls`."""
        worker = _Worker(self.actor_class.remote())
        self.workers.append(worker)
        self.calls[worker.actor.get_node_id.remote()] = _WorkerCall(worker)

    def _stop_worker(self, worker: _Worker) -> None:
        """Stops a worker, which is lost or idle. A lost worker may still run, but cannot be reached."""
        import ray

        self.workers.remove(worker)
        ray.kill(worker.actor)

    def _keep_or_release(self, worker: _Worker) -> None:
        """Makes a worker idle; or stops it if another run waits for resources and has got none from this run for a while.

        Workers that have not started are stopped too: their requests are older than the request of the other run, so Ray would
        give the free resources to them. Their pieces wait in `backlog`, and `assign_pieces` requests workers again later.
        """
        is_pause_over = time.monotonic() - self.released_at >= _RELEASE_PAUSE_S
        if not is_pause_over or not self.should_give_way:
            self.idle_workers.append(worker)
            return
        self.pool.log("another run waits for resources: one worker is stopped for it")
        self.released_at = time.monotonic()
        self._stop_worker(worker)
        for answer, call in list(self.calls.items()):
            if call.piece is None and call.worker is not None:
                self._stop_worker(call.worker)
                del self.calls[answer]

    def _handle_failure(self, call: _WorkerCall[Piece], error: Exception) -> FailedPiece | None:
        """Decides whether a failed call is repeated. Returns the result of its piece; None if it is repeated or has no piece.

        Raises: TrainingError: too many starts of workers failed.
        """
        import ray

        assert call.worker is not None
        is_lost = not isinstance(error, ray.exceptions.RayTaskError)  # the worker or its node
        alive_nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        # Ray reports a dead process within a second, but needs longer to see that a node is dead; until then it reports an
        # actor that is unavailable
        is_node_lost = isinstance(error, ray.exceptions.ActorUnavailableError) or (
            is_lost and call.worker.node_id is not None and call.worker.node_id not in alive_nodes
        )
        if is_lost:
            self._stop_worker(call.worker)
        else:
            self.idle_workers.append(call.worker)
        call.num_lost_nodes += is_node_lost
        call.num_failures += not is_node_lost
        if call.piece is None:
            self.num_failed_starts += 1
            if self.num_failed_starts > self.pool.max_retries:
                raise TrainingError(f"workers do not start: {describe_root_cause(error)}") from error
            return None
        may_repeat = call.num_failures <= self.pool.max_retries and call.num_lost_nodes <= MAX_LOST_NODES
        if may_repeat and (is_lost or not self.pool.runs_trainers) and is_retryable(error):
            number = "node lost" if is_node_lost else f"retry {call.num_failures} of {self.pool.max_retries}"
            self.pool.log(f"{number}: {describe_root_cause(error)}")
            self.backlog.appendleft(call)
            return None
        num_attempts = call.num_failures + call.num_lost_nodes
        attempts = f" ({num_attempts} attempts)" if num_attempts > 1 else ""
        return FailedPiece(describe_root_cause(error) + attempts)
