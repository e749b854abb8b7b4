"""Scores the test images of a category in parts, and computes the metrics from the results of all parts.

A part is a range of consecutive test images; a work item is the work of one worker call (`evaluation.work_items`). The scores and
pixel counts of each part are added once to the category's progress, from which the metrics are computed.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from focus_ray.bundle.bundle import read_manifest
from focus_ray.bundle.inspector import Inspector
from focus_ray.data.read import TEST_COLUMNS, index_version, read_index, read_rows
from focus_ray.data.schema import Row
from focus_ray.errors import DataError
from focus_ray.evaluation.work_items import PART_IMAGES, Rows, ScoringJob, WorkItem, encode_parquet, load_inspector
from focus_ray.metrics.evaluate import (
    EXACT_PIXELS,
    MAX_SIDE_PX,
    EvaluationCollector,
    UnseenTestImages,
    WorkerScores,
    compute_evaluation_size,
)
from focus_ray.metrics.pixels import PixelBins
from focus_ray.reporting.evaluation import EvaluationSection, build_evaluation_section
from focus_ray.reporting.gallery import make_gallery_cards
from focus_ray.storage.files import file_exists, join_path, read_bytes, remove_file, remove_folder, write_bytes

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

_LOG = logging.getLogger(__name__)


class SavedEvaluation(BaseModel):
    """Content of the JSON file with the evaluation results of a category.

    Attributes:
        identity: `EvaluationJob.get_identity` of the job that wrote the file.
        result: the metrics.
        section: the category's section of the report page.
    """

    identity: dict[str, Any]
    result: dict[str, Any]
    section: EvaluationSection


@dataclass(frozen=True)
class EvaluationJob(ScoringJob):
    """The evaluation of one category.

    Attributes:
        num_images: number of test images.
        exact: True: pixel metrics are computed from every pixel; one worker scores the whole category and holds all maps in RAM.
            False: pixels are counted in bins (ranges of values), and several workers score one part each.
        max_side_px: maps and masks are compared at the image size, reduced so that the longest side has at most this length.
        output: folder of the report.
    """

    IDENTITY = ("version", "data", "commit", "num_images", "exact", "max_side_px", "part_images")

    num_images: int
    exact: bool
    max_side_px: int
    output: str

    @property
    def result_path(self) -> str:
        """Path of the JSON file with the results of the category; `SavedEvaluation` is its content."""
        return join_path(self.output, CATEGORIES, f"{self.category}.json")

    @property
    def progress_path(self) -> str:
        """Path of the progress file, which has the pixel bins and the list of scored parts of an unfinished category."""
        return join_path(self.output, CATEGORIES, f"{self.category}.bins.parquet")

    def read_test_records(self, numbers: Sequence[int]) -> Iterable[Row]:
        """Reads ids, images and masks of some test images. numbers: their positions among all test images, ascending.

        Raises: DataError: the data set cannot be read, or the version `commit` was deleted.
        """
        index = read_index(self.data, self.category, split="test", version=self.commit)
        rows = index["row"].take(numbers).to_numpy()
        return read_rows(self.data, self.category, rows, columns=("id", "image", "mask"), version=self.commit)

    def delete_results(self) -> None:
        """Deletes all result files of the category: progress file, JSON file and results of images."""
        for file in (self.progress_path, self.result_path):
            remove_file(file)
        remove_folder(self.folder)


EvaluationItem = WorkItem[EvaluationJob]


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation.

    Attributes:
        output: folder of the report.
        data: URI of the data set; None: the data set that each bundle was trained with.
        max_side_px: see `EvaluationJob`.
        exact_pixels: `EvaluationJob.exact` is True for a category whose maps have at most this many pixels together.
        part_images: approximate number of images in a part (a range of consecutive images).
        resume: whether results of an earlier run are reused.
    """

    output: str
    data: str | None = None
    max_side_px: int = MAX_SIDE_PX
    exact_pixels: int = EXACT_PIXELS
    part_images: int = PART_IMAGES
    resume: bool = False


def plan_evaluation(category: str, bundle: str, settings: EvaluationSettings) -> tuple[EvaluationJob, dict[int, Rows]]:
    """Plans the evaluation of a category from the bundle's manifest and the image sizes in the data set. Reads no pixels.

    Args: bundle: URI of the bundle.

    Returns: (job, parts). parts: position of a part's first image among the test images -> row numbers in the data set.

    Raises:
        BundleError: the bundle is missing or its manifest is damaged.
        DataError: the data set or category does not exist or has no test image.
    """
    manifest = read_manifest(bundle)
    uri = settings.data or str(manifest["config"]["data"]["uri"])
    index = read_index(uri, category, split="test")
    if not index.num_rows:
        raise DataError("there is no test image to evaluate: ingest a set that has some")
    sizes = np.stack([index["height"].to_numpy(), index["width"].to_numpy()], axis=1)
    distinct_sizes, counts = np.unique(sizes, axis=0, return_counts=True)
    map_sizes = (
        compute_evaluation_size(height, width, settings.max_side_px) for height, width in distinct_sizes.tolist()
    )
    areas = [height * width for height, width in map_sizes]
    job = EvaluationJob(
        category=category,
        bundle=bundle,
        version=str(manifest["sha256"]),
        data=uri,
        commit=index_version(index),
        part_images=settings.part_images,
        folder=join_path(settings.output, IMAGES, f"category={category}"),
        num_images=index.num_rows,
        exact=int(np.dot(areas, counts)) <= settings.exact_pixels,
        max_side_px=settings.max_side_px,
        output=settings.output,
    )
    return job, job.split_into_parts(index["row"].to_numpy())


def process_work_item(item: EvaluationItem, on_image: Callable[[], None] = lambda: None) -> Any:
    """Does a work item: scores the images of its parts and writes a result file for each part, or computes the metrics.

    A part is a range of consecutive images. The last item of a job computes the metrics, and writes them with the section of
    the report page to the file `job.result_path`. A job with exact metrics has a single item, which scores all images and is
    the last item too. Otherwise the last item is the item with `total`, which scores no image.

    Args:
        on_image: is called after each scored image.

    Returns: the metrics, for the last item of the job; otherwise the `WorkerScores` of the item.

    Raises:
        BundleError: the bundle is missing or damaged.
        DataError: the bundle was replaced, an image cannot be used, the model was trained on all images, or a file cannot be
            written.
    """
    job = item.job
    inspector = load_inspector(job.bundle, job.version)
    threshold = float(inspector.bundle.calibration.image_threshold)
    if item.total is not None:
        return _write_metrics(inspector, job, item.total.select_unseen_images(threshold))
    collector = EvaluationCollector(sys.maxsize if job.exact else 0)
    for first, rows in item.parts.items():
        records = read_rows(job.data, job.category, rows, columns=TEST_COLUMNS, version=job.commit)
        scored = []
        for record in inspector.score_records(records, collector, job.max_side_px):
            scored.append(record)
            on_image()
        job.write_part(first, _build_image_table(inspector, scored))
    return (
        _write_metrics(inspector, job, collector.select_unseen_images(threshold))
        if job.exact
        else collector.get_worker_scores()
    )


def _build_image_table(inspector: Inspector, records: Sequence[Row]) -> pa.Table:
    """Returns a table of `IMAGE_SCHEMA` with scores and verdicts of images. records: rows from `Inspector.score_records`."""
    calibration = inspector.bundle.calibration
    scores = np.array([record["score"] for record in records], dtype=np.float64)
    columns = {
        **{name: [record[name] for record in records] for name in ("id", "label", "defect_type", "trained_on")},
        "score": scores,
        "p_value": calibration.compute_conformal_p_values(scores),
        "anomalous": calibration.is_anomalous(scores),
        "threshold": np.full(len(scores), calibration.image_threshold),
        "bundle": [inspector.bundle.version] * len(scores),
    }
    return pa.table(columns, schema=IMAGE_SCHEMA)


def _write_metrics(inspector: Inspector, job: EvaluationJob, labelled: UnseenTestImages) -> dict[str, Any]:
    """Computes the metrics of a job, writes them with the page section to the file `job.result_path`, and returns the metrics.

    Args: labelled: all scored images of the job that the model was not trained on.

    Raises: DataError: an image for the gallery cannot be read again, or the file cannot be written.
    """
    result = {
        **inspector.compute_evaluation_metrics(labelled),
        "bundle": job.bundle,
        "version": job.version,
        "data": job.data,
    }
    cards = make_gallery_cards(inspector, labelled, job.read_test_records)
    warnings = inspector.bundle.manifest.get("metrics", {}).get("warnings", [])
    section = build_evaluation_section(labelled.measured, inspector.bundle.calibration, warnings, result, cards)
    content = {"identity": job.get_identity(), "result": result, "section": asdict(section)}
    write_bytes(job.result_path, (json.dumps(content, ensure_ascii=False) + "\n").encode())
    return result


@dataclass
class EvaluationProgress:
    """The results of the scored parts (ranges of consecutive images) of a job that counts pixels in bins (ranges of values).

    Attributes:
        scores: position of a part's first image -> results of the part, without its bins.
        bins: defect type ("" for good images) -> pixel counts of all parts together.
    """

    job: EvaluationJob
    scores: dict[int, WorkerScores] = field(default_factory=dict)
    bins: dict[str, PixelBins] = field(default_factory=dict)

    def add(self, first: int, part: WorkerScores) -> None:
        """Adds the results of a part (a range of images). Does nothing if the same part was added before.

        Two workers may have scored the same part. first: position of the part's first image.
        """
        if first in self.scores:
            return
        for group, bins in part.bins.items():
            self.bins[group] = self.bins[group] + bins if group in self.bins else bins
        types = tuple(map(sys.intern, part.types))  # interned: few different names, many images
        self.scores[first] = replace(part, types=types, bins={})

    @property
    def num_images(self) -> int:
        """Number of images that are scored so far."""
        return sum(len(part.labels) for part in self.scores.values())

    def merge_parts(self) -> WorkerScores:
        """Returns the joined results of all scored images, in the order of the images. Needs at least one scored part."""
        parts = [self.scores[first] for first in sorted(self.scores)]
        return WorkerScores(
            labels=np.concatenate([part.labels for part in parts]),
            scores=np.concatenate([part.scores for part in parts]),
            types=tuple(defect_type for part in parts for defect_type in part.types),
            bins=self.bins,
            reduced=any(part.reduced for part in parts),
            trained_on=np.concatenate([part.trained_on for part in parts]),
            num_repeats=sum(part.num_repeats for part in parts),
        )

    def save(self) -> None:
        """Writes the pixel bins and the list of scored parts (ranges of images) to the progress file `job.progress_path`.

        The scores are not written again: `process_work_item` has written them to the result files of the parts.

        Raises: DataError: the file cannot be written.
        """
        arrays = {name: [getattr(bins, name) for bins in self.bins.values()] for name in _COLUMNS}
        counts = [bins.keys.size for bins in self.bins.values()]
        groups = pa.array(np.repeat(np.arange(len(counts), dtype=np.int32), counts))
        columns = {name: np.concatenate(parts) if parts else np.empty(0, np.int64) for name, parts in arrays.items()}
        facts = {
            "identity": self.job.get_identity(),
            "parts": {str(first): len(part.labels) for first, part in self.scores.items()},
            "groups": [[group, bins.num_regions, bins.num_images] for group, bins in self.bins.items()],
            "reduced": any(part.reduced for part in self.scores.values()),
            "repeats": {str(first): part.num_repeats for first, part in self.scores.items()},
        }
        table = pa.table({"group": groups, **columns}).replace_schema_metadata({_FACTS: json.dumps(facts)})
        write_bytes(self.job.progress_path, encode_parquet(table))


_COLUMNS = ("keys", "normal", "anomalous", "overlap")
_FACTS = b"focus_ray.measured"


def load_progress(job: EvaluationJob) -> EvaluationProgress | None:
    """Loads the progress that an earlier run of the same job saved; None without a progress file, or if another job wrote it.

    Raises: DataError: the progress file is damaged, or the result file of a part is damaged or missing.
    """
    if not file_exists(job.progress_path):
        return None
    try:
        table = pq.read_table(pa.BufferReader(read_bytes(job.progress_path)))
        facts = json.loads((table.schema.metadata or {})[_FACTS])
        if facts["identity"] != job.get_identity():
            return None
        progress = EvaluationProgress(job)
        group_of = table["group"].to_numpy()
        for number, (group, num_regions, num_images) in enumerate(facts["groups"]):
            rows = group_of == number
            keys, normal, anomalous, overlap = (table[name].to_numpy()[rows] for name in _COLUMNS)
            progress.bins[group] = PixelBins(keys, normal, anomalous, overlap, num_regions, num_images)
        for first, count in facts["parts"].items():
            part = pq.read_table(pa.BufferReader(read_bytes(job.get_part_path(int(first), count))))
            labels, scores = part["label"].to_numpy(), part["score"].to_numpy()
            types = tuple(map(sys.intern, part["defect_type"].to_pylist()))
            trained_on = part["trained_on"].to_numpy(zero_copy_only=False)
            progress.scores[int(first)] = WorkerScores(
                labels, scores, types, {}, facts["reduced"], trained_on, facts.get("repeats", {}).get(first, 0)
            )
    except (pa.ArrowException, KeyError, ValueError, FileNotFoundError) as error:
        raise DataError(
            f"{job.progress_path}: the file is damaged, or results of images are missing ({error}): start again without --resume"
        ) from error
    return progress


def read_earlier_result(job: EvaluationJob) -> SavedEvaluation | None:
    """Reads the results that an earlier run of the same job wrote to `job.result_path`; None if there are none.

    For a damaged file it logs a warning and returns None, so that the category is evaluated again.

    Raises: DataError: the storage cannot be read.
    """
    if not file_exists(job.result_path):
        return None
    try:
        record = SavedEvaluation.model_validate_json(read_bytes(job.result_path))
    except ValidationError as error:
        _LOG.warning("%s: the record is damaged, so %s is measured again: %s", job.result_path, job.category, error)
        return None
    return record if record.identity == job.get_identity() else None
