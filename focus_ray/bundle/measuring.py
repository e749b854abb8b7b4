"""Measuring a category part by part: rows that lie together are scored together, by whichever process; nothing counts twice.

A part's images go into a Parquet file of their own, named by the part and written whole, so that a part which is scored
again replaces itself. What figures need of it, scores and pixels in bins, adds to the category's sum, once a part.
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
from focus_ray.evaluation.evaluate import (
    EXACT_PIXELS,
    MAX_SIDE_PX,
    EvaluationCollector,
    EvaluationPart,
    LabelledImages,
    evaluation_size,
    join_evaluation_parts,
)
from focus_ray.evaluation.pixels import PixelBins
from focus_ray.storage import exists, join, read_bytes, remove_file, remove_folder, write_bytes

PART_IMAGES = 512  # in a part, about
READ_AHEAD = 32  # encoded images that wait to be decoded
IMAGES, CATEGORIES = "images", "categories"  # folders of a report: image by image; what is known of each category
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
    """A category's figures, and its part of the page."""

    identity: dict[str, Any]
    result: dict[str, Any]
    section: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A category to be measured; small, for it goes with every part.

    version: of the bundle.  commit: of the images, their version.  num_images: to be scored.  exact: whether maps are kept,
    so that all parts are measured in one place.  output: the report's folder.
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
        """The folder of its images' results."""
        return join(self.output, IMAGES, f"category={self.category}")

    @property
    def record(self) -> str:
        """The file of its figures and its part of the page."""
        return join(self.output, CATEGORIES, f"{self.category}.json")

    @property
    def state(self) -> str:
        """The file of what has been measured so far."""
        return join(self.output, CATEGORIES, f"{self.category}.bins.parquet")

    def identity(self) -> dict[str, Any]:
        """What must be the same for a later run to go on from here."""
        names = ("version", "data", "commit", "num_images", "exact", "max_side_px", "part_images")
        return {name: getattr(self, name) for name in names}

    def part_file(self, first: int, count: int) -> str:
        return join(self.images, f"part-{first:09d}-{first + count:09d}.parquet")


@dataclass(frozen=True)
class Plan:
    """A job and its parts: the number of the first image, of the category's test images, -> rows of the data set."""

    job: Job
    parts: dict[int, Rows]


def plan_evaluation(
    category: str,
    bundle: str,
    output: str,
    data: str | None = None,
    max_side_px: int = MAX_SIDE_PX,
    exact_pixels: int = EXACT_PIXELS,
    part_images: int = PART_IMAGES,
) -> Plan:
    """Reads a category's index, and the bundle's manifest.

    Args:
        data: None for the data set that the bundle was trained from.  exact_pixels: of all maps, up to which they are kept.
        part_images: in a part, about.

    Raises: BundleError: no bundle.  DataError: no data set or category, or it has no test image.
    """
    manifest = read_manifest(bundle)
    uri = data or str(manifest["config"]["data"]["uri"])
    index = read_index(uri, category, split="test")
    if not index.num_rows:
        raise DataError("there is no test image to evaluate: ingest a set that has some")
    rows = index["row"].to_numpy()
    sizes = np.stack([index["height"].to_numpy(), index["width"].to_numpy()], axis=1)
    different, counts = np.unique(sizes, axis=0, return_counts=True)
    compared = (evaluation_size(height, width, max_side_px) for height, width in different.tolist())
    areas = [height * width for height, width in compared]
    job = Job(
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
    return Plan(job, cut_rows(uri, category, rows, part_images, index_version(index)))


def cut_rows(uri: str, category: str, rows: Rows, size: int, version: str | None = None) -> dict[int, Rows]:
    """Parts of about `size` rows each, which lie together, so that of a file each row group is read once.

    Args:
        rows: of the category, ascending.  version: of the category, that they are of; None for the current one.

    Returns: number of a part's first row among `rows` -> its rows.  Raises: DataError: no such category.
    """
    files = open_store(uri).require_commit(category, version)["files"]
    ends = np.cumsum([count for entry in files for count in entry["row_group_rows"]])
    groups = np.searchsorted(rows, ends)
    wanted = np.arange(size, len(rows), size)
    near = groups[np.abs(groups[None] - wanted[:, None]).argmin(axis=1)] if len(groups) else wanted
    cuts = np.where(np.abs(near - wanted) <= size // 2, near, wanted)
    bounds = np.unique(np.concatenate([[0], cuts, [len(rows)]])).tolist()
    return {first: rows[first:last] for first, last in itertools.pairwise(bounds)}


def measure_whole(inspector: Inspector, plan: Plan, tell: Callable[[], None] = lambda: None) -> LabelledImages:
    """All parts of a job whose maps are kept. tell: called an image.  Raises: as `measure_part`."""
    gathered = EvaluationCollector(sys.maxsize)
    for first, rows in plan.parts.items():
        _score(inspector, plan.job, first, rows, gathered, tell)
    ids = TestIds(plan.job)
    return gathered.labelled(float(inspector.bundle.calibration.image_threshold), ids)


def measure_part(
    inspector: Inspector, job: Job, first: int, rows: Rows, tell: Callable[[], None] = lambda: None
) -> EvaluationPart:
    """One part of a job whose pixels go into bins. tell: called an image.

    Raises: DataError: an image cannot be decoded; the bundle was replaced, or the images' version is gone.
    """
    gathered = EvaluationCollector(0)
    _score(inspector, job, first, rows, gathered, tell)
    return gathered.part()


def _score(
    inspector: Inspector, job: Job, first: int, rows: Rows, into: EvaluationCollector, tell: Callable[[], None]
) -> None:
    """Adds a part to what was gathered, and writes its images' results."""
    if inspector.bundle.version != job.version:
        raise DataError(f"{job.bundle}: replaced since the evaluation began: evaluate it again")
    records = read_rows(job.data, job.category, rows, columns=TEST_COLUMNS, version=job.commit)
    found = []
    for record, score in inspector.gather(records, into, job.max_side_px):
        found.append((record, score))
        tell()
    calibration = inspector.bundle.calibration
    scores = np.array([score for _, score in found], dtype=np.float64)
    table = pa.table(
        {
            **{name: [record[name] for record, _ in found] for name in ("id", "label", "defect_type", "trained_on")},
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
    """Ids of a category's test images, in order; read when first asked for, and packed."""

    __test__ = False  # no test, for pytest

    def __init__(self, job: Job) -> None:
        self._job = job
        self._ids: pa.ChunkedArray | None = None

    @property
    def packed(self) -> pa.ChunkedArray:
        if self._ids is None:
            job = self._job
            self._ids = read_index(job.data, job.category, split="test", version=job.commit)["id"]
        return self._ids

    def __len__(self) -> int:
        return len(self.packed)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        found = self.packed[place]
        return found.to_pylist() if isinstance(place, slice) else str(found.as_py())


@dataclass
class Sum:
    """What is known of a job, part by part: scores of each, and the bins of all.

    scores: number of a part's first image -> the part without its bins.
    """

    job: Job
    scores: dict[int, EvaluationPart] = field(default_factory=dict)
    bins: dict[str, PixelBins] = field(default_factory=dict)

    def add(self, first: int, part: EvaluationPart) -> None:
        """Counts a part, once: one that is there already changes nothing."""
        if first in self.scores:
            return
        for group, bins in part.bins.items():
            self.bins[group] = self.bins[group] + bins if group in self.bins else bins
        types = tuple(map(sys.intern, part.types))
        self.scores[first] = replace(part, types=types, bins={})

    @property
    def num_images(self) -> int:
        return sum(len(part.labels) for part in self.scores.values())

    def total(self) -> EvaluationPart:
        """All parts as one, in the images' order."""
        parts = [self.scores[first] for first in sorted(self.scores)]
        return EvaluationPart(
            labels=np.concatenate([part.labels for part in parts]),
            scores=np.concatenate([part.scores for part in parts]),
            types=tuple(kind for part in parts for kind in part.types),
            bins=self.bins,
            reduced=any(part.reduced for part in parts),
            trained_on=np.concatenate([part.trained_on for part in parts]),
            num_repeats=sum(part.num_repeats for part in parts),
        )

    def save(self) -> None:
        """Writes bins, and which parts are in them; the scores lie in the parts' own files. Raises: DataError."""
        columns = {name: [getattr(bins, name) for bins in self.bins.values()] for name in _COLUMNS}
        counts = [bins.keys.size for bins in self.bins.values()]
        groups = pa.array(np.repeat(np.arange(len(counts), dtype=np.int32), counts))
        arrays = {name: np.concatenate(parts) if parts else np.empty(0, np.int64) for name, parts in columns.items()}
        facts = {
            "identity": self.job.identity(),
            "parts": {str(first): len(part.labels) for first, part in self.scores.items()},
            "groups": [[group, bins.num_regions, bins.num_images] for group, bins in self.bins.items()],
            "reduced": any(part.reduced for part in self.scores.values()),
            "repeats": {str(first): part.num_repeats for first, part in self.scores.items()},
        }
        table = pa.table({"group": groups, **arrays}).replace_schema_metadata({_FACTS: json.dumps(facts)})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        write_bytes(self.job.state, sink.getvalue().to_pybytes())


_COLUMNS = ("keys", "normal", "anomalous", "overlap")
_FACTS = b"focus_ray.measured"


def load_sum(job: Job) -> Sum | None:
    """What an earlier run of the same job has saved; None where there is none. Raises: DataError: it cannot be read."""
    if not exists(job.state):
        return None
    try:
        table = pq.read_table(pa.BufferReader(read_bytes(job.state)))
        facts = json.loads((table.schema.metadata or {})[_FACTS])
        if facts["identity"] != job.identity():
            return None
        found = Sum(job)
        group_of = table["group"].to_numpy()
        for number, (group, num_regions, num_images) in enumerate(facts["groups"]):
            rows = group_of == number
            keys, normal, anomalous, overlap = (table[name].to_numpy()[rows] for name in _COLUMNS)
            found.bins[group] = PixelBins(keys, normal, anomalous, overlap, num_regions, num_images)
        for first, count in facts["parts"].items():
            part = pq.read_table(pa.BufferReader(read_bytes(job.part_file(int(first), count))))
            labels, scores = part["label"].to_numpy(), part["score"].to_numpy()
            types = tuple(map(sys.intern, part["defect_type"].to_pylist()))
            trained_on = part["trained_on"].to_numpy(zero_copy_only=False)
            found.scores[int(first)] = EvaluationPart(
                labels, scores, types, {}, facts["reduced"], trained_on, facts.get("repeats", {}).get(first, 0)
            )
    except (pa.ArrowException, KeyError, ValueError, FileNotFoundError) as error:
        raise DataError(
            f"{job.state}: damaged, or the images' results are gone ({error}): begin without --resume"
        ) from error
    return found


def read_record(job: Job) -> dict[str, Any] | None:
    """What an earlier run of the same job has found, as `write_record` was given it; None where it has not.

    A damaged record is logged and counts as none: the category is then measured again.
    """
    if not exists(job.record):
        return None
    try:
        record = _Record.model_validate_json(read_bytes(job.record))
    except ValidationError as error:
        _LOG.warning("%s: a damaged record, so %s is measured again: %s", job.record, job.category, error)
        return None
    return record.model_dump() if record.identity == job.identity() else None


def write_record(job: Job, **facts: Any) -> None:
    """Keeps what was found of a category, for the page and for a run that goes on. facts: JSON types."""
    content = {"identity": job.identity(), **facts}
    write_bytes(job.record, (json.dumps(content, ensure_ascii=False) + "\n").encode())


def join_parts(job: Job, total: EvaluationPart, threshold: float) -> LabelledImages:
    """A job's parts, added, as one set. threshold: of the image score."""
    return join_evaluation_parts([total], threshold, TestIds(job))


def begin_anew(job: Job) -> None:
    """Removes what an earlier run left of a job."""
    for file in (job.state, job.record):
        remove_file(file)
    remove_folder(job.images)
