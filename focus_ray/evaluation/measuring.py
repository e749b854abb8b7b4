"""Evaluates a category in parts: any process can score a part, and no image counts twice.

A part is a range of consecutive rows. Its results go into a Parquet file that is named after the part and written in a single
step, so a part that is scored again replaces its file. The scores and pixel bins of each part are added once to the
category's progress, from which the metrics are computed.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from focus_ray.bundle.bundle import read_manifest
from focus_ray.bundle.inspector import Inspector
from focus_ray.data.read import TEST_COLUMNS, index_version, read_index, read_rows
from focus_ray.data.store import open_store
from focus_ray.errors import DataError
from focus_ray.metrics.evaluate import (
    EXACT_PIXELS,
    MAX_SIDE_PX,
    EvaluationCollector,
    EvaluationPart,
    LabelledImages,
    evaluation_size,
)
from focus_ray.metrics.pixels import PixelBins
from focus_ray.storage.files import exists, join, read_bytes, remove_file, remove_folder, write_bytes

PART_IMAGES = 512  # approximate number of images in a part
IMAGES, CATEGORIES = "images", "categories"  # folders of a report: results of images, results of categories
IMAGE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("label", pa.int8()),
        ("defect_type", pa.string()),
        ("score", pa.float64()),
        ("p_value", pa.float64()),
        ("anomalous", pa.bool_()),
        ("trained_on", pa.bool_()),
        ("threshold", pa.float64()),
        ("bundle", pa.string()),
    ]
)

Rows = NDArray[np.int64]
_LOG = logging.getLogger(__name__)


class _Record(BaseModel):
    """A category's file: identity of the job, metrics, and section of the page."""

    identity: dict[str, Any]
    result: dict[str, Any]
    section: dict[str, Any]


@dataclass(frozen=True)
class EvaluationJob:
    """The evaluation of a category. The object is small, because every part is sent to a worker with it.

    Attributes:
        bundle: URI of the bundle.
        version: hash of the bundle's manifest.
        data: URI of the data set.
        commit: version of the category in the data set.
        num_images: number of test images.
        exact: whether all maps are stored in memory, so that the same process measures all parts.
        max_side_px: longest side at which maps and masks are compared.
        part_images: approximate number of images in a part.
        output: folder of the report.
    """

    category: str
    bundle: str
    version: str
    data: str
    commit: str
    num_images: int
    exact: bool
    max_side_px: int
    part_images: int
    output: str

    @property
    def images(self) -> str:
        """Folder of the results of images."""
        return join(self.output, IMAGES, f"category={self.category}")

    @property
    def record(self) -> str:
        """File of the category's metrics and its section of the page."""
        return join(self.output, CATEGORIES, f"{self.category}.json")

    @property
    def state(self) -> str:
        """File of the progress: pixel bins, and the list of measured parts."""
        return join(self.output, CATEGORIES, f"{self.category}.bins.parquet")

    def identity(self) -> dict[str, Any]:
        """Returns the properties that must be equal for a later run to continue from this job's files."""
        names = ("version", "data", "commit", "num_images", "exact", "max_side_px", "part_images")
        return {name: getattr(self, name) for name in names}

    def part_file(self, first: int, count: int) -> str:
        """Returns the file of a part's results. first: number of its first image; count: number of its images."""
        return join(self.images, f"part-{first:09d}-{first + count:09d}.parquet")


@dataclass(frozen=True)
class EvaluationPlan:
    """A job and its parts. parts: number of a part's first image among the test images -> rows of the data set."""

    job: EvaluationJob
    parts: dict[int, Rows]


def plan_evaluation(
    category: str,
    bundle: str,
    output: str,
    data: str | None = None,
    max_side_px: int = MAX_SIDE_PX,
    exact_pixels: int = EXACT_PIXELS,
    part_images: int = PART_IMAGES,
) -> EvaluationPlan:
    """Plans the evaluation of a category from its index and the bundle's manifest.

    Args:
        bundle: URI of the bundle.
        output: folder of the report.
        data: URI of the data set; None: the data set that the bundle was trained with.
        max_side_px: longest side at which maps and masks are compared.
        exact_pixels: maps are stored in memory if they have at most this many pixels together, otherwise counted in bins.
        part_images: approximate number of images in a part.

    Raises:
        BundleError: there is no bundle.
        DataError: the data set or category does not exist or has no test image.
    """
    manifest = read_manifest(bundle)
    uri = data or str(manifest["config"]["data"]["uri"])
    index = read_index(uri, category, split="test")
    if not index.num_rows:
        raise DataError("there is no test image to evaluate: ingest a set that has some")
    rows = index["row"].to_numpy()
    sizes = np.stack([index["height"].to_numpy(), index["width"].to_numpy()], axis=1)
    distinct_sizes, counts = np.unique(sizes, axis=0, return_counts=True)
    map_sizes = (evaluation_size(height, width, max_side_px) for height, width in distinct_sizes.tolist())
    areas = [height * width for height, width in map_sizes]
    job = EvaluationJob(
        category=category,
        bundle=bundle,
        version=str(manifest["sha256"]),
        data=uri,
        commit=index_version(index),
        num_images=len(rows),
        exact=int(np.dot(areas, counts)) <= exact_pixels,
        max_side_px=max_side_px,
        part_images=part_images,
        output=output,
    )
    return EvaluationPlan(job, split_rows(uri, category, rows, part_images, index_version(index)))


def split_rows(uri: str, category: str, rows: Rows, size: int, version: str | None = None) -> dict[int, Rows]:
    """Splits rows of a category into consecutive parts, preferably between row groups, so that a row group is read once.

    Args:
        rows: ascending row numbers of the category.
        size: approximate number of rows in a part.
        version: version of the category that the row numbers belong to; None: the current version.

    Returns: index of a part's first row in `rows` -> the rows of the part.

    Raises: DataError: the category does not exist.
    """
    files = open_store(uri).require_commit(category, version)["files"]
    ends = np.cumsum([count for entry in files for count in entry["row_group_rows"]])
    group_ends = np.searchsorted(rows, ends)  # as indices into `rows`
    equal_cuts = np.arange(size, len(rows), size)
    # each cut moves to the nearest end of a row group, unless this end is more than half a part away
    nearest = (
        group_ends[np.abs(group_ends[None] - equal_cuts[:, None]).argmin(axis=1)] if len(group_ends) else equal_cuts
    )
    cuts = np.where(np.abs(nearest - equal_cuts) <= size // 2, nearest, equal_cuts)
    bounds = np.unique(np.concatenate([[0], cuts, [len(rows)]])).tolist()
    return {first: rows[first:last] for first, last in itertools.pairwise(bounds)}


def measure_plan(
    inspector: Inspector, plan: EvaluationPlan, on_image: Callable[[], None] = lambda: None
) -> LabelledImages:
    """Measures all parts of a job whose maps are stored in memory.

    Args:
        on_image: called after each image.

    Raises: DataError: see `measure_part`.
    """
    gathered = EvaluationCollector(sys.maxsize)
    for first, rows in plan.parts.items():
        _score(inspector, plan.job, first, rows, gathered, on_image)
    ids = TestIds(plan.job)
    return gathered.labelled(float(inspector.bundle.calibration.image_threshold), ids)


def measure_part(
    inspector: Inspector, job: EvaluationJob, first: int, rows: Rows, on_image: Callable[[], None] = lambda: None
) -> EvaluationPart:
    """Measures a part of a job whose pixels are counted in bins.

    Args:
        first: number of the part's first image among the test images.
        rows: rows of the data set.
        on_image: called after each image.

    Raises: DataError: an image cannot be decoded, the bundle was replaced, or the version of the images was deleted.
    """
    gathered = EvaluationCollector(0)
    _score(inspector, job, first, rows, gathered, on_image)
    return gathered.part()


def _score(
    inspector: Inspector,
    job: EvaluationJob,
    first: int,
    rows: Rows,
    into: EvaluationCollector,
    on_image: Callable[[], None],
) -> None:
    """Scores a part's images, adds them to `into`, and writes the Parquet file of the part."""
    if inspector.bundle.version != job.version:
        raise DataError(f"{job.bundle}: the bundle was replaced after the evaluation began: evaluate it again")
    records = read_rows(job.data, job.category, rows, columns=TEST_COLUMNS, version=job.commit)
    scored = []
    for record, score in inspector.gather(records, into, job.max_side_px):
        scored.append((record, score))
        on_image()
    calibration = inspector.bundle.calibration
    scores = np.array([score for _, score in scored], dtype=np.float64)
    table = pa.table(
        {
            **{name: [record[name] for record, _ in scored] for name in ("id", "label", "defect_type", "trained_on")},
            "score": scores,
            "p_value": calibration.conformal_p_value(scores),
            "anomalous": calibration.is_anomalous(scores),
            "threshold": np.full(len(scores), calibration.image_threshold),
            "bundle": [job.version] * len(scores),
        },
        schema=IMAGE_SCHEMA,
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(job.part_file(first, len(rows)), sink.getvalue().to_pybytes())


class TestIds(Sequence[str]):
    """Sequence of the ids of a category's test images. The ids are read at first use and stay in an Arrow array."""

    __test__ = False  # pytest would collect the class because of its name

    def __init__(self, job: EvaluationJob) -> None:
        self._job = job
        self._ids: pa.ChunkedArray | None = None

    @property
    def packed(self) -> pa.ChunkedArray:
        """All ids as an Arrow array."""
        if self._ids is None:
            job = self._job
            self._ids = read_index(job.data, job.category, split="test", version=job.commit)["id"]
        return self._ids

    def __len__(self) -> int:
        return len(self.packed)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        value = self.packed[index]
        return value.to_pylist() if isinstance(index, slice) else str(value.as_py())


@dataclass
class EvaluationProgress:
    """The measured parts of a job.

    Attributes:
        scores: number of a part's first image -> the part without its bins.
        bins: defect type ("" for good images) -> the bins of all parts together.
    """

    job: EvaluationJob
    scores: dict[int, EvaluationPart] = field(default_factory=dict)
    bins: dict[str, PixelBins] = field(default_factory=dict)

    def add(self, first: int, part: EvaluationPart) -> None:
        """Adds a part. A part that was added before changes nothing, because two workers may have measured it."""
        if first in self.scores:
            return
        for group, bins in part.bins.items():
            self.bins[group] = self.bins[group] + bins if group in self.bins else bins
        types = tuple(map(sys.intern, part.types))  # interned: few different names, many images
        self.scores[first] = replace(part, types=types, bins={})

    @property
    def num_images(self) -> int:
        """Number of images in the measured parts."""
        return sum(len(part.labels) for part in self.scores.values())

    def total(self) -> EvaluationPart:
        """Returns a part with the images of all measured parts, in the order of the images."""
        parts = [self.scores[first] for first in sorted(self.scores)]
        return EvaluationPart(
            labels=np.concatenate([part.labels for part in parts]),
            scores=np.concatenate([part.scores for part in parts]),
            types=tuple(defect_type for part in parts for defect_type in part.types),
            bins=self.bins,
            reduced=any(part.reduced for part in parts),
            trained_on=np.concatenate([part.trained_on for part in parts]),
            num_repeats=sum(part.num_repeats for part in parts),
        )

    def save(self) -> None:
        """Writes the bins and the list of measured parts to the job's state file. The scores are in the files of the parts.

        Raises: DataError: the file cannot be written.
        """
        arrays = {name: [getattr(bins, name) for bins in self.bins.values()] for name in _COLUMNS}
        counts = [bins.keys.size for bins in self.bins.values()]
        groups = pa.array(np.repeat(np.arange(len(counts), dtype=np.int32), counts))
        columns = {name: np.concatenate(parts) if parts else np.empty(0, np.int64) for name, parts in arrays.items()}
        facts = {
            "identity": self.job.identity(),
            "parts": {str(first): len(part.labels) for first, part in self.scores.items()},
            "groups": [[group, bins.num_regions, bins.num_images] for group, bins in self.bins.items()],
            "reduced": any(part.reduced for part in self.scores.values()),
            "repeats": {str(first): part.num_repeats for first, part in self.scores.items()},
        }
        table = pa.table({"group": groups, **columns}).replace_schema_metadata({_FACTS: json.dumps(facts)})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        write_bytes(self.job.state, sink.getvalue().to_pybytes())


_COLUMNS = ("keys", "normal", "anomalous", "overlap")
_FACTS = b"focus_ray.measured"


def load_progress(job: EvaluationJob) -> EvaluationProgress | None:
    """Loads the progress that an earlier run of the same job saved; None if there is none.

    Raises: DataError: the state file or the file of a part is damaged or missing.
    """
    if not exists(job.state):
        return None
    try:
        table = pq.read_table(pa.BufferReader(read_bytes(job.state)))
        facts = json.loads((table.schema.metadata or {})[_FACTS])
        if facts["identity"] != job.identity():
            return None
        progress = EvaluationProgress(job)
        group_of = table["group"].to_numpy()
        for number, (group, num_regions, num_images) in enumerate(facts["groups"]):
            rows = group_of == number
            keys, normal, anomalous, overlap = (table[name].to_numpy()[rows] for name in _COLUMNS)
            progress.bins[group] = PixelBins(keys, normal, anomalous, overlap, num_regions, num_images)
        for first, count in facts["parts"].items():
            part = pq.read_table(pa.BufferReader(read_bytes(job.part_file(int(first), count))))
            labels, scores = part["label"].to_numpy(), part["score"].to_numpy()
            types = tuple(map(sys.intern, part["defect_type"].to_pylist()))
            trained_on = part["trained_on"].to_numpy(zero_copy_only=False)
            progress.scores[int(first)] = EvaluationPart(
                labels, scores, types, {}, facts["reduced"], trained_on, facts.get("repeats", {}).get(first, 0)
            )
    except (pa.ArrowException, KeyError, ValueError, FileNotFoundError) as error:
        raise DataError(
            f"{job.state}: the file is damaged, or results of images are missing ({error}): start again without --resume"
        ) from error
    return progress


def read_record(job: EvaluationJob) -> dict[str, Any] | None:
    """Reads the record that an earlier run of the same job wrote with `write_record`; None if there is none.

    A damaged record is logged and ignored: the category is then measured again.
    """
    if not exists(job.record):
        return None
    try:
        record = _Record.model_validate_json(read_bytes(job.record))
    except ValidationError as error:
        _LOG.warning("%s: the record is damaged, so %s is measured again: %s", job.record, job.category, error)
        return None
    return record.model_dump() if record.identity == job.identity() else None


def write_record(job: EvaluationJob, **facts: Any) -> None:
    """Writes the results of a category, for the page and for a resumed run. facts: result and section, in JSON types."""
    content = {"identity": job.identity(), **facts}
    write_bytes(job.record, (json.dumps(content, ensure_ascii=False) + "\n").encode())


def join_parts(job: EvaluationJob, total: EvaluationPart, threshold: float) -> LabelledImages:
    """Returns the images of a job, ready for metrics.

    Args:
        total: all parts of the job as a single part (`EvaluationProgress.total`).
        threshold: threshold of the image score.
    """
    return total.labelled(threshold, TestIds(job))


def discard_progress(job: EvaluationJob) -> None:
    """Deletes the files that an earlier run of a job wrote."""
    for file in (job.state, job.record):
        remove_file(file)
    remove_folder(job.images)
