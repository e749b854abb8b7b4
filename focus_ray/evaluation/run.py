"""Evaluates many categories in this process or on a pool of workers, in parts, so that an interrupted run can continue.

A part is a range of consecutive test images; a work item is the work of one worker call (`evaluation.work_items`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from focus_ray.bundle.bundle import MANIFEST
from focus_ray.cluster.settings import DEFAULT_CLUSTER, ClusterConfig, check_settings_have_effect
from focus_ray.evaluation.measuring import (
    CATEGORIES,
    EvaluationItem,
    EvaluationJob,
    EvaluationProgress,
    EvaluationSettings,
    SavedEvaluation,
    load_progress,
    plan_evaluation,
    process_work_item,
    read_earlier_result,
)
from focus_ray.evaluation.recording import open_evaluation_recorder, record_in_trackers
from focus_ray.evaluation.work_items import PART_IMAGES, SCORING_SETTINGS, ScoringRun, open_worker_pool
from focus_ray.reporting.evaluation import EvaluationSection, render_evaluation_page, summarize_metrics
from focus_ray.reporting.tables import compute_mean_metrics, format_evaluation_tables
from focus_ray.storage.files import (
    join_path,
    make_absolute_path,
    read_bytes,
    remove_file,
    write_bytes,
)

MAX_CATEGORIES_ON_PAGE = 20  # with more categories, each category has its own page with pictures
_SAVE_INTERVAL_S = 30.0  # between two saves of the results of parts
_WRITE_INTERVAL_S = 10.0  # between two writes of the tables


class EvaluationRun(ScoringRun[EvaluationJob]):
    """State of an evaluation, which supplies the work items, collects their results, and writes the report.

    Attributes:
        results: category -> metrics; for a failed category {"error": reason, "bundle": URI}.
        jobs: category -> its planned evaluation.
    """

    def __init__(self, bundles: Mapping[str, str], settings: EvaluationSettings, log: Callable[[str], None]) -> None:
        """Prepares an evaluation; nothing is planned or scored yet. bundles: category -> URI of its bundle."""
        super().__init__(bundles, log)
        self.settings = settings
        self.results: dict[str, dict[str, Any]] = {}
        self.jobs: dict[str, EvaluationJob] = {}
        self._measured: dict[str, EvaluationProgress] = {}  # of unfinished categories whose pixels are counted in bins
        self._saved_at: dict[str, float] = {}
        self._written_at = 0.0

    def plan_work_items(self, category: str) -> list[EvaluationItem]:
        """Plans the evaluation of a category and returns its work items; empty if the metrics of an earlier run are reused.

        With the setting `resume`, the metrics of a finished category are reused, or the saved progress of a category whose
        pixels are counted in bins. If there is nothing to reuse, all earlier result files of the category are deleted. If all
        parts were scored by an earlier run, the only item computes the metrics.

        Raises:
            BundleError: the bundle is missing or its manifest is damaged.
            DataError: the data set cannot be read or has no test image, or result files are damaged or cannot be deleted.
        """
        settings = self.settings
        job, parts = plan_evaluation(category, self.bundles[category], settings)
        self.jobs[category] = job
        record = read_earlier_result(job) if settings.resume else None
        if record is not None:
            self.log(f"{category}: measured already")
            self._finish_category(category, record.result)
            return []
        measured = load_progress(job) if settings.resume else None
        if measured is None:
            job.delete_results()
            measured = EvaluationProgress(job)
        self.log(f"{category}: evaluating {job.bundle} on {job.num_images} images")
        if job.exact:
            return [EvaluationItem(job, parts)]
        self.log(
            f"{category}: too many pixels for the memory: pixel metrics come from counts in bins, with an error bound"
        )
        if measured.scores:
            self.log(f"{category}: continuing after {measured.num_images} images")
        self._measured[category] = measured
        self._saved_at[category] = time.monotonic()
        items = [EvaluationItem(job, {first: rows}) for first, rows in parts.items() if first not in measured.scores]
        return items or [EvaluationItem(job, {}, measured.merge_parts())]

    def store_result(self, item: EvaluationItem, result: Any) -> None:
        """Stores the result of a work item: the metrics of a category, or the scores and pixel counts of a range of images.

        After the last range of a category, adds a work item that computes the metrics. Saves the progress of the category then,
        and otherwise at most once in `_SAVE_INTERVAL_S`.

        Raises: DataError: a file of the report cannot be written or deleted.
        """
        job, category = item.job, item.job.category
        if job.exact or item.total is not None:
            remove_file(job.progress_path)  # the record has everything
            self._finish_category(category, result)
            return
        (first,) = item.parts
        measured, is_complete = self._measured[category], not self.num_open[category]
        measured.add(first, result)
        if is_complete:
            self.num_open[category] = 1
            self.urgent.append(EvaluationItem(job, {}, measured.merge_parts()))
        if is_complete or time.monotonic() - self._saved_at[category] >= _SAVE_INTERVAL_S:
            self._save_category_progress(category)

    def mark_failed(self, category: str, reason: str) -> None:
        """Marks a category as failed. If its pixels are counted in bins, saves its progress for a later run with `resume`.

        Raises: DataError: a file of the report cannot be written.
        """
        super().mark_failed(category, reason)
        self._save_category_progress(category)
        self._finish_category(category, {"error": reason, "bundle": self.bundles[category]})

    def save_progress(self) -> None:
        """Writes the progress files of all unfinished categories whose pixels are counted in bins (ranges of values).

        With `resume`, a later run continues from these files. A category with exact metrics has no progress to save.

        Raises: DataError: a file cannot be written.
        """
        for category in self._measured:
            self._save_category_progress(category)

    def _save_category_progress(self, category: str) -> None:
        """Writes the progress file of a category, if its pixels are counted in bins, and it is unfinished and has a scored part.

        Raises: DataError: the file cannot be written.
        """
        if category in self._measured and self._measured[category].scores:
            self._measured[category].save()
            self._saved_at[category] = time.monotonic()

    def _finish_category(self, category: str, result: dict[str, Any]) -> None:
        """Stores and logs the result of a category. Writes report.json and report.md if they are older than `_WRITE_INTERVAL_S`.

        Raises: DataError: a file cannot be written.
        """
        self.results[category] = result
        self._measured.pop(category, None)
        summary = f"not measured: {result['error']}" if "error" in result else summarize_metrics(result)
        self.log(f"{category}: {summary} ({len(self.results)} of {len(self.bundles)})")
        if time.monotonic() - self._written_at >= _WRITE_INTERVAL_S:
            self.write_json_and_markdown()

    def sort_results(self) -> dict[str, dict[str, Any]]:
        """Returns category -> result, in the order of the bundles, without categories that have no result yet."""
        return {category: self.results[category] for category in self.bundles if category in self.results}

    def write_json_and_markdown(self) -> str:
        """Writes report.json and report.md with the results so far, and returns the Markdown text.

        Raises: DataError: a file cannot be written.
        """
        results = self.sort_results()
        content = json.dumps(
            {"categories": results, "mean": compute_mean_metrics(results)}, indent=1, ensure_ascii=False
        )
        table = format_evaluation_tables(results)
        write_bytes(join_path(self.settings.output, "report.json"), f"{content}\n".encode())
        write_bytes(join_path(self.settings.output, "report.md"), table.encode())
        self._written_at = time.monotonic()
        return table

    def write_pages(self) -> dict[str, list[str]]:
        """Writes report.html, and returns category -> caveats (sentences that limit what the metrics say).

        With more than `MAX_CATEGORIES_ON_PAGE` results, each category also gets its own page, and only that page has its
        pictures. A failed category gets neither its own page nor caveats.

        Raises: DataError: a file cannot be written or read.
        """
        results, sections = self.sort_results(), {}
        pages = {}
        for category in (category for category, result in results.items() if "error" not in result):
            section = self.read_report_section(category)
            if len(results) > MAX_CATEGORIES_ON_PAGE:
                pages[category] = f"{CATEGORIES}/{category}.html"
                page = render_evaluation_page({category: results[category]}, {category: section})
                write_bytes(join_path(self.settings.output, pages[category]), page)
                section = replace(section, plots=[], gallery=[])
            sections[category] = section
        write_bytes(join_path(self.settings.output, "report.html"), render_evaluation_page(results, sections, pages))
        return {category: section.caveats for category, section in sections.items()}

    def read_report_section(self, category: str) -> EvaluationSection:
        """Reads a category's section of the report page, with its pictures, from the file `EvaluationJob.result_path`.

        Raises: DataError: the file cannot be read.
        """
        return SavedEvaluation.model_validate_json(read_bytes(self.jobs[category].result_path)).section


@dataclass(frozen=True)
class EvaluationReport:
    """Result of an evaluation of many categories.

    Attributes:
        results: category -> metrics; for a failed category {"error": reason, "bundle": URI}.
        table: tables of the metrics as Markdown text.
        caveats: category -> sentences that limit what its metrics say; without failed categories.
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
    cluster: ClusterConfig = DEFAULT_CLUSTER,
    resume: bool = False,
    trackers: Sequence[str] = (),
    log: Callable[[str], None] = lambda message: None,
) -> EvaluationReport:
    """Evaluates bundles on their labelled test images. Writes report.html, report.md, report.json and results of each image.

    The evaluation runs in this process or on the cluster of RAY_ADDRESS, by the same rule as training (`runs_without_ray`). With
    `num_workers` above 1 and without RAY_ADDRESS it starts Ray on this machine. The failure of a category raises no error: the
    result of the category has the key "error".

    Args:
        bundles: category -> address of its bundle.
        output: folder of the report.
        data: data set with test images; None: the data set that each bundle was trained on.
        max_side_px: longest side at which maps and masks are compared; smaller images are compared at their own size.
        exact_pixels: a category whose maps have more pixels together counts pixels in bins (ranges of values); its pixel metrics
            have an error bound.
        part_images: approximate number of images of a part (a range of images, whose results are one file).
        num_workers: largest number of workers. None: this process, or on a cluster as many workers as fit.
        cluster: resources and nodes of the workers.
        resume: continue the evaluation in `output`, and reuse results of the same bundles, images and settings.
        trackers: settings such as trackers.mlflow.uri=PLACE, which override the trackers of the training.

    Raises:
        DataError: the output cannot be written, or a node of the cluster cannot use the storage.
        TrainingError: Ray cannot be used, the cluster has no room for a worker, or the workers do not start.
        ConfigError: a setting in `cluster` has no effect on an evaluation, a tracker setting is invalid, or with `trackers` a
            tracker cannot be used.
        MissingPackageError: with `trackers`: the package extra of a tracker is not installed.
    """
    check_settings_have_effect(cluster, SCORING_SETTINGS, "evaluate")
    bundles = {category: make_absolute_path(uri) for category, uri in bundles.items()}
    settings = EvaluationSettings(
        make_absolute_path(output), data and make_absolute_path(data), max_side_px, exact_pixels, part_images, resume
    )
    recorder = open_evaluation_recorder(bundles, settings.output, trackers, log)
    evaluation = EvaluationRun(bundles, settings, log)
    try:
        inputs = [join_path(uri, MANIFEST) for uri in list(bundles.values())[:1]]  # all bundles are in the same storage
        pool = open_worker_pool(cluster, num_workers, inputs, settings.output, log)
        evaluation.run(process_work_item, pool)
    finally:  # also after an interruption or a failure of the storage
        evaluation.save_progress()
    report = EvaluationReport(evaluation.sort_results(), evaluation.write_json_and_markdown(), evaluation.write_pages())
    record_in_trackers(recorder, bundles, report.results, evaluation.read_report_section, log)
    return report
