"""Ingestion on a Ray cluster: pieces of the source are read, checked and written by tasks on its nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from focus_ray.cluster.connect import connect
from focus_ray.cluster.preflight import probe_nodes
from focus_ray.data.ingest import ingest
from focus_ray.data.ingestion.report import IngestReport
from focus_ray.errors import DataError, TrainingError
from focus_ray.storage import is_s3

T = TypeVar("T")
R = TypeVar("R")
MAX_RETRIES = 5  # of a task whose worker or node was lost


class ClusterMapper:
    """Calls a function for each item in a Ray task of its own.

    Tasks and not Ray Data: a task writes part files under names of its attempt, and exactly the attempt whose answer came must
    count. A task answers once and whole. A task of Ray Data gives its blocks one by one, and one that is run again after its
    first block was taken may give the others of another attempt; it also keeps no item's number.
    """

    def __init__(self, num_workers: int) -> None:
        """
        Args: num_workers: tasks at a time.
        """
        self.num_workers = num_workers

    def __call__(self, function: Callable[[T], R], items: Sequence[T], /) -> Iterator[tuple[int, R]]:
        """Number of the item, and what the function gave; as they are done.

        Raises: DataError: the function's own.  TrainingError: the workers of an item kept dying.
        """
        import ray

        # a worker's death, or its node's, runs the task again; an error of the function's own does not
        task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(function)
        waiting: dict[Any, int] = {}
        numbers = iter(range(len(items)))
        try:
            while True:
                for number in numbers:
                    waiting[task.remote(items[number])] = number
                    if len(waiting) >= self.num_workers:
                        break
                if not waiting:
                    return
                (done,), _ = ray.wait(list(waiting), num_returns=1)
                number = waiting.pop(done)
                yield number, _answer(done)
        finally:
            for left in waiting:
                ray.cancel(left, force=True)


def _answer(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DataError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"the workers of one piece of the source died {MAX_RETRIES + 1} times ({reason}): where memory is short lower "
            "--workers; what was published stays, and the same command goes on"
        ) from error


def _files(folder: Path) -> Iterator[Path]:
    return (path.absolute() for path in folder.rglob("*") if path.is_file())


def ingest_on_cluster(
    source: str | Path, destination: str | Path, num_workers: int | str = "auto", **options: Any
) -> IngestReport:
    """`ingest` with the reading, checking and writing in tasks of a Ray cluster; the report and the data are the same.

    Args:
        num_workers: pieces at a time, a CPU each; auto takes as many as the cluster has CPUs.  options: of `ingest`.

    Raises: DataError: as `ingest`; a node that does not see source or destination.
    """
    import ray

    if num_workers != "auto" and (not isinstance(num_workers, int) or num_workers < 1):
        raise DataError(f"num_workers={num_workers!r}: expected a number of tasks, 1 or more, or auto")
    connect()
    reads = [] if is_s3(source) else [str(path) for path in islice(_files(Path(source)), 1)]
    probe_nodes(reads, [str(destination)])
    count = max(1, int(ray.cluster_resources().get("CPU", 1))) if num_workers == "auto" else int(num_workers)
    return ingest(source, destination, run=ClusterMapper(count), **options)
