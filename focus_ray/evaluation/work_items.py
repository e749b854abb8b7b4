"""Scores the images of categories in work items, in this process or on workers; evaluation and batch inspection use it.

A part is a range of consecutive images of a category. Its results go into a Parquet file that is named after the part and
written in a single step, so a part that is scored again replaces its file, and no image counts twice. A work item is the work of
one worker call: it scores one or more parts, or computes the metrics of a category.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from focus_ray.bundle.inspector import Inspector
from focus_ray.cluster.capacity import ClusterCapacity, make_worker_options
from focus_ray.cluster.connect import connect_to_ray, runs_without_ray
from focus_ray.cluster.pool import FailedPiece, WorkerPool
from focus_ray.cluster.preflight import check_storage_on_nodes
from focus_ray.cluster.settings import MAX_FAILURES, ClusterConfig
from focus_ray.data.store import open_data_set
from focus_ray.errors import DataError, FocusRayError
from focus_ray.names import Log
from focus_ray.progress import ProgressPrinter
from focus_ray.storage.files import check_folder_access, join_path, write_bytes

# settings of ClusterConfig that evaluation and batch inspection use; the number of workers is an argument of their own
SCORING_SETTINGS = frozenset(ClusterConfig.model_fields) - {"num_workers", "min_workers", "max_concurrent_categories"}
PART_IMAGES = 512  # approximate number of images in a part
MAX_LOADED_BUNDLES = 2  # per process; the previous bundle is still needed for the pictures of its category

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class ScoringJob:
    """The task to score the images of one category with a bundle, as addresses and settings.

    The object has no images, because it is sent to a worker with every work item. A part is a range of consecutive images. A
    later run reuses the files of a job only if the attributes that `IDENTITY` names are equal.

    Attributes:
        bundle: URI of the bundle.
        version: hash of the bundle's manifest.
        data: URI of the data set.
        commit: version of the category in the data set.
        part_images: approximate number of images in a part.
        folder: folder of the result files of the parts.
    """

    IDENTITY: ClassVar[tuple[str, ...]]  # attributes that a later run must share to continue from this job's files

    category: str
    bundle: str
    version: str
    data: str
    commit: str
    part_images: int
    folder: str

    def get_identity(self) -> dict[str, Any]:
        """Returns name -> value of the attributes that must be equal for a later run to reuse the files of this job."""
        return {name: getattr(self, name) for name in self.IDENTITY}

    def get_part_path(self, first: int, count: int) -> str:
        """Returns the path of the Parquet file with the results of a part, which is a range of consecutive images.

        Args:
            first: position of the part's first image among the images of the job.
            count: number of images in the part.
        """
        return join_path(self.folder, f"part-{first:09d}-{first + count:09d}.parquet")

    def write_part(self, first: int, table: pa.Table) -> None:
        """Writes the results of a part (a range of consecutive images) to its Parquet file.

        Args:
            first: position of the part's first image.
            table: one row for each image of the part.

        Raises: DataError: the file cannot be written.
        """
        write_bytes(self.get_part_path(first, table.num_rows), encode_parquet(table))

    def split_into_parts(self, rows: Rows) -> dict[int, Rows]:
        """Splits row numbers into parts (ranges of about `part_images` rows), where possible at borders of Parquet row groups.

        A row group is the unit that a reader loads, so that most row groups are read by one worker only.

        Args: rows: ascending row numbers of the category.

        Returns: index in `rows` of a part's first row -> row numbers of the part.

        Raises: DataError: the data set, the category or its version `commit` does not exist.
        """
        files = open_data_set(self.data).require_commit(self.category, self.commit)["files"]
        ends = np.cumsum([count for entry in files for count in entry["row_group_rows"]])
        group_ends = np.searchsorted(rows, ends)  # as indices into `rows`
        equal_cuts = np.arange(self.part_images, len(rows), self.part_images)
        # each cut moves to the nearest end of a row group, unless this end is more than half a part away
        nearest = (
            group_ends[np.abs(group_ends[None] - equal_cuts[:, None]).argmin(axis=1)] if len(group_ends) else equal_cuts
        )
        cuts = np.where(np.abs(nearest - equal_cuts) <= self.part_images // 2, nearest, equal_cuts)
        bounds = np.unique(np.concatenate([[0], cuts, [len(rows)]])).tolist()
        return {first: rows[first:last] for first, last in itertools.pairwise(bounds)}


Job = TypeVar("Job", bound=ScoringJob)


@dataclass(frozen=True)
class WorkItem(Generic[Job]):
    """The work of one call of a worker: parts (ranges of consecutive images) to score, or the computation of the metrics.

    Attributes:
        job: the job (category and bundle) that the item belongs to.
        parts: position of a part's first image -> row numbers of the part; empty if the item only computes metrics.
        total: joined results of all parts of the job, from which the metrics are computed; None for a work item with parts.
    """

    job: Job
    parts: dict[int, Rows]
    total: Any = None

    @property
    def num_images(self) -> int:
        """Number of images that the work item scores."""
        return sum(len(rows) for rows in self.parts.values())


def encode_parquet(table: pa.Table) -> bytes:
    """Returns the bytes of a Parquet file with a table."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


@lru_cache(MAX_LOADED_BUNDLES)
def load_inspector(uri: str, version: str) -> Inspector:
    """Returns the inspector of a bundle. The process caches the last `MAX_LOADED_BUNDLES` inspectors.

    Args:
        uri: address of the bundle.
        version: expected SHA-256 of the manifest.

    Raises:
        BundleError: the bundle is missing or damaged.
        DataError: the bundle has another version, because it was replaced.
    """
    inspector = Inspector.load(uri)
    if inspector.bundle.version != version:
        raise DataError(f"{uri}: the bundle was replaced after the run began: run again")
    return inspector


class ScoringRun(Generic[Job]):
    """Base class of a run over many categories, which plans work items and collects their results.

    The failure of a category does not stop the other categories.

    Attributes:
        failed: category -> reason of its failure.
        num_open: category -> number of its planned items without a result.
        urgent: items that are started before the next planned item.
    """

    def __init__(self, bundles: Mapping[str, str], log: Log) -> None:
        """Prepares a run; nothing is planned or scored yet. bundles: category -> URI of its bundle."""
        self.bundles, self.log = bundles, log
        self.failed: dict[str, str] = {}
        self.num_open: dict[str, int] = {}
        self.urgent: deque[WorkItem[Job]] = deque()
        self.progress = ProgressPrinter("scoring", 0, log)
        self._planned = self._plan_categories()

    def plan_work_items(self, category: str) -> list[WorkItem[Job]]:
        """Returns the work items of a category that are not done yet. Every subclass implements this method.

        Raises: FocusRayError: the category cannot be scored.
        """
        raise NotImplementedError

    def store_result(self, item: WorkItem[Job], result: Any) -> None:
        """Stores the result of a work item. Every subclass implements this method.

        Args: result: value that the worker function returned.
        """
        raise NotImplementedError

    def mark_failed(self, category: str, reason: str) -> None:
        """Stores the reason why a category has failed in `failed`. Subclasses also log it."""
        self.failed[category] = reason

    def _plan_categories(self) -> Iterator[WorkItem[Job]]:
        """Generator: yields the work items of one category after the other; skips the remaining items of a failed category.

        A category is planned when its first item is needed, because the plan of a million images takes 8 MB. If planning raises
        a `FocusRayError`, the category is marked as failed.
        """
        for category in self.bundles:
            try:
                items = self.plan_work_items(category)
                self.num_open[category] = len(items)
                self.progress.total += sum(item.num_images for item in items)
                for item in items:
                    yield item
                    if category in self.failed:
                        break
            except FocusRayError as error:
                self.mark_failed(category, str(error))

    def take_next_item(self) -> WorkItem[Job] | None:
        """Returns the next work item to start; None if there is none now. The result of a running item may add an item later."""
        return self.urgent.popleft() if self.urgent else next(self._planned, None)

    def store_outcome(self, item: WorkItem[Job], outcome: Any) -> None:
        """Stores the result of a work item, or marks its category as failed. Ignores an item whose category has failed.

        Args: outcome: the result, or `FailedPiece`.
        """
        category = item.job.category
        if category in self.failed:
            return
        if isinstance(outcome, FailedPiece):
            self.mark_failed(category, outcome.reason)
        else:
            self.num_open[category] -= 1
            self.store_result(item, outcome)

    def run(self, function: Callable[..., Any], pool: WorkerPool[WorkItem[Job]] | None) -> None:
        """Calls a function for each work item and stores the results, until all categories are complete or failed.

        After a failure, no further item of the category is started.

        Args:
            function: receives a work item and returns its result. Without a pool it also receives a function `on_image`, which it
                calls after each image.
            pool: workers that call the function. None: this process calls it.

        Raises: TrainingError: too many starts of workers of the pool failed.
        """
        if pool is None:
            while (item := self.take_next_item()) is not None:
                try:
                    outcome = function(item, on_image=self.progress.add_finished)
                except FocusRayError as error:
                    outcome = FailedPiece(str(error))
                self.store_outcome(item, outcome)
            return
        for item, outcome in pool.run_pieces(function, self.take_next_item):
            self.progress.add_finished(item.num_images)
            self.store_outcome(item, outcome)


def open_worker_pool(
    cluster: ClusterConfig, num_workers: int | None, inputs: Sequence[str], output: str, log: Log
) -> WorkerPool[Any] | None:
    """Returns a pool of workers that score images, or None if the work runs in this process (`runs_without_ray`).

    For a pool, connects to a Ray cluster or starts Ray on this machine.

    Args:
        cluster: resources and nodes of the workers. Only the settings in `SCORING_SETTINGS` may differ from the defaults.
        num_workers: largest number of workers; there are fewer if the cluster has no room. None: as many as fit.
        inputs: paths or URIs of files that the nodes of workers must be able to read.
        output: folder that this process and the nodes of workers must be able to write to.

    Raises:
        TrainingError: Ray cannot be used or started, or the cluster has no room for a worker.
        DataError: this process or a node cannot use the storage.
    """
    if runs_without_ray(cluster.model_copy(update={"num_workers": num_workers or 1})):
        check_folder_access(output)
        return None
    is_private = connect_to_ray(namespace=cluster.ray_namespace)
    check_storage_on_nodes(inputs, [output], cluster.labels, log)
    capacity = ClusterCapacity(cluster, is_private, log, limit=num_workers)
    return WorkerPool(capacity, make_worker_options(cluster, capacity.use_gpu), MAX_FAILURES, log)
