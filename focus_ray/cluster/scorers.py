"""A pool of actors that score: each holds a bundle or two, takes a piece of work after the other, and may be lost."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from focus_ray.bundle.inspector import Inspector
from focus_ray.cluster.connect import resources_per_worker, uses_gpu
from focus_ray.cluster.failures import reason_of, worth_another
from focus_ray.cluster.preflight import concurrent_runs
from focus_ray.config import ClusterConfig
from focus_ray.errors import FocusRayError, TrainingError

MAX_LOSSES = 3  # of the workers of one piece of work, until it counts as what ends them
HELD_BUNDLES = 2  # by a worker: that of the category before is still asked for its pictures
_WAIT_S = 60.0  # without any worker, until that is told


class Work(Protocol):
    """A piece of work. bundle: what it needs."""

    @property
    def bundle(self) -> str: ...


W = TypeVar("W", bound=Work)


@dataclass(frozen=True)
class Failed:
    """In place of a result. reason: for people.  again: whether another attempt may end otherwise."""

    reason: str
    again: bool = False


class Bundles:
    """The inspectors of the bundles that were asked for last."""

    def __init__(self, at_most: int = HELD_BUNDLES) -> None:
        self.at_most = at_most
        self._held: OrderedDict[str, Inspector] = OrderedDict()

    def get(self, uri: str) -> Inspector:
        """Raises: BundleError: none there, or damaged."""
        if uri not in self._held:
            while len(self._held) >= self.at_most:  # first: not one more than that at any time
                self._held.popitem(last=False)
            self._held[uri] = Inspector.load(uri)
        self._held.move_to_end(uri)
        return self._held[uri]


class _Worker:
    """Runs as an actor."""

    def __init__(self) -> None:
        self.bundles = Bundles()

    def ready(self) -> None:
        """Answers once the actor lives."""

    def run(self, function: Callable[[Any, Inspector], Any], work: Any) -> Any:
        try:
            return function(work, self.bundles.get(work.bundle))
        except FocusRayError as error:
            return Failed(str(error), worth_another(error))


@dataclass
class _Given(Generic[W]):
    """What a worker is at. work: None where it is only asked whether it lives.  losses: of workers or storage, over this work."""

    worker: Any = None
    work: W | None = None
    losses: int = 0

    @staticmethod
    def of(work: W | None) -> _Given[W] | None:
        return None if work is None else _Given(work=work)


class Scorers(Generic[W]):
    """Actors on the cluster that this process has joined."""

    def __init__(self, num_workers: int | None, private: bool, log: Callable[[str], None]) -> None:
        """
        Args:
            num_workers: None for as many as the cluster has room for.  private: whether the cluster is this process's own.

        Raises: TrainingError: there is room for none.
        """
        import ray

        config = ClusterConfig()
        count = concurrent_runs(config, private, log=log, limit=num_workers)
        asked = resources_per_worker(config, uses_gpu(config))
        # not restarted by Ray, which refuses calls meanwhile (2.60): a lost worker is replaced here, its work given out again
        self._class = ray.remote(num_cpus=asked["CPU"], num_gpus=asked.get("GPU", 0))(_Worker)
        self.workers = [self._class.remote() for _ in range(count)]
        self.log = log

    def run(
        self, function: Callable[[W, Inspector], Any], more: Callable[[], W | None], done: Callable[[W, Any], None]
    ) -> None:
        """Works until there is no more, and nothing under way.

        Args:
            function: of a piece of work and its bundle's inspector; runs on a worker, must give the same when it runs again.
            more: the next piece; None where there is none now: asked again after each result.
            done: takes a result, or `Failed`. Work whose worker was lost, or whose storage was away, is done anew, `MAX_LOSSES`
                times in all.
        """
        import ray

        again: deque[_Given[W]] = deque()
        busy: dict[Any, _Given[W]] = {worker.ready.remote(): _Given(worker) for worker in self.workers}
        idle: list[Any] = []
        told = time.monotonic()
        while True:
            while idle and (given := again.popleft() if again else _Given.of(more())) is not None:
                assert given.work is not None
                given.worker = idle.pop()
                busy[given.worker.run.remote(function, given.work)] = given
            working = any(given.work is not None for given in busy.values())
            if idle and not working and not again:
                return
            answered, _ = ray.wait(list(busy), num_returns=1, timeout=_WAIT_S)
            if not answered:
                if not working and time.monotonic() - told >= _WAIT_S:
                    self.log(f"waiting for room on the cluster for one of {len(self.workers)} worker(s)")
                    told = time.monotonic()
                continue
            given = busy.pop(answered[0])
            worker, work = given.worker, given.work
            try:
                result = ray.get(answered[0])
            except ray.exceptions.RayTaskError as error:  # a bug: of this piece, not of all
                result = Failed(reason_of(error))
            except ray.exceptions.RayError as error:
                given.losses += 1
                if work is None and given.losses >= MAX_LOSSES:
                    raise TrainingError(f"workers do not start: {_first_line(error)}") from error
                new = self._replace(worker)
                busy[new.ready.remote()] = _Given(new, losses=0 if work is not None else given.losses)
                if work is not None and given.losses < MAX_LOSSES:
                    self.log(f"a worker was lost, its work is given to another: {_first_line(error)}")
                    again.append(given)
                elif work is not None:
                    done(work, Failed(f"{MAX_LOSSES} workers were lost over it, the last: {_first_line(error)}"))
                continue
            idle.append(worker)
            if isinstance(result, Failed) and result.again and given.losses < MAX_LOSSES - 1:
                given.losses += 1
                self.log(f"once more: {result.reason}")
                again.append(given)
            elif work is not None:
                done(work, result)

    def _replace(self, worker: Any) -> Any:
        """A new worker in the place of one that was lost, or cannot be reached."""
        import ray

        ray.kill(worker)
        self.workers.remove(worker)
        self.workers.append(self._class.remote())
        return self.workers[-1]

    def close(self) -> None:
        """Ends the actors."""
        import ray

        for worker in self.workers:
            ray.kill(worker)


def absolute_place(place: str) -> str:
    """A local path made absolute, for workers run in other folders; a URI as it is."""
    return place if "://" in place else str(Path(place).expanduser().absolute())


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
