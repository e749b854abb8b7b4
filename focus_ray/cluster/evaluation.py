"""Evaluation of many categories, in this process or by a pool of workers, part by part; a run that dies can be gone on with."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from focus_ray.bundle.bundle import MANIFEST
from focus_ray.bundle.measuring import (
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
from focus_ray.cluster.connect import connect, runs_here
from focus_ray.cluster.pool import Failed, WorkerPool
from focus_ray.cluster.preflight import probe_nodes
from focus_ray.cluster.recording import evaluation_recorder, record_results
from focus_ray.cluster.scoring import load_inspector, scoring_pool
from focus_ray.config import ClusterConfig
from focus_ray.errors import FocusRayError
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
from focus_ray.storage import check_access, join, make_absolute, read_bytes, remove_file, write_bytes

WHOLE_PAGE = 20  # categories with all their pictures on one page; of more, each has a page of its own
_SAVE_S = 30.0  # of parts, between two times that what is known is saved
_WRITE_S = 10.0  # between two times that the tables are written while categories finish


@dataclass(frozen=True)
class Settings:
    """Of an evaluation; see `evaluate_bundles`."""

    output: str
    data: str | None
    max_side_px: int
    exact_pixels: int
    part_images: int
    resume: bool


@dataclass(frozen=True)
class Piece:
    """A piece of a job: all of it where maps are kept; else a part of its images, or its figures and pictures at the end.

    total: of all parts, for the figures.
    """

    kind: Literal["whole", "part", "figures"]
    job: EvaluationJob
    parts: dict[int, Rows]
    total: Any = None


def run_piece(piece: Piece, tell: Callable[[], None] = lambda: None) -> Any:
    """Returns: of a part, `Part`; else the figures, which are then written with their part of the page.

    Args:
        tell: is called after each scored image.

    Raises: BundleError, DataError: the bundle or an image cannot be used.
    """
    inspector = load_inspector(piece.job.bundle, piece.job.version)
    if piece.kind == "part":
        ((first, rows),) = piece.parts.items()
        return measure_part(inspector, piece.job, first, rows, tell)
    if piece.kind == "whole":
        labelled = measure_plan(inspector, EvaluationPlan(piece.job, piece.parts), tell)
    else:
        labelled = join_parts(piece.job, piece.total, float(inspector.bundle.calibration.image_threshold))
    job = piece.job
    result = {**inspector.figures(labelled), "bundle": job.bundle, "version": job.version, "data": job.data}
    section = build_section(inspector, labelled, result, job.data)
    write_record(job, result=result, section=section_to_dict(section))
    return result


class Evaluation:
    """What is left to do, what is known, and what of it is written. Gives out pieces, and takes what comes of them."""

    def __init__(self, bundles: Mapping[str, str], settings: Settings, log: Callable[[str], None]) -> None:
        self.bundles, self.settings, self.log = bundles, settings, log
        self.results: dict[str, dict[str, Any]] = {}
        self.jobs: dict[str, EvaluationJob] = {}
        self.to_score = 0  # images of categories that were begun, without those that were known
        self.progress: Progress | None = None
        self._sums: dict[str, EvaluationProgress] = {}
        self._waiting: dict[str, set[int]] = {}  # category -> parts that are not in its sum
        self._ready: deque[Piece] = deque()
        self._planned = self._plan_all()
        self._saved_at: dict[str, float] = {}
        self._written_at = 0.0

    def more(self) -> Piece | None:
        """The next piece; None where none is left but for what those under way lead to."""
        while self._ready:
            piece = self._ready.popleft()
            if piece.job.category not in self.results:  # it may have failed meanwhile
                return piece
        return next(self._planned, None)

    def _plan_all(self) -> Iterator[Piece]:
        """One category after the other, planned when its turn comes: of a million rows a plan has 8 MB."""
        for category in self.bundles:
            try:
                yield from self._plan(category)
            except FocusRayError as error:  # of this category: the others are measured all the same
                self._finish(category, {"error": str(error), "bundle": self.bundles[category]})

    def _plan(self, category: str) -> Iterator[Piece]:
        given = self.settings
        plan = plan_evaluation(
            category,
            self.bundles[category],
            given.output,
            given.data,
            given.max_side_px,
            given.exact_pixels,
            given.part_images,
        )
        job = self.jobs[category] = plan.job
        known = None
        if given.resume:
            record = read_record(job)
            if record is not None:
                self.log(f"{category}: measured already")
                self._finish(category, record["result"])
                return
            known = load_progress(job)
        if known is None:
            discard_progress(job)
        self.to_score += job.num_images - (known.num_images if known else 0)
        self.log(f"{category}: evaluating {job.bundle} on {job.num_images} images")
        if job.exact:
            self.progress = Progress(f"{category}: scoring", job.num_images, self.log)
            yield Piece("whole", job, plan.parts)
            return
        self.log(
            f"{category}: too many pixels to keep: pixel metrics come of counts in bins, with a bound on the difference"
        )
        total = self._sums[category] = known or EvaluationProgress(job)
        if total.scores:
            self.log(f"{category}: going on after {total.num_images} images")
        todo = {first: rows for first, rows in plan.parts.items() if first not in total.scores}
        self.progress = Progress(f"{category}: scoring", job.num_images, self.log, num_before=total.num_images)
        self._waiting[category] = set(todo)
        self._saved_at[category] = time.monotonic()
        if not todo:
            yield Piece("figures", job, {}, total.total())
        for first, rows in todo.items():
            if category in self.results:  # it has failed
                return
            yield Piece("part", job, {first: rows})

    def done(self, piece: Piece, outcome: Any) -> None:
        """Takes what came of a piece."""
        category = piece.job.category
        if category in self.results:
            return
        if isinstance(outcome, Failed):
            self._save(category)
            self._finish(category, {"error": outcome.reason, "bundle": piece.job.bundle})
        elif piece.kind == "part":
            (first,) = piece.parts
            total, waiting = self._sums[category], self._waiting[category]
            total.add(first, outcome)
            waiting.discard(first)
            if not waiting:
                self._save(category)
                self._ready.append(Piece("figures", piece.job, {}, total.total()))
            elif time.monotonic() - self._saved_at[category] >= _SAVE_S:
                self._save(category)
        else:
            remove_file(piece.job.state)  # the record says it all
            self._finish(category, outcome)

    def save(self) -> None:
        """Saves what is known of categories that are not done."""
        for category in self._sums:
            self._save(category)

    def _save(self, category: str) -> None:
        if category in self._sums and self._sums[category].scores:
            self._sums[category].save()
            self._saved_at[category] = time.monotonic()

    def _finish(self, category: str, result: dict[str, Any]) -> None:
        self.results[category] = result
        self._sums.pop(category, None)
        self._waiting.pop(category, None)
        told = f"not measured: {result['error']}" if "error" in result else summarize_result(result)
        self.log(f"{category}: {told} ({len(self.results)} of {len(self.bundles)})")
        if time.monotonic() - self._written_at >= _WRITE_S:
            self.write_tables()

    def ordered(self) -> dict[str, dict[str, Any]]:
        """Results in the bundles' order."""
        return {category: self.results[category] for category in self.bundles if category in self.results}

    def write_tables(self) -> str:
        """Writes report.json and report.md. Returns: the tables."""
        table, content = results_table(self.ordered())
        write_bytes(join(self.settings.output, "report.json"), content)
        write_bytes(join(self.settings.output, "report.md"), table.encode())
        self._written_at = time.monotonic()
        return table

    def write_pages(self) -> dict[str, list[str]]:
        """Writes report.html, and pages of categories where there are many. Returns: category -> caveats."""
        results, sections = self.ordered(), {}
        measured = [category for category, result in results.items() if "error" not in result]
        pages = {}
        for category in measured:
            section = self.section(category)
            if len(results) > WHOLE_PAGE:
                pages[category] = f"{CATEGORIES}/{category}.html"
                page = evaluation_page({category: results[category]}, {category: section})
                write_bytes(join(self.settings.output, pages[category]), page)
                section = without_pictures(section)
            sections[category] = section
        write_bytes(join(self.settings.output, "report.html"), evaluation_page(results, sections, pages))
        return {category: section.caveats for category, section in sections.items()}

    def section(self, category: str) -> EvaluationSection:
        """A measured category's part of the page, with its pictures."""
        return section_from_dict(json.loads(read_bytes(self.jobs[category].record))["section"])


@dataclass(frozen=True)
class Report:
    """Of an evaluation. results: category -> metrics, or an 'error'.  table: Markdown.  caveats: of each category."""

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
) -> Report:
    """Measures bundles on their labelled test images, and writes report.html, .md and .json, and results image by image.

    In this process, or on the cluster of RAY_ADDRESS, as training decides it (`runs_here`); `num_workers` above 1 starts
    Ray on this machine.

    Args:
        bundles: category -> bundle.  data: None for the set that each was trained from.
        exact_pixels: of a category's maps, up to which all are kept; of more, pixels are counted in bins.
        part_images: scored together, about.  num_workers: None for one here, or as many as the cluster has room for.
        resume: go on with the evaluation in `output`: what is of the same bundles, images and settings stays.
        trackers: trackers.KIND.KEY=value, where it is not to be recorded as the training was.

    Raises: DataError, TrainingError: the output cannot be written, or the cluster has no room for a worker. ConfigError: a
        tracker that is asked for cannot be used. What is wrong with one category stands in its result.
    """
    bundles = {category: make_absolute(uri) for category, uri in bundles.items()}
    settings = Settings(
        make_absolute(output), data and make_absolute(data), max_side_px, exact_pixels, part_images, resume
    )
    recorder = evaluation_recorder(bundles, settings.output, trackers, log)
    evaluation = Evaluation(bundles, settings, log)
    try:
        _run(evaluation, num_workers)
    finally:  # interrupted, or the storage went away: what is known stays
        evaluation.save()
    report = Report(evaluation.ordered(), evaluation.write_tables(), evaluation.write_pages())
    record_results(recorder, bundles, report.results, evaluation.section, log)
    return report


def _run(evaluation: Evaluation, num_workers: int | None) -> None:
    if runs_here(ClusterConfig(num_workers=num_workers or 1)):
        check_access(evaluation.settings.output)
        _run_here(evaluation)
    else:
        private = connect()
        one = next(iter(evaluation.bundles.values()))  # they lie together
        probe_nodes([join(one, MANIFEST)], [evaluation.settings.output])
        workers: WorkerPool[Piece] = scoring_pool(num_workers, private, evaluation.log)
        with workers as pool:
            progress = Progress("scoring", 0, evaluation.log)
            for piece, outcome in pool.run(run_piece, evaluation.more):
                progress.total = evaluation.to_score  # over all categories that have begun
                progress.add(sum(len(rows) for rows in piece.parts.values()))
                evaluation.done(piece, outcome)


def _run_here(evaluation: Evaluation) -> None:
    while (piece := evaluation.more()) is not None:
        progress = evaluation.progress
        try:
            outcome = run_piece(piece, progress.add if progress is not None else lambda: None)
        except FocusRayError as error:
            outcome = Failed(str(error), error)
        evaluation.done(piece, outcome)
