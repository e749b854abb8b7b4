"""Builds the page of an evaluation: error rates at the thresholds, caveats, plots, tables and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any
from urllib.parse import quote

import numpy as np

from focus_ray.detect.calibration import Calibration
from focus_ray.drawing import plots
from focus_ray.metrics.metrics import ScoredTestImages
from focus_ray.metrics.registry import METRICS
from focus_ray.reporting.caveats import ImageShare, compute_share_called_bad, list_evaluation_caveats
from focus_ray.reporting.gallery import PER_KIND, CardKind, GalleryCard
from focus_ray.reporting.page import render_page
from focus_ray.reporting.tables import compute_mean_metrics

PRO_LIMIT = 0.3  # largest false positive rate of the PRO curve and of AUPRO 0.3
_PRO_POINTS = 400  # points of the drawn curve; the exact curve has a corner for each pixel


@dataclass(frozen=True)
class GalleryGroup:
    """A group of test images in the gallery of a page, with a title and a note that explain the choice of the images."""

    title: str
    note: str
    cards: list[GalleryCard]


@dataclass(frozen=True)
class EvaluationSection:
    """The data for the section of one category on the page of an evaluation.

    Attributes:
        good, bad: share of the good and of the bad test images whose score is above the threshold.
        target_fpr: target false positive rate of the calibration.
        num_calibration: number of calibration images.
        method: method of the calibration.
        caveats: sentences of `list_evaluation_caveats`.
        plots: drawn plots of the scores and metrics.
        gallery: groups of test images with their heat maps.
    """

    good: ImageShare
    bad: ImageShare
    target_fpr: float
    num_calibration: int
    method: str
    caveats: list[str]
    plots: list[plots.Plot]
    gallery: list[GalleryGroup]


def build_evaluation_section(
    measured: ScoredTestImages,
    calibration: Calibration,
    warnings: Sequence[str],
    result: Mapping[str, Any],
    cards: Mapping[CardKind, list[GalleryCard]],
) -> EvaluationSection:
    """Builds the section of one category for the page of an evaluation.

    Args:
        measured: scored test images of the category.
        calibration: calibration of the model.
        warnings: warnings of the training, as sentences.
        result: metrics and notices of `Inspector.evaluate` for `measured`.
        cards: images of the gallery, from `gallery.make_gallery_cards`.
    """
    good, bad = compute_share_called_bad(measured, 0), compute_share_called_bad(measured, 1)
    return EvaluationSection(
        good=good,
        bad=bad,
        target_fpr=calibration.target_fpr,
        num_calibration=calibration.num_images,
        method=calibration.method,
        caveats=list_evaluation_caveats(calibration.describe_limits(), warnings, result, good, bad),
        plots=_draw_metric_plots(measured, calibration, result, good, bad),
        gallery=_group_gallery_cards(cards, good, bad),
    )


def summarize_metrics(result: Mapping[str, Any]) -> str:
    """Returns one line of text with the most important metrics of a category, such as 'Image AUROC 0.9876, Recall 0.9500'."""
    metrics = {METRICS[key].title: result.get(key) for key in ("image_auroc", "pixel_auroc", "aupro_0.3", "recall")}
    num_left_out = (result.get("trained_on") or {}).get("num_images", 0)
    prefix = f"without {num_left_out} images that the model was trained on: " if num_left_out else ""
    texts = [f"{title} {value:.4f}" for title, value in metrics.items() if value is not None]
    return prefix + (", ".join(texts) or "no metric can be computed")


def render_evaluation_page(
    results: Mapping[str, Mapping[str, Any]],
    sections: Mapping[str, EvaluationSection],
    pages: Mapping[str, str] | None = None,
) -> bytes:
    """Renders the HTML page of an evaluation.

    Args:
        results: category -> metrics. A category whose evaluation failed has only the entry 'error' with the reason.
        sections: category -> section, for each category without an error.
        pages: category -> file name of a separate page with the plots and images of the category; None: there are no such pages.

    Returns: the page in UTF-8.
    """
    errors = {category: result["error"] for category, result in results.items() if "error" in result}
    caveats = {
        category: [f"Not measured: {errors[category]}"] if category in errors else sections[category].caveats
        for category in results
    }
    return render_page(
        "evaluation.html",
        title="Evaluation: " + ", ".join(list(results)[:3]) + (" ..." if len(results) > 3 else ""),
        good=_sum_shares(section.good for section in sections.values()),
        bad=_sum_shares(section.bad for section in sections.values()),
        targets=sorted({section.target_fpr for section in sections.values()}),
        results=results,
        sections=sections,
        errors=errors,
        caveats=caveats,
        pages={category: quote(page, errors="replace") for category, page in (pages or {}).items()},
        metrics={key: METRICS[key].title for key in METRICS},
        per_defect={key: METRICS[key].title for key in METRICS if METRICS[key].per_defect},
        means=compute_mean_metrics(results),
    )


def compute_per_region_overlap_curve(
    measured: ScoredTestImages,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
    """Returns the per-region overlap (PRO) curve at 400 points, or None if no mask has a defective pixel.

    Returns: two arrays (400,). The first has false positive rates of pixels from 0 to `PRO_LIMIT`. The second has, for each
        rate, the mean share of a defect's area that the model marks.
    """
    if measured.pixel_curve is None:
        return None
    exact_rates, overlap = measured.pixel_curve.compute_pro_curve()
    rates = PRO_LIMIT * np.linspace(0.0, 1.0, _PRO_POINTS) ** 2  # squared: dense near 0, where the curve is steep
    return rates, np.interp(rates, exact_rates, overlap)


def _sum_shares(shares: Iterable[ImageShare]) -> ImageShare:
    """Adds the counts and totals of the categories' shares, and returns the share of all categories together."""
    return reduce(lambda a, b: ImageShare(a.count + b.count, a.total + b.total), shares, ImageShare(0, 0))


def _draw_metric_plots(
    measured: ScoredTestImages, calibration: Calibration, result: Mapping[str, Any], good: ImageShare, bad: ImageShare
) -> list[plots.Plot]:
    """Draws score histograms; with good and bad images also ROC and precision-recall curves; with masks also a PRO curve.

    Args:
        result: metrics of `measured`.
        good, bad: share of the good and of the bad test images whose score is above the threshold.
    """
    drawn = [
        plots.plot_score_histograms(
            {
                "good test images": measured.scores[measured.labels == 0].tolist(),
                "bad test images": measured.scores[measured.labels == 1].tolist(),
                "calibration: good images": calibration.image_scores,
            },
            measured.threshold,
            "Scores",
            "Right of the dashed threshold an image is called bad. The more good and bad test images lie apart, the better; "
            "good test images and calibration images should lie alike.",
        )
    ]
    if measured.has_both_labels:
        from sklearn.metrics import precision_recall_curve, roc_curve  # this import takes a second

        false_positive_rate, true_positive_rate, _ = roc_curve(measured.labels, measured.scores)
        drawn.append(
            plots.plot_curve(
                "ROC",
                f"Area {result['image_auroc']:.4f}. The dot is the calibrated threshold.",
                (false_positive_rate, true_positive_rate),
                ("good images called bad", "bad images found"),
                point=(good.share, bad.share),
            )
        )
        precision, recall, _ = precision_recall_curve(measured.labels, measured.scores)
        num_called_bad = good.count + bad.count
        drawn.append(
            plots.plot_curve(
                "Precision and recall",
                f"Average precision {result['image_average_precision']:.4f}. The dot is the calibrated threshold. Precision "
                f"hangs on how many are bad: here {bad.total} of {good.total + bad.total}.",
                (recall[::-1], precision[::-1]),
                ("recall: bad images found", "precision"),
                point=(bad.share, bad.count / num_called_bad) if num_called_bad else None,
                steps=True,
            )
        )
    overlap = compute_per_region_overlap_curve(measured) if result.get("aupro_0.3") is not None else None
    if overlap is not None:
        drawn.append(
            plots.plot_curve(
                "Per-region overlap (PRO)",
                f"How much of a defect's area is marked, where at most so many good pixels are. AUPRO 0.3 is "
                f"{result['aupro_0.3']:.4f}.",
                overlap,
                ("good pixels marked", "mean overlap of defects"),
                x_limit=PRO_LIMIT,
            )
        )
    return drawn


def _group_gallery_cards(
    cards: Mapping[CardKind, list[GalleryCard]], good: ImageShare, bad: ImageShare
) -> list[GalleryGroup]:
    """Makes a gallery group with a title and a note for each kind of cards, and leaves out kinds without cards."""
    num_missed = bad.total - bad.count
    misses, alarms = "Bad images that came closest to being missed", "Good images that came closest to a false alarm"
    missed_note, alarm_note = "Every bad test image is found.", "No good test image is called bad."
    if num_missed:
        misses, missed_note = "Worst misses", _describe_image_count(num_missed, "bad", "called good")
    if good.count:
        alarms, alarm_note = "Worst false alarms", _describe_image_count(good.count, "good", "called bad")
    groups = [
        GalleryGroup(misses, missed_note, cards["misses"]),
        GalleryGroup(alarms, alarm_note, cards["false_alarms"]),
        GalleryGroup("Typical finds", "Bad images called bad, with scores about the median.", cards["finds"]),
    ]
    return [group for group in groups if group.cards]


def _describe_image_count(count: int, kind: str, verdict: str) -> str:
    """Returns a sentence such as '2 bad images were called good.'

    For more images than the gallery shows: '9 bad images were called good; the worst 4 are shown.'

    Args:
        kind: label of the images, good or bad.
        verdict: what the model did, such as 'called good'.
    """
    sentence = f"{count} {kind} {'image was' if count == 1 else 'images were'} {verdict}"
    return f"{sentence}; the worst {PER_KIND} are shown." if count > PER_KIND else f"{sentence}."
