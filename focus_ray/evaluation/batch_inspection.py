"""Batch inspection: a pool of workers inspects a data set with bundles and writes the results as Parquet files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from focus_ray.bundle.bundle import read_manifest
from focus_ray.bundle.inspector import Inspector
from focus_ray.cluster.connect import connect
from focus_ray.cluster.pool import Failed, WorkerPool
from focus_ray.cluster.preflight import probe_nodes
from focus_ray.data.prefetch import prefetch
from focus_ray.data.read import index_version, list_categories, read_index, read_rows
from focus_ray.data.schema import Row
from focus_ray.errors import DataError, FocusRayError
from focus_ray.evaluation.measuring import PART_IMAGES, Rows, split_rows
from focus_ray.evaluation.scoring_pool import load_inspector, scoring_pool
from focus_ray.progress import Progress
from focus_ray.storage.files import join, list_names, make_absolute, read_bytes, remove_file, remove_folder, write_bytes

UNFINISHED = (
    "_unfinished"  # marker file in a folder with incomplete results; Parquet readers ignore names that begin with _
)
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
class BatchJob:
    """The inspection of a category.

    Attributes:
        version: version of the bundle.
        commit: version of the data set.
        place: folder of the results.
        part_images: number of images of a result file.
    """

    category: str
    bundle: str
    version: str
    data: str
    commit: str
    split: str | None
    place: str
    part_images: int
    batch_size: int

    def identity(self) -> bytes:
        """Returns the settings that a later run must share to continue this job, as JSON."""
        names = ("version", "data", "commit", "split", "part_images")
        return (json.dumps({name: getattr(self, name) for name in names}) + "\n").encode()

    def part_name(self, first: int, count: int) -> str:
        """Returns the file name of the results of `count` images from number `first`."""
        return f"part-{first:09d}-{first + count:09d}.parquet"


@dataclass(frozen=True)
class BatchPiece:
    """A part of a job. first: number of the first image, part of the file name.  rows: row numbers in the data set."""

    job: BatchJob
    first: int
    rows: Rows


@dataclass
class InspectionCounts:
    """Counts of inspected images."""

    num_images: int = 0
    num_anomalous: int = 0
    num_errors: int = 0

    def add(self, other: InspectionCounts) -> None:
        """Adds other counts to these."""
        self.num_images += other.num_images
        self.num_anomalous += other.num_anomalous
        self.num_errors += other.num_errors

    @staticmethod
    def of(table: pa.Table) -> InspectionCounts:
        """Counts the rows of a table with the columns anomalous and error."""
        anomalous, errors = pc.sum(table["anomalous"]).as_py(), pc.sum(pc.not_equal(table["error"], "")).as_py()
        return InspectionCounts(table.num_rows, int(anomalous or 0), int(errors or 0))


def inspect_records(inspector: Inspector, records: Sequence[Row]) -> pa.Table:
    """Inspects records and returns the results as a table of `RESULT_SCHEMA`.

    If an image cannot be inspected, its row has the reason in `error` and no score.

    Args: records: must have id, label, defect_type, site and image.
    """
    results = [
        {"error": str(result)} if isinstance(result, DataError) else result.to_dict()
        for result in inspector.inspect_each([record["image"] for record in records])
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


def inspect_piece(piece: BatchPiece) -> InspectionCounts:
    """Inspects a part and writes its result file. A repeated call writes the same file again.

    Raises: DataError: the bundle was replaced, or the version of the images was deleted.
    """
    job = piece.job
    inspector = load_inspector(job.bundle, job.version)
    tables = []
    batch: list[Row] = []
    records = read_rows(job.data, job.category, piece.rows, columns=(*_COPIED_COLUMNS, "image"), version=job.commit)
    for record in prefetch(records, job.batch_size):
        batch.append(record)
        if len(batch) == job.batch_size:
            tables.append(inspect_records(inspector, batch))
            batch = []
    if batch:
        tables.append(inspect_records(inspector, batch))
    table = pa.concat_tables(tables)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(join(job.place, job.part_name(piece.first, len(piece.rows))), sink.getvalue().to_pybytes())
    return InspectionCounts.of(table)


class Batch:
    """State of a batch inspection: supplies the pieces of work and records their results.

    Attributes:
        counts: category -> counts of inspected images.
        failed: category -> reason.
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
        self.bundles, self.uri, self.output, self.split = bundles, uri, output, split
        self.batch_size, self.part_images, self.log = batch_size, part_images, log
        self.counts: dict[str, InspectionCounts] = {}
        self.failed: dict[str, str] = {}
        self._num_unfinished: dict[str, int] = {}  # category -> number of unfinished parts
        self._progress = Progress("inspecting", 0, log)
        self._pieces = self._plan_all()

    def next_piece(self) -> BatchPiece | None:
        """Returns the next piece of work; None if there is none left."""
        return next(self._pieces, None)

    def _plan_all(self) -> Iterator[BatchPiece]:
        """Yields the pieces of all categories. A category is planned when its turn comes."""
        for category in self.bundles:
            try:
                yield from self._plan(category)
            except FocusRayError as error:  # other categories are still inspected
                self._fail(category, str(error))

    def _plan(self, category: str) -> Iterator[BatchPiece]:
        """Yields the pieces of a category that have no result yet."""
        bundle = self.bundles[category]
        place = join(self.output, f"category={category}")
        version = str(read_manifest(bundle)["sha256"])
        index = read_index(self.uri, category, split=self.split)
        commit = index_version(index)
        job = BatchJob(
            category, bundle, version, self.uri, commit, self.split, place, self.part_images, self.batch_size
        )
        rows = index["row"].to_numpy()
        parts = split_rows(self.uri, category, rows, self.part_images, commit)
        self.counts[category] = InspectionCounts()
        self._progress.total += len(rows)
        remaining_parts = self._remaining_parts(job, parts)
        self._num_unfinished[category] = len(remaining_parts)
        if not remaining_parts:
            self._finish(job)
        for first, part_rows in remaining_parts.items():
            if category in self.failed:
                return
            yield BatchPiece(job, first, part_rows)

    def _remaining_parts(self, job: BatchJob, parts: dict[int, Rows]) -> dict[int, Rows]:
        """Returns the parts without results. Results of an unfinished run of the same job are reused and counted."""
        existing_names = list_names(job.place)
        marker = join(job.place, UNFINISHED)
        if UNFINISHED in existing_names and read_bytes(marker) == job.identity():
            finished = {first for first, rows in parts.items() if job.part_name(first, len(rows)) in existing_names}
            for first in finished:
                data = read_bytes(join(job.place, job.part_name(first, len(parts[first]))))
                self._count(
                    job.category,
                    InspectionCounts.of(pq.read_table(pa.BufferReader(data), columns=["anomalous", "error"])),
                )
            self.log(f"{job.place}: continuing an unfinished run, {len(finished)} of {len(parts)} parts are complete")
            return {first: rows for first, rows in parts.items() if first not in finished}
        if UNFINISHED in existing_names:
            self.log(f"{job.place}: results of another unfinished run are removed")
            remove_folder(job.place)
        write_bytes(marker, job.identity())
        return parts

    def record_result(self, piece: BatchPiece, outcome: Any) -> None:
        """Records the result of a piece."""
        category = piece.job.category
        if category in self.failed:
            return
        if isinstance(outcome, Failed):
            self._fail(category, outcome.reason)
            return
        self._count(category, outcome)
        self._num_unfinished[category] -= 1
        if not self._num_unfinished[category]:
            self._finish(piece.job)

    def _count(self, category: str, counts: InspectionCounts) -> None:
        self.counts[category].add(counts)
        self._progress.add(counts.num_images)

    def _finish(self, job: BatchJob) -> None:
        remove_file(join(job.place, UNFINISHED))
        summary = ", ".join(f"{key} {value}" for key, value in vars(self.counts[job.category]).items())
        self.log(f"{job.category}: {summary}")

    def _fail(self, category: str, reason: str) -> None:
        self.failed[category] = reason
        self.log(f"{category}: FAILED: {reason}")


def inspect_dataset(
    bundles: Mapping[str, str],
    uri: str,
    output: str,
    split: str | None = None,
    num_actors: int = 1,
    batch_size: int = 32,
    log: Callable[[str], None] = lambda message: None,
    part_images: int = PART_IMAGES,
) -> dict[str, dict[str, int]]:
    """Inspects every image of the categories of the bundles and writes <output>/category=<name>/*.parquet.

    Args:
        bundles: category -> bundle.
        uri: data set.
        split: train or test; None: both.
        num_actors: number of workers; each loads at most two bundles.
        part_images: approximate number of images of a result file.

    Returns: category -> num_images, num_anomalous, num_errors.

    Raises: DataError: the data set lacks a category, the output already holds results of a category, or categories failed. The
        message names each failed category with its reason. Results of the other categories are complete.
    """
    bundles = {category: make_absolute(place) for category, place in bundles.items()}
    uri, output = make_absolute(uri), make_absolute(output)
    available = list_categories(uri)
    unknown = sorted(set(bundles) - set(available))
    if unknown:
        raise DataError(f"{uri} has no category {', '.join(unknown)}; it has {', '.join(available)}")
    for category in bundles:
        place = join(output, f"category={category}")
        names = list_names(place)
        if names and UNFINISHED not in names:
            raise DataError(f"{place} holds results already: give another output folder, or remove this folder")
    private = connect()
    probe_nodes([], [output])
    batch = Batch(bundles, uri, output, split, batch_size, part_images, log)
    workers: WorkerPool[BatchPiece] = scoring_pool(num_actors, private, log)
    for piece, outcome in workers.run(inspect_piece, batch.next_piece):
        batch.record_result(piece, outcome)
    if batch.failed:
        raise DataError(
            f"{len(batch.failed)} of {len(bundles)} categories failed; "
            + "; ".join(f"{category}: {reason}" for category, reason in sorted(batch.failed.items()))
            + ". Fix the cause and run again: finished results are kept"
        )
    return {category: dict(vars(batch.counts[category])) for category in bundles}
