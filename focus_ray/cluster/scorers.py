"""Workers that score: each holds a bundle or two."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from focus_ray.bundle.inspector import Inspector
from focus_ray.cluster.connect import uses_gpu
from focus_ray.cluster.pool import Pool
from focus_ray.cluster.preflight import concurrent_runs
from focus_ray.config import ClusterConfig

HELD_BUNDLES = 2  # by a worker: that of the category before is still asked for its pictures


class Work(Protocol):
    """A piece of work. bundle: what it needs."""

    @property
    def bundle(self) -> str: ...


W = TypeVar("W", bound=Work)


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


def _with_bundle(function: Callable[[Any, Inspector], Any], work: Any, held: Bundles) -> Any:
    return function(work, held.get(work.bundle))


class Scorers(Generic[W]):
    """A pool of them on the cluster that this process has joined."""

    def __init__(self, num_workers: int | None, private: bool, log: Callable[[str], None]) -> None:
        """
        Args:
            num_workers: None for as many as the cluster has room for.  private: whether the cluster is this process's own.

        Raises: TrainingError: there is room for none.
        """
        config = ClusterConfig()
        count = concurrent_runs(config, private, log=log, limit=num_workers)
        self._pool: Pool[W] = Pool(Bundles, config, uses_gpu(config), count, log)

    def run(
        self, function: Callable[[W, Inspector], Any], more: Callable[[], W | None], done: Callable[[W, Any], None]
    ) -> None:
        """As `Pool.run`. Args: function: of a piece of work and its bundle's inspector."""
        self._pool.run(partial(_with_bundle, function), more, done)

    def close(self) -> None:
        """Ends the workers."""
        self._pool.close()
