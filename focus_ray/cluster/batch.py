"""Batch inspection: a Parquet set through bundles into Parquet, by a pool of workers that serves all categories in turn."""

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
from focus_ray.bundle.measuring import PART_IMAGES, Rows, split_rows
from focus_ray.cluster.connect import connect
from focus_ray.cluster.pool import Failed, WorkerPool
from focus_ray.cluster.preflight import probe_nodes
from focus_ray.cluster.scoring import load_inspector, scoring_pool
from focus_ray.data.prefetch import prefetch
from focus_ray.data.read import index_version, list_categories, read_index, read_rows
from focus_ray.data.schema import Row
from focus_ray.errors import DataError, FocusRayError
from focus_ray.progress import Progress
from focus_ray.storage import join, list_names, make_absolute, read_bytes, remove_file, remove_folder, write_bytes

UNFINISHED = "_unfinished"  # in a folder of results until all of them are there; readers of Parquet pass it over
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
        ("error", pa.string()),  # empty where there is none
        ("bundle", pa.string()),
    ]
)
_GIVEN = ("id", "label", "defect_type", "site")


@dataclass(frozen=True)
class BatchJob:
    """A category to be inspected. version: of the bundle.  commit: of the images, their version.  place: of its results."""

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
        """What must be the same for a later run to go on from here."""
        names = ("version", "data", "commit", "split", "part_images")
        return (json.dumps({name: getattr(self, name) for name in names}) + "\n").encode()

    def part_name(self, first: int, count: int) -> str:
        return f"part-{first:09d}-{first + count:09d}.parquet"


@dataclass(frozen=True)
class BatchPiece:
    """A part of a job. first: the number of its first image, which names its file.  rows: of the data set."""

    job: BatchJob
    first: int
    rows: Rows


@dataclass
class Counts:
    """Of inspected images."""

    num_images: int = 0
    num_anomalous: int = 0
    num_errors: int = 0

    def add(self, other: Counts) -> None:
        self.num_images += other.num_images
        self.num_anomalous += other.num_anomalous
        self.num_errors += other.num_errors

    @staticmethod
    def of(table: pa.Table) -> Counts:
        """table: with columns anomalous and error."""
        anomalous, errors = pc.sum(table["anomalous"]).as_py(), pc.sum(pc.not_equal(table["error"], "")).as_py()
        return Counts(table.num_rows, int(anomalous or 0), int(errors or 0))


def findings(inspector: Inspector, records: Sequence[Row]) -> pa.Table:
    """Records with id, label, defect_type, site and image -> what is found, `RESULT_SCHEMA`.

    A row whose image cannot be inspected gets its reason in `error`, and no score.
    """
    found = [
        {"error": str(one)} if isinstance(one, DataError) else one.to_dict()
        for one in inspector.inspect_each([record["image"] for record in records])
    ]
    threshold, version = float(inspector.bundle.calibration.image_threshold), inspector.bundle.version
    rows = [
        {
            **{name: record[name] for name in _GIVEN},
            "score": one.get("score", float("nan")),
            "p_value": one.get("p_value", float("nan")),
            "anomalous": bool(one.get("anomalous", False)),
            "threshold": threshold,
            "regions": json.dumps(one.get("regions", [])),
            "error": one.get("error", ""),
            "bundle": version,
        }
        for record, one in zip(records, found, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)


def inspect_piece(piece: BatchPiece) -> Counts:
    """Inspects a part and writes its result file. A repeated call writes the same file again.

    Raises: DataError: the bundle was replaced, or the version of the images was deleted.
    """
    job = piece.job
    inspector = load_inspector(job.bundle, job.version)
    tables = []
    waiting: list[Row] = []
    records = read_rows(job.data, job.category, piece.rows, columns=(*_GIVEN, "image"), version=job.commit)
    for record in prefetch(records, job.batch_size):
        waiting.append(record)
        if len(waiting) == job.batch_size:
            tables.append(findings(inspector, waiting))
            waiting = []
    if waiting:
        tables.append(findings(inspector, waiting))
    table = pa.concat_tables(tables)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(join(job.place, job.part_name(piece.first, len(piece.rows))), sink.getvalue().to_pybytes())
    return Counts.of(table)


class Batch:
    """What is left to inspect, and what has been counted. Gives out pieces, and takes what comes of them."""

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
        self.counts: dict[str, Counts] = {}
        self.failed: dict[str, str] = {}
        self._left: dict[str, int] = {}  # category -> parts that are not done
        self._progress = Progress("inspecting", 0, log)
        self._planned = self._plan_all()

    def more(self) -> BatchPiece | None:
        return next(self._planned, None)

    def _plan_all(self) -> Iterator[BatchPiece]:
        """One category after the other, planned when its turn comes."""
        for category in self.bundles:
            try:
                yield from self._plan(category)
            except FocusRayError as error:  # of this category: the others are inspected all the same
                self._fail(category, str(error))

    def _plan(self, category: str) -> Iterator[BatchPiece]:
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
        self.counts[category] = Counts()
        self._progress.total += len(rows)
        todo = self._left_over(job, parts)
        self._left[category] = len(todo)
        if not todo:
            self._finish(job)
        for first, some in todo.items():
            if category in self.failed:
                return
            yield BatchPiece(job, first, some)

    def _left_over(self, job: BatchJob, parts: dict[int, Rows]) -> dict[int, Rows]:
        """The parts to be done; those that an unfinished run of the same has written are counted."""
        there = list_names(job.place)
        marker = join(job.place, UNFINISHED)
        if UNFINISHED in there and read_bytes(marker) == job.identity():
            done = {first for first, rows in parts.items() if job.part_name(first, len(rows)) in there}
            for first in done:
                data = read_bytes(join(job.place, job.part_name(first, len(parts[first]))))
                self._count(
                    job.category, Counts.of(pq.read_table(pa.BufferReader(data), columns=["anomalous", "error"]))
                )
            self.log(
                f"{job.place}: left unfinished by an earlier run: going on, {len(done)} of {len(parts)} parts are there"
            )
            return {first: rows for first, rows in parts.items() if first not in done}
        if UNFINISHED in there:
            self.log(f"{job.place}: left unfinished by an earlier run: begun anew")
            remove_folder(job.place)
        write_bytes(marker, job.identity())
        return parts

    def done(self, piece: BatchPiece, outcome: Any) -> None:
        """Takes what came of a piece."""
        category = piece.job.category
        if category in self.failed:
            return
        if isinstance(outcome, Failed):
            self._fail(category, outcome.reason)
            return
        self._count(category, outcome)
        self._left[category] -= 1
        if not self._left[category]:
            self._finish(piece.job)

    def _count(self, category: str, counts: Counts) -> None:
        self.counts[category].add(counts)
        self._progress.add(counts.num_images)

    def _finish(self, job: BatchJob) -> None:
        remove_file(join(job.place, UNFINISHED))
        told = ", ".join(f"{key} {value}" for key, value in vars(self.counts[job.category]).items())
        self.log(f"{job.category}: {told}")

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
    """Inspects every image of the bundles' categories; writes <output>/category=<name>/*.parquet, part by part.

    Args:
        bundles: category -> bundle.  split: train or test; None takes both.  num_actors: workers, each with a bundle or two.
        part_images: in a file of results, about.

    Returns: category -> num_images, num_anomalous, num_errors.

    Raises: DataError: the set lacks a category, the output holds a category's results already, or categories failed, each
        named with its reason; the results of the others are there.
    """
    bundles = {category: make_absolute(place) for category, place in bundles.items()}
    uri, output = make_absolute(uri), make_absolute(output)
    there = list_categories(uri)
    unknown = sorted(set(bundles) - set(there))
    if unknown:
        raise DataError(f"{uri} has no category {', '.join(unknown)}; it has {', '.join(there)}")
    for category in bundles:
        place = join(output, f"category={category}")
        names = list_names(place)
        if names and UNFINISHED not in names:
            raise DataError(f"{place} holds results already: give another output folder, or remove this one")
    private = connect()
    probe_nodes([], [output])
    batch = Batch(bundles, uri, output, split, batch_size, part_images, log)
    workers: WorkerPool[BatchPiece] = scoring_pool(num_actors, private, log)
    with workers as pool:
        for piece, outcome in pool.run(inspect_piece, batch.more):
            batch.done(piece, outcome)
    if batch.failed:
        raise DataError(
            f"{len(batch.failed)} of {len(bundles)} categories failed; "
            + "; ".join(f"{category}: {reason}" for category, reason in sorted(batch.failed.items()))
            + ". Mend the cause and run again: what is there stays"
        )
    return {category: dict(vars(batch.counts[category])) for category in bundles}
