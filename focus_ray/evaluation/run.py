"""Evaluates many categories in this process or on a pool of workers, in parts, so that an interrupted run can continue."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from focus_ray.bundle.bundle import MANIFEST
from focus_ray.cluster.connect import connect, runs_here
from focus_ray.cluster.pool import Failed, WorkerPool
from focus_ray.cluster.preflight import probe_nodes
from focus_ray.cluster.settings import ClusterConfig
from focus_ray.errors import FocusRayError
from focus_ray.evaluation.measuring import (
    CATEGORIES,
    PART_IMAGES,
    EvaluationJob,
    EvaluationPlan,
    EvaluationProgress,
    Rows,
    discard_progress,
    join_parts,
    load_progress,
    measure_part,
    measure_plan,
    plan_evaluation,
    read_record,
    write_record,
)
from focus_ray.evaluation.recording import evaluation_recorder, record_results
from focus_ray.evaluation.scoring_pool import load_inspector, scoring_pool
from focus_ray.progress import Progress
from focus_ray.reporting.evaluation import (
    EvaluationSection,
    build_section,
    evaluation_page,
    results_table,
    section_from_dict,
    section_to_dict,
    summarize_result,
    without_pictures,
)
from focus_ray.storage.files import check_access, join, make_absolute, read_bytes, remove_file, write_bytes

MAX_CATEGORIES_ON_PAGE = 20  # with more categories, each category has its own page with pictures
_SAVE_INTERVAL_S = 30.0  # between two saves of the results of parts
_WRITE_INTERVAL_S = 10.0  # between two writes of the tables


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation, with the same meaning as the arguments of `evaluate_bundles`."""

    output: str
    data: str | None
    max_side_px: int
    exact_pixels: int
    part_images: int
    resume: bool


@dataclass(frozen=True)
class EvaluationPiece:
    """A piece of the evaluation of a category.

    Attributes:
        kind: "whole": all images, if maps fit into memory. "part": some of the images. "figures": metrics and pictures after
            all parts.
        parts: number of the first image -> row numbers.
        total: joined result of all parts, for the kind "figures".
    """

    kind: Literal["whole", "part", "figures"]
    job: EvaluationJob
    parts: dict[int, Rows]
    total: Any = None


def run_piece(piece: EvaluationPiece, on_image: Callable[[], None] = lambda: None) -> Any:
    """Evaluates a piece. Writes metrics and the section of the page to the record of the job, except for the kind "part".

    Args:
        on_image: is called after each scored image.

    Returns: `EvaluationPart` for the kind "part", otherwise the metrics.

    Raises: BundleError, DataError: the bundle or an image cannot be used.
    """
    inspector = load_inspector(piece.job.bundle, piece.job.version)
    if piece.kind == "part":
        ((first, rows),) = piece.parts.items()
        return measure_part(inspector, piece.job, first, rows, on_image)
    if piece.kind == "whole":
        labelled = measure_plan(inspector, EvaluationPlan(piece.job, piece.parts), on_image)
    else:
        labelled = join_parts(piece.job, piece.total, float(inspector.bundle.calibration.image_threshold))
    job = piece.job
    result = {**inspector.figures(labelled), "bundle": job.bundle, "version": job.version, "data": job.data}
    section = build_section(inspector, labelled, result, job.data)
    write_record(job, result=result, section=section_to_dict(section))
    return result


class Evaluation:
    """State of an evaluation: supplies the pieces of work, records their results, and writes the report.

    Attributes:
        results: category -> metrics, or 'error'.
        jobs: category -> its planned evaluation.
    """

    def __init__(self, bundles: Mapping[str, str], settings: EvaluationSettings, log: Callable[[str], None]) -> None:
        self.bundles, self.settings, self.log = bundles, settings, log
        self.results: dict[str, dict[str, Any]] = {}
        self.jobs: dict[str, EvaluationJob] = {}
        self.num_to_score = 0  # number of images of all started categories, without reused results
        self.progress: Progress | None = None
        self._sums: dict[str, EvaluationProgress] = {}
        self._unfinished_parts: dict[str, set[int]] = {}  # category -> parts without a result
        self._ready: deque[EvaluationPiece] = deque()
        self._pieces = self._plan_all()
        self._saved_at: dict[str, float] = {}
        self._written_at = 0.0

    def next_piece(self) -> EvaluationPiece | None:
        """Returns the next piece; None if there is none now. Running pieces may lead to more."""
        while self._ready:
            piece = self._ready.popleft()
            if piece.job.category not in self.results:  # the category may have failed meanwhile
                return piece
        return next(self._pieces, None)

    def _plan_all(self) -> Iterator[EvaluationPiece]:
        """Yields the pieces of all categories. Each category is planned at its turn: the plan of a million rows takes 8 MB."""
        for category in self.bundles:
            try:
                yield from self._plan(category)
            except FocusRayError as error:  # other categories are still evaluated
                self._finish(category, {"error": str(error), "bundle": self.bundles[category]})

    def _plan(self, category: str) -> Iterator[EvaluationPiece]:
        """Yields the pieces of a category. With `resume`, reuses the results of an earlier run."""
        settings = self.settings
        plan = plan_evaluation(
            category,
            self.bundles[category],
            settings.output,
            settings.data,
            settings.max_side_px,
            settings.exact_pixels,
            settings.part_images,
        )
        job = self.jobs[category] = plan.job
        saved_sum = None
        if settings.resume:
            record = read_record(job)
            if record is not None:
                self.log(f"{category}: measured already")
                self._finish(category, record["result"])
                return
            saved_sum = load_progress(job)
        if saved_sum is None:
            discard_progress(job)
        self.num_to_score += job.num_images - (saved_sum.num_images if saved_sum else 0)
        self.log(f"{category}: evaluating {job.bundle} on {job.num_images} images")
        if job.exact:
            self.progress = Progress(f"{category}: scoring", job.num_images, self.log)
            yield EvaluationPiece("whole", job, plan.parts)
            return
        self.log(
            f"{category}: too many pixels for the memory: pixel metrics come from counts in bins, with an error bound"
        )
        category_sum = self._sums[category] = saved_sum or EvaluationProgress(job)
        if category_sum.scores:
            self.log(f"{category}: continuing after {category_sum.num_images} images")
        remaining_parts = {first: rows for first, rows in plan.parts.items() if first not in category_sum.scores}
        self.progress = Progress(f"{category}: scoring", job.num_images, self.log, num_before=category_sum.num_images)
        self._unfinished_parts[category] = set(remaining_parts)
        self._saved_at[category] = time.monotonic()
        if not remaining_parts:
            yield EvaluationPiece("figures", job, {}, category_sum.total())
        for first, rows in remaining_parts.items():
            if category in self.results:  # the category has failed
                return
            yield EvaluationPiece("part", job, {first: rows})

    def record_result(self, piece: EvaluationPiece, outcome: Any) -> None:
        """Records the result of a piece."""
        category = piece.job.category
        if category in self.results:
            return
        if isinstance(outcome, Failed):
            self._save(category)
            self._finish(category, {"error": outcome.reason, "bundle": piece.job.bundle})
        elif piece.kind == "part":
            (first,) = piece.parts
            category_sum, unfinished = self._sums[category], self._unfinished_parts[category]
            category_sum.add(first, outcome)
            unfinished.discard(first)
            if not unfinished:
                self._save(category)
                self._ready.append(EvaluationPiece("figures", piece.job, {}, category_sum.total()))
            elif time.monotonic() - self._saved_at[category] >= _SAVE_INTERVAL_S:
                self._save(category)
        else:
            remove_file(piece.job.state)  # the record has everything
            self._finish(category, outcome)

    def save(self) -> None:
        """Saves the results of parts of unfinished categories."""
        for category in self._sums:
            self._save(category)

    def _save(self, category: str) -> None:
        if category in self._sums and self._sums[category].scores:
            self._sums[category].save()
            self._saved_at[category] = time.monotonic()

    def _finish(self, category: str, result: dict[str, Any]) -> None:
        self.results[category] = result
        self._sums.pop(category, None)
        self._unfinished_parts.pop(category, None)
        summary = f"not measured: {result['error']}" if "error" in result else summarize_result(result)
        self.log(f"{category}: {summary} ({len(self.results)} of {len(self.bundles)})")
        if time.monotonic() - self._written_at >= _WRITE_INTERVAL_S:
            self.write_tables()

    def ordered(self) -> dict[str, dict[str, Any]]:
        """Returns the results in the order of the bundles."""
        return {category: self.results[category] for category in self.bundles if category in self.results}

    def write_tables(self) -> str:
        """Writes report.json and report.md. Returns the Markdown text."""
        table, content = results_table(self.ordered())
        write_bytes(join(self.settings.output, "report.json"), content)
        write_bytes(join(self.settings.output, "report.md"), table.encode())
        self._written_at = time.monotonic()
        return table

    def write_pages(self) -> dict[str, list[str]]:
        """Writes report.html, and a page for each category if there are many. Returns category -> caveats."""
        results, sections = self.ordered(), {}
        measured = [category for category, result in results.items() if "error" not in result]
        pages = {}
        for category in measured:
            section = self.section(category)
            if len(results) > MAX_CATEGORIES_ON_PAGE:
                pages[category] = f"{CATEGORIES}/{category}.html"
                page = evaluation_page({category: results[category]}, {category: section})
                write_bytes(join(self.settings.output, pages[category]), page)
                section = without_pictures(section)
            sections[category] = section
        write_bytes(join(self.settings.output, "report.html"), evaluation_page(results, sections, pages))
        return {category: section.caveats for category, section in sections.items()}

    def section(self, category: str) -> EvaluationSection:
        """Returns the section of an evaluated category, with its pictures."""
        return section_from_dict(json.loads(read_bytes(self.jobs[category].record))["section"])


@dataclass(frozen=True)
class EvaluationReport:
    """Result of an evaluation.

    Attributes:
        results: category -> metrics, or 'error'.
        table: Markdown text.
        caveats: category -> sentences.
    """

    results: dict[str, dict[str, Any]]
    table: str
    caveats: dict[str, list[str]]


def evaluate_bundles(
    bundles: Mapping[str, str],
    output: str,
    *,
    data: str | None = None,
    max_side_px: int,
    exact_pixels: int,
    part_images: int = PART_IMAGES,
    num_workers: int | None = None,
    resume: bool = False,
    trackers: Sequence[str] = (),
    log: Callable[[str], None] = lambda message: None,
) -> EvaluationReport:
    """Evaluates bundles on their labelled test images. Writes report.html, report.md, report.json and results of each image.

    The evaluation runs in this process or on the cluster of RAY_ADDRESS, by the same rule as training (`runs_here`). With
    `num_workers` above 1 it starts Ray on this machine.

    Args:
        bundles: category -> bundle.
        data: data set with test images; None: the data set that each bundle was trained on.
        exact_pixels: a category with more pixels is counted in bins.
        part_images: approximate number of images of a part.
        num_workers: None: one in this process, or as many as the cluster has room for.
        resume: continue the evaluation in `output` and reuse results of the same bundles, images and settings.
        trackers: settings trackers.KIND.KEY=value that override the trackers of the training.

    Raises:
        DataError, TrainingError: the output cannot be written, or the cluster has no room for a worker.
        ConfigError: a requested tracker cannot be used.
        The failure of a category is no exception, but the 'error' of its result.
    """
    bundles = {category: make_absolute(uri) for category, uri in bundles.items()}
    settings = EvaluationSettings(
        make_absolute(output), data and make_absolute(data), max_side_px, exact_pixels, part_images, resume
    )
    recorder = evaluation_recorder(bundles, settings.output, trackers, log)
    evaluation = Evaluation(bundles, settings, log)
    try:
        _run(evaluation, num_workers)
    finally:  # also after an interruption or a failure of the storage
        evaluation.save()
    report = EvaluationReport(evaluation.ordered(), evaluation.write_tables(), evaluation.write_pages())
    record_results(recorder, bundles, report.results, evaluation.section, log)
    return report


def _run(evaluation: Evaluation, num_workers: int | None) -> None:
    """Evaluates all pieces in this process or on a pool of workers."""
    if runs_here(ClusterConfig(num_workers=num_workers or 1)):
        check_access(evaluation.settings.output)
        _run_here(evaluation)
    else:
        is_private = connect()
        first_bundle = next(iter(evaluation.bundles.values()))  # all bundles are in the same storage
        probe_nodes([join(first_bundle, MANIFEST)], [evaluation.settings.output])
        workers: WorkerPool[EvaluationPiece] = scoring_pool(num_workers, is_private, evaluation.log)
        progress = Progress("scoring", 0, evaluation.log)
        for piece, outcome in workers.run(run_piece, evaluation.next_piece):
            progress.total = evaluation.num_to_score  # of all started categories
            progress.add(sum(len(rows) for rows in piece.parts.values()))
            evaluation.record_result(piece, outcome)


def _run_here(evaluation: Evaluation) -> None:
    while (piece := evaluation.next_piece()) is not None:
        progress = evaluation.progress
        try:
            outcome = run_piece(piece, progress.add if progress is not None else lambda: None)
        except FocusRayError as error:
            outcome = Failed(str(error))
        evaluation.record_result(piece, outcome)
