"""A pool of actors that take one piece of work after the other, and may be lost.

For what needs no process group: a fit without gradients, an evaluation, a batch inspection. A trainer of Ray Train sets up a
group, a controller and checkpoints for every category; a process that is there takes the next piece at once. What Ray does not do
for it is small, and here: a lost actor is replaced, and its work given to another, as often as cluster.max_failures says.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from focus_ray.cluster.connect import resources_per_worker
from focus_ray.cluster.failures import is_retryable, reason_of
from focus_ray.config import ClusterConfig
from focus_ray.errors import TrainingError

_LISTEN_S = 1.0  # between two looks at what workers tell
_WAIT_S = 60.0  # without any worker, until that is told

W = TypeVar("W")


@dataclass(frozen=True)
class Failed:
    """In place of a result. reason: for people."""

    reason: str


class _Worker:
    """Runs as an actor. held: what it keeps from one piece to the next."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self.held = start()

    def ready(self) -> None:
        """Answers once the actor lives."""

    def run(self, function: Callable[[Any, Any], Any], work: Any) -> Any:
        return function(work, self.held)


@dataclass
class _Given(Generic[W]):
    """A piece of work and how often it was tried; work is None where a worker is only asked whether it lives."""

    work: W | None
    failures: int = 0
    worker: Any = None


class Pool(Generic[W]):
    """Actors on the cluster that this process has joined; they come as it has room for them."""

    def __init__(
        self,
        start: Callable[[], Any],
        config: ClusterConfig,
        use_gpu: bool,
        num_workers: int,
        log: Callable[[str], None],
        listen: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            start: makes what an actor keeps from one piece of work to the next.  listen: called about every second.
        """
        import ray

        asked = resources_per_worker(config, use_gpu)
        # not restarted by Ray, which refuses calls meanwhile (2.60): a lost worker is replaced here
        self._class = ray.remote(
            num_cpus=asked["CPU"],
            num_gpus=asked.get("GPU", 0.0),
            memory=asked.get("memory"),
            label_selector=dict(config.labels) or None,
        )(_Worker)
        self._start, self.max_failures, self.log, self.listen = start, config.max_failures, log, listen
        self.workers = [self._class.remote(start) for _ in range(num_workers)]

    def run(
        self,
        function: Callable[[W, Any], Any],
        more: Callable[[], W | None],
        done: Callable[[W, Any], None],
    ) -> None:
        """Works until there is no more, and nothing under way.

        Args:
            function: of a piece of work and what the worker keeps; done twice, as after a loss, it leaves what it leaves once.
            more: the next piece; None where there is none now: asked again after each result.
            done: takes a result, or `Failed`.

        Raises: TrainingError: no actor starts.
        """
        import ray

        again: deque[_Given[W]] = deque()
        busy: dict[Any, _Given[W]] = {}
        for worker in self.workers:
            busy[worker.ready.remote()] = _Given(None, worker=worker)
        idle: list[Any] = []
        unborn, told = 0, time.monotonic()
        while True:
            while idle and (given := again.popleft() if again else _given(more())) is not None:
                given.worker = idle.pop()
                busy[given.worker.run.remote(function, given.work)] = given
            working = any(given.work is not None for given in busy.values())
            if idle and not working and not again:
                return
            answered, _ = ray.wait(list(busy), num_returns=1, timeout=_LISTEN_S)
            self.listen()
            if not answered and not working and time.monotonic() - told >= _WAIT_S:
                self.log(f"waiting for room on the cluster for one of {len(self.workers)} worker(s)")
                told = time.monotonic()
            for reference in answered:
                given = busy.pop(reference)
                try:
                    result = ray.get(reference)
                except Exception as error:  # of one piece, which must not end the others
                    lost = not isinstance(error, ray.exceptions.RayTaskError)
                    if lost:
                        new = self._replace(given.worker)
                        busy[new.ready.remote()] = _Given(None, worker=new)
                    else:
                        idle.append(given.worker)
                    if given.work is not None:
                        result = self._judge(given, error, again)
                        if result is not None:
                            done(given.work, result)
                    elif (unborn := unborn + 1) > self.max_failures:
                        raise TrainingError(f"workers do not start: {reason_of(error)}") from error
                else:
                    idle.append(given.worker)
                    if given.work is not None:
                        done(given.work, result)

    def _judge(self, given: _Given[W], error: Exception, again: deque[_Given[W]]) -> Failed | None:
        """Puts the work among what is to be done again, or says that it has failed."""
        given.failures += 1
        if not is_retryable(error):
            return Failed(reason_of(error))
        if given.failures > self.max_failures:
            tried = f" ({given.failures} times)" if given.failures > 1 else ""
            return Failed(f"{reason_of(error)}{tried}")
        self.log(f"once more, by {'another worker' if len(self.workers) > 1 else 'a worker'}: {reason_of(error)}")
        again.append(given)
        return None

    def _replace(self, worker: Any) -> Any:
        """A new worker in the place of one that was lost, or cannot be reached."""
        import ray

        ray.kill(worker)
        self.workers.remove(worker)
        self.workers.append(self._class.remote(self._start))
        return self.workers[-1]

    def close(self) -> None:
        """Ends the actors."""
        import ray

        for worker in self.workers:
            ray.kill(worker)


def _given(work: W | None) -> _Given[W] | None:
    return None if work is None else _Given(work)
