"""Batch inspection: inspects the images of a data set with bundles, and writes the results as Parquet files.

A part is a range of consecutive images of a category, a work item the work of one worker call (`evaluation.work_items`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from focus_ray.bundle.bundle import read_manifest
from focus_ray.bundle.inspector import Inspector
from focus_ray.cluster.settings import DEFAULT_CLUSTER, ClusterConfig, check_settings_have_effect
from focus_ray.data.prefetch import prefetch_items
from focus_ray.data.read import data_version, index_version, list_categories, read_index, read_rows
from focus_ray.data.schema import COMMIT_NAME, Row
from focus_ray.errors import DataError
from focus_ray.evaluation.work_items import (
    PART_IMAGES,
    SCORING_SETTINGS,
    Rows,
    ScoringJob,
    ScoringRun,
    WorkItem,
    load_inspector,
    open_worker_pool,
)
from focus_ray.storage.files import (
    join_path,
    list_folder_entries,
    make_absolute_path,
    read_bytes,
    remove_file,
    remove_folder,
    write_bytes,
)

# files in the result folder of a category; Parquet readers ignore names that begin with _
UNFINISHED = "_unfinished"  # exists until all results are written; contains the attributes that identify the job
COMPLETE = "_complete.json"  # the identity of the job and the counts; a later run of the same job reuses them
RESULT_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("label", pa.int8()),
        ("defect_type", pa.string()),
        ("site", pa.string()),
        ("score", pa.float64()),
        ("p_value", pa.float64()),
        ("anomalous", pa.bool_()),
        ("threshold", pa.float64()),
        ("regions", pa.string()),  # JSON
        ("error", pa.string()),  # empty without an error
        ("bundle", pa.string()),
    ]
)
_COPIED_COLUMNS = ("id", "label", "defect_type", "site")


@dataclass(frozen=True)
class BatchInspectionJob(ScoringJob):
    """The batch inspection of one category.

    Attributes:
        split: inspected images of the data set: train or test; None: both.
        batch_size: number of images that a worker reads and scores at a time.
    """

    IDENTITY = ("version", "data", "commit", "split", "part_images")

    split: str | None
    batch_size: int

    @property
    def marker_path(self) -> str:
        """Path of a marker file, which exists in the result folder until the results of the category are complete."""
        return join_path(self.folder, UNFINISHED)

    def encode_marker(self) -> bytes:
        """Returns the content of the marker file: the attributes that `IDENTITY` names, as a line of JSON."""
        return (json.dumps(self.get_identity()) + "\n").encode()

    def write_complete_file(self, counts: Counter[str]) -> None:
        """Writes the file `COMPLETE`, with the counts of the category. Raises: DataError: it cannot be written."""
        write_bytes(
            join_path(self.folder, COMPLETE), json.dumps({"job": self.get_identity(), "counts": counts}).encode()
        )

    def read_complete_counts(self) -> Counter[str] | None:
        """Returns the counts of the category if its complete results are from an equal job; otherwise None.

        Results of versions of focus_ray without the file `COMPLETE` also give None.

        Raises: DataError: the file cannot be read.
        """
        try:
            record = json.loads(read_bytes(join_path(self.folder, COMPLETE)))
        except FileNotFoundError:
            return None
        return Counter(record["counts"]) if record["job"] == self.get_identity() else None


BatchInspectionItem = WorkItem[BatchInspectionJob]


def count_results(table: pa.Table) -> Counter[str]:
    """Counts images, anomalous images and errors in a table of results with the columns anomalous and error.

    Returns: a counter with the keys num_images, num_anomalous and num_errors.
    """
    anomalous, errors = pc.sum(table["anomalous"]).as_py(), pc.sum(pc.not_equal(table["error"], "")).as_py()
    return Counter(num_images=table.num_rows, num_anomalous=int(anomalous or 0), num_errors=int(errors or 0))


def inspect_records(inspector: Inspector, records: Sequence[Row]) -> pa.Table:
    """Inspects the images of data set rows, and returns a table of `RESULT_SCHEMA` with a row for each image.

    If an image cannot be inspected, its row has the reason in `error`, and its score and p-value are NaN.

    Args: records: rows of a data set with id, label, defect_type, site and image (bytes of the file).
    """
    results = [
        {"error": str(result)} if isinstance(result, DataError) else result.to_dict()
        for result in inspector.inspect_or_return_errors([record["image"] for record in records])
    ]
    threshold, version = float(inspector.bundle.calibration.image_threshold), inspector.bundle.version
    rows = [
        {
            **{name: record[name] for name in _COPIED_COLUMNS},
            "score": result.get("score", float("nan")),
            "p_value": result.get("p_value", float("nan")),
            "anomalous": bool(result.get("anomalous", False)),
            "threshold": threshold,
            "regions": json.dumps(result.get("regions", [])),
            "error": result.get("error", ""),
            "bundle": version,
        }
        for record, result in zip(records, results, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)


def inspect_work_item(item: BatchInspectionItem, on_image: Callable[[], None] = lambda: None) -> Counter[str]:
    """Inspects the images of a work item, which is a range of consecutive images, and writes their result file.

    A repeated call writes the same file again.

    Args: on_image: is called after each inspected image.

    Returns: the counts of `count_results`.

    Raises:
        BundleError: the bundle is missing or damaged.
        DataError: the bundle was replaced, the version of the images was deleted, a file of the data set is damaged, or the
            result file cannot be written.
    """
    job = item.job
    inspector = load_inspector(job.bundle, job.version)
    ((first, rows),) = item.parts.items()
    columns = (*_COPIED_COLUMNS, "image")
    records = prefetch_items(
        read_rows(job.data, job.category, rows, columns=columns, version=job.commit), job.batch_size
    )
    tables = []
    while batch := list(islice(records, job.batch_size)):
        tables.append(inspect_records(inspector, batch))
        for _ in batch:
            on_image()
    table = pa.concat_tables(tables)
    job.write_part(first, table)
    return count_results(table)


class BatchInspection(ScoringRun[BatchInspectionJob]):
    """State of a batch inspection of many categories.

    Attributes:
        counts: category -> counts of its inspected images (see `count_results`).
    """

    def __init__(
        self,
        bundles: Mapping[str, str],
        uri: str,
        output: str,
        split: str | None,
        batch_size: int,
        part_images: int,
        log: Callable[[str], None],
    ) -> None:
        """Prepares a batch inspection; see `inspect_dataset` for the arguments. Local paths must be absolute."""
        super().__init__(bundles, log)
        self.uri, self.output, self.split = uri, output, split
        self.batch_size, self.part_images = batch_size, part_images
        self.counts: dict[str, Counter[str]] = {}

    def reuse_complete_results(self, category: str) -> bool:
        """Returns whether an earlier run of the same job completed the results of a category; stores and logs their counts.

        Raises:
            BundleError: the bundle is missing or damaged.
            DataError: the results are complete, but from another job; or the storage cannot be read.
        """
        folder = join_path(self.output, f"category={category}")
        names = list_folder_entries(folder)
        if not names or UNFINISHED in names:
            return False
        job = self._make_job(category, data_version(self.uri, category))
        counts = job.read_complete_counts()
        if counts is None:
            raise DataError(
                f"{folder} holds complete results of another bundle, data set version or setting: give another output folder, "
                "remove this folder, or inspect only the other categories"
            )
        self.counts[category] = counts
        self.log(f"{category}: complete from an earlier run, {_format_counts(counts)}")
        return True

    def _make_job(self, category: str, commit: str) -> BatchInspectionJob:
        """Returns the job of a category. commit: version of the category in the data set.

        Raises: BundleError: the bundle is missing or damaged.
        """
        return BatchInspectionJob(
            category=category,
            bundle=self.bundles[category],
            version=str(read_manifest(self.bundles[category])["sha256"]),
            data=self.uri,
            commit=commit,
            part_images=self.part_images,
            folder=join_path(self.output, f"category={category}"),
            split=self.split,
            batch_size=self.batch_size,
        )

    def plan_work_items(self, category: str) -> list[BatchInspectionItem]:
        """Returns the work items (ranges of images) of a category that have no result file yet.

        Results of an unfinished run of the same job are reused; results of another unfinished run are deleted.

        Raises:
            BundleError: the bundle is missing or damaged.
            DataError: the images of the category cannot be read, or the output cannot be written.
        """
        index = read_index(self.uri, category, split=self.split)
        job = self._make_job(category, index_version(index))
        self.counts[category] = Counter(num_images=0, num_anomalous=0, num_errors=0)
        remaining_parts = self._prepare_parts(job, job.split_into_parts(index["row"].to_numpy()))
        if not remaining_parts:
            self._finish_category(job)
        return [BatchInspectionItem(job, {first: rows}) for first, rows in remaining_parts.items()]

    def _prepare_parts(self, job: BatchInspectionJob, parts: dict[int, Rows]) -> dict[int, Rows]:
        """Returns the parts (ranges of images) without a result file, and adds the counts of existing files to `counts`.

        Writes the marker file for a new run. Deletes the result folder of an unfinished run with other settings.

        Args: parts: number of a part's first image -> row numbers of the part.

        Raises: DataError: the output cannot be read or written.
        """
        existing_names = list_folder_entries(job.folder)
        if UNFINISHED in existing_names and read_bytes(job.marker_path) == job.encode_marker():
            remaining_parts = {}
            for first, rows in parts.items():
                file = job.get_part_path(first, len(rows))
                if file.rpartition("/")[2] in existing_names:
                    table = pq.read_table(pa.BufferReader(read_bytes(file)), columns=["anomalous", "error"])
                    self.counts[job.category].update(count_results(table))
                else:
                    remaining_parts[first] = rows
            num_finished = len(parts) - len(remaining_parts)
            self.log(f"{job.folder}: continuing an unfinished run, {num_finished} of {len(parts)} parts are complete")
            return remaining_parts
        if UNFINISHED in existing_names:
            self.log(f"{job.folder}: results of another unfinished run are removed")
            remove_folder(job.folder)
        write_bytes(job.marker_path, job.encode_marker())
        return parts

    def store_result(self, item: BatchInspectionItem, result: Counter[str]) -> None:
        """Adds the counts of a work item. After the last item of a category, marks its results as complete.

        Raises: DataError: a file cannot be written or deleted.
        """
        self.counts[item.job.category].update(result)
        if not self.num_open[item.job.category]:
            self._finish_category(item.job)

    def _finish_category(self, job: BatchInspectionJob) -> None:
        """Marks the results of a category as complete: writes `COMPLETE`, deletes the marker file, and logs the counts.

        Raises: DataError: a file cannot be written or deleted.
        """
        counts = self.counts[job.category]
        job.write_complete_file(counts)
        remove_file(job.marker_path)
        self.log(f"{job.category}: {_format_counts(counts)}")

    def mark_failed(self, category: str, reason: str) -> None:
        """Marks a category as failed and logs the reason."""
        super().mark_failed(category, reason)
        self.log(f"{category}: FAILED: {reason}")


def _format_counts(counts: Counter[str]) -> str:
    """Returns counts as text, such as "num_images 8, num_anomalous 4, num_errors 0"."""
    return ", ".join(f"{key} {value}" for key, value in counts.items())


def inspect_dataset(
    bundles: Mapping[str, str],
    uri: str,
    output: str,
    split: str | None = None,
    num_actors: int = 1,
    cluster: ClusterConfig = DEFAULT_CLUSTER,
    batch_size: int = 32,
    log: Callable[[str], None] = lambda message: None,
    part_images: int = PART_IMAGES,
) -> dict[str, dict[str, int]]:
    """Inspects every image of the bundles' categories in a data set, and writes <output>/category=<name>/*.parquet.

    The inspection runs in this process or on a Ray cluster, by the same rule as training (`runs_without_ray`).

    If a call was interrupted, a second call with the same arguments continues it. It keeps the results of categories that are
    complete. Complete results of another bundle, data set version, split or `part_images` are refused.

    Args:
        bundles: category -> address of its bundle.
        uri: address of the data set.
        split: train or test; None: both.
        num_actors: largest number of workers; each loads at most two bundles at a time.
        cluster: resources and nodes of the workers.
        batch_size: number of images that a worker reads and scores at a time.
        log: receives progress messages.
        part_images: approximate number of images of a result file.

    Returns: category -> counts with the keys num_images, num_anomalous and num_errors.

    Raises:
        DataError: the data set lacks a category, the output has complete results of another job, the storage cannot be used, or
            categories failed. After failures the message names each failed category with its reason, and the results of the
            other categories are complete.
        BundleError: the bundle of a category with complete results is missing or damaged.
        TrainingError: Ray cannot be used, the cluster has no room for a worker, or the workers do not start.
        ConfigError: a setting in `cluster` has no effect on a batch inspection.
    """
    check_settings_have_effect(cluster, SCORING_SETTINGS, "inspect-batch")
    bundles = {category: make_absolute_path(place) for category, place in bundles.items()}
    uri, output = make_absolute_path(uri), make_absolute_path(output)
    available = list_categories(uri)
    unknown = sorted(set(bundles) - set(available))
    if unknown:
        raise DataError(f"{uri} has no category {', '.join(unknown)}; it has {', '.join(available)}")
    batch = BatchInspection(bundles, uri, output, split, batch_size, part_images, log)
    batch.bundles = {
        category: place for category, place in bundles.items() if not batch.reuse_complete_results(category)
    }
    if batch.bundles:
        inputs = [join_path(uri, f"category={category}", COMMIT_NAME) for category in batch.bundles]
        batch.run(inspect_work_item, open_worker_pool(cluster, num_actors, inputs, output, log))
    if batch.failed:
        raise DataError(
            f"{len(batch.failed)} of {len(bundles)} categories failed; "
            + "; ".join(f"{category}: {reason}" for category, reason in sorted(batch.failed.items()))
            + ". Fix the cause, and run the same command again: finished results are kept"
        )
    return {category: dict(batch.counts[category]) for category in bundles}
