"""Ingestion on a Ray cluster: workers read, check and write pieces of the source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from focus_ray.cluster.connect import connect
from focus_ray.cluster.pool import Failed, WorkerPool
from focus_ray.cluster.preflight import probe_nodes
from focus_ray.data.ingest import ingest
from focus_ray.data.ingestion.report import IngestReport
from focus_ray.errors import DataError, TrainingError
from focus_ray.storage import is_s3

T = TypeVar("T")
R = TypeVar("R")
MAX_RETRIES = 5  # of a piece after the loss of its worker or node


class ClusterMapper:
    """Calls a function for each item on the workers of a pool.

    Ray Data does not fit here: a worker writes part files under names of its attempt, and the caller must count exactly the
    attempt that answered. Ray Data yields the blocks of one item singly, and a repeated item may mix blocks of two attempts.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers

    def __call__(self, function: Callable[[T], R], items: Sequence[T], /) -> Iterator[tuple[int, R]]:
        """Yields the number of each item and the result of the function, in the order in which they finish.

        Raises: DataError: from the function.  TrainingError: an item failed on every attempt.
        """
        numbered_items = iter(enumerate(items))
        num_workers = min(self.num_workers, len(items))
        with WorkerPool[tuple[int, T]](num_workers, {"num_cpus": 1}, MAX_RETRIES, lambda line: None) as pool:
            for (number, _), outcome in pool.run(
                lambda numbered: function(numbered[1]), lambda: next(numbered_items, None)
            ):
                if isinstance(outcome, Failed):
                    raise _error_of(outcome)
                yield number, outcome


def _error_of(failed: Failed) -> Exception:
    """Returns the DataError of the function itself, or a TrainingError that says that the workers died."""
    if isinstance(getattr(failed.error, "cause", None), DataError):
        return failed.error.cause  # type: ignore[attr-defined,no-any-return]
    return TrainingError(
        f"a piece of the source failed on every worker that tried it: {failed.reason}. If memory is short, lower --workers. "
        "Published data stays, and the same command continues"
    )


def _files(folder: Path) -> Iterator[Path]:
    """Yields the absolute paths of all files below a folder."""
    return (path.absolute() for path in folder.rglob("*") if path.is_file())


def ingest_on_cluster(
    source: str | Path, destination: str | Path, num_workers: int | str = "auto", **options: Any
) -> IngestReport:
    """Runs `ingest` on the workers of a Ray cluster. Report and data are the same.

    Args:
        num_workers: number of workers with one CPU each; auto: as many as the cluster has CPUs.
        options: further arguments of `ingest`.

    Raises: DataError: as `ingest`, or a node cannot access the source or the destination.
    """
    import ray

    if num_workers != "auto" and (not isinstance(num_workers, int) or num_workers < 1):
        raise DataError(f"num_workers={num_workers!r}: expected a number of tasks, 1 or more, or auto")
    connect()
    files_to_read = [] if is_s3(source) else [str(path) for path in islice(_files(Path(source)), 1)]
    probe_nodes(files_to_read, [str(destination)])
    count = max(1, int(ray.cluster_resources().get("CPU", 1))) if num_workers == "auto" else int(num_workers)
    return ingest(source, destination, run=ClusterMapper(count), **options)
