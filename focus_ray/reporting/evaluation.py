"""Builds the page of an evaluation: error rates at the thresholds, caveats, plots, tables and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import quote

import numpy as np

from focus_ray.bundle.inspector import Inspector
from focus_ray.drawing import plots
from focus_ray.evaluation.report import evaluation_table, mean_metrics
from focus_ray.metrics.evaluate import LabelledImages
from focus_ray.metrics.metrics import MeasuredImages
from focus_ray.reporting.caveats import Share, count_called_bad, evaluation_caveats
from focus_ray.reporting.gallery import PER_KIND, Card, Kind, make_cards
from focus_ray.reporting.page import render
from focus_ray.settings.kinds import METRICS

PRO_LIMIT = 0.3  # largest false positive rate of the PRO curve and of AUPRO 0.3
_PRO_POINTS = 400  # points of the drawn curve; the exact curve has a corner for each pixel


@dataclass(frozen=True)
class GalleryGroup:
    """A group of pictures in the gallery, with a title and a note that explain the group."""

    title: str
    note: str
    cards: list[Card]


@dataclass(frozen=True)
class EvaluationSection:
    """The section of a category on the page.

    Attributes:
        good, bad: share of the good and of the bad test images that are called bad.
        target_fpr: target false positive rate of the calibration.
        num_calibration: number of calibration images.
        method: method of the calibration.
    """

    good: Share
    bad: Share
    target_fpr: float
    num_calibration: int
    method: str
    caveats: list[str]
    plots: list[plots.Plot]
    gallery: list[GalleryGroup]


def build_section(
    inspector: Inspector, labelled: LabelledImages, result: Mapping[str, Any], data: str
) -> EvaluationSection:
    """Builds the section of a category.

    Args:
        labelled: the result of `inspector.measure`.
        result: the result of `inspector.figures` for `labelled`.
        data: URI of the data set of the images. The images of the gallery are read again from it.

    Raises: DataError: an image of the gallery cannot be read again.
    """
    calibration, measured = inspector.bundle.calibration, labelled.measured
    good, bad = count_called_bad(measured, 0), count_called_bad(measured, 1)
    warnings = inspector.bundle.manifest.get("metrics", {}).get("warnings", [])
    return EvaluationSection(
        good=good,
        bad=bad,
        target_fpr=calibration.target_fpr,
        num_calibration=calibration.num_images,
        method=calibration.method,
        caveats=evaluation_caveats(calibration.caveats(), warnings, result, good, bad),
        plots=_plots(measured, calibration.image_scores, result, good, bad),
        gallery=_gallery(make_cards(inspector, data, labelled), good, bad),
    )


def section_to_dict(section: EvaluationSection) -> dict[str, Any]:
    """Returns a section in JSON types."""
    return asdict(section)


def section_from_dict(fields: Mapping[str, Any]) -> EvaluationSection:
    """Returns the section of a result of `section_to_dict`."""
    gallery = [{**group, "cards": [Card(**card) for card in group["cards"]]} for group in fields["gallery"]]
    return EvaluationSection(
        **{
            **fields,
            "good": Share(**fields["good"]),
            "bad": Share(**fields["bad"]),
            "plots": [plots.Plot(**plot) for plot in fields["plots"]],
            "gallery": [GalleryGroup(**group) for group in gallery],
        }
    )


def without_pictures(section: EvaluationSection) -> EvaluationSection:
    """Returns a small copy of a section, with figures and caveats but without plots and gallery."""
    return replace(section, plots=[], gallery=[])


def summarize_result(result: Mapping[str, Any]) -> str:
    """Returns a line with the most important metrics of a category."""
    shown = [(METRICS[key].title, result.get(key)) for key in ("image_auroc", "pixel_auroc", "aupro_0.3", "recall")]
    num_left_out = (result.get("trained_on") or {}).get("num_images", 0)
    prefix = f"without {num_left_out} images that the model was trained on: " if num_left_out else ""
    figures = ", ".join(f"{title} {value:.4f}" for title, value in shown if value is not None)
    return prefix + (figures or "no metric can be computed")


def results_table(results: Mapping[str, Mapping[str, Any]]) -> tuple[str, bytes]:
    """Returns the content of report.md (text) and report.json (bytes) for the categories measured so far."""
    content = {"categories": results, "mean": mean_metrics(results)}
    return evaluation_table(results), (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def evaluation_page(
    results: Mapping[str, Mapping[str, Any]],
    sections: Mapping[str, EvaluationSection],
    pages: Mapping[str, str] | None = None,
) -> bytes:
    """Renders the HTML page of an evaluation.

    Args:
        results: category -> metrics, or an entry 'error' only.
        sections: category -> section, for each category without an error.
        pages: category -> file name of the category's own page, which has its plots and pictures.
    """
    errors = {category: result["error"] for category, result in results.items() if "error" in result}
    caveats = {
        category: [f"Not measured: {errors[category]}"] if category in errors else sections[category].caveats
        for category in results
    }
    return render(
        "evaluation.html",
        title="Evaluation: " + ", ".join(list(results)[:3]) + (" ..." if len(results) > 3 else ""),
        good=_total(section.good for section in sections.values()),
        bad=_total(section.bad for section in sections.values()),
        targets=sorted({section.target_fpr for section in sections.values()}),
        results=results,
        sections=sections,
        errors=errors,
        caveats=caveats,
        pages={category: quote(page, errors="replace") for category, page in (pages or {}).items()},
        metrics={key: METRICS[key].title for key in METRICS},
        per_defect={key: METRICS[key].title for key in METRICS if METRICS[key].per_defect},
        means=mean_metrics(results),
    )


def roc(measured: MeasuredImages) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Returns the false positive rates and the true positive rates of images over all thresholds."""
    from sklearn.metrics import roc_curve  # this import takes a second, so other commands avoid it

    false_positive_rate, true_positive_rate, _ = roc_curve(measured.labels, measured.scores)
    return false_positive_rate, true_positive_rate


def precision_recall(measured: MeasuredImages) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Returns recall, in ascending order, and precision of images over all thresholds."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(measured.labels, measured.scores)
    return recall[::-1], precision[::-1]


def pro(measured: MeasuredImages, limit: float = PRO_LIMIT) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
    """Returns false positive rates of pixels up to `limit`, and the mean overlap of regions; None without masks."""
    if measured.curve is None:
        return None
    exact_rates, overlap = measured.curve.pro()
    rates = limit * np.linspace(0.0, 1.0, _PRO_POINTS) ** 2  # squared: dense near 0, where the curve is steep
    return rates, np.interp(rates, exact_rates, overlap)


def _total(shares: Iterable[Share]) -> Share:
    """Returns the share of all categories together."""
    share_list = list(shares)
    return Share(sum(share.count for share in share_list), sum(share.total for share in share_list))


def _plots(
    measured: MeasuredImages, calibration_scores: Sequence[float], result: Mapping[str, Any], good: Share, bad: Share
) -> list[plots.Plot]:
    """Draws score histograms, and the curves that the labels and masks allow."""
    drawn = [
        plots.score_histograms(
            {
                "good test images": measured.scores[measured.labels == 0].tolist(),
                "bad test images": measured.scores[measured.labels == 1].tolist(),
                "calibration: good images": calibration_scores,
            },
            measured.threshold,
            "Scores",
            "Right of the dashed threshold an image is called bad. The more good and bad test images lie apart, the better; "
            "good test images and calibration images should lie alike.",
        )
    ]
    if measured.has_both:
        drawn.append(
            plots.curve(
                "ROC",
                f"Area {result['image_auroc']:.4f}. The dot is the calibrated threshold.",
                roc(measured),
                ("good images called bad", "bad images found"),
                point=(good.share, bad.share),
            )
        )
        num_called_bad = good.count + bad.count
        drawn.append(
            plots.curve(
                "Precision and recall",
                f"Average precision {result['image_average_precision']:.4f}. The dot is the calibrated threshold. Precision "
                f"hangs on how many are bad: here {bad.total} of {good.total + bad.total}.",
                precision_recall(measured),
                ("recall: bad images found", "precision"),
                point=(bad.share, bad.count / num_called_bad) if num_called_bad else None,
                steps=True,
            )
        )
    overlap = pro(measured) if result.get("aupro_0.3") is not None else None
    if overlap is not None:
        drawn.append(
            plots.curve(
                "Per-region overlap (PRO)",
                f"How much of a defect's area is marked, where at most so many good pixels are. AUPRO 0.3 is "
                f"{result['aupro_0.3']:.4f}.",
                overlap,
                ("good pixels marked", "mean overlap of defects"),
                x_limit=PRO_LIMIT,
            )
        )
    return drawn


def _gallery(cards: Mapping[Kind, list[Card]], good: Share, bad: Share) -> list[GalleryGroup]:
    """Groups the cards into misses, false alarms and correct finds, and leaves out empty groups."""
    num_missed = bad.total - bad.count
    groups = [
        GalleryGroup(
            "Worst misses" if num_missed else "Bad images that came closest to being missed",
            _count_note(num_missed, "bad images were called good") if num_missed else "Every bad test image is found.",
            cards["misses"],
        ),
        GalleryGroup(
            "Worst false alarms" if good.count else "Good images that came closest to a false alarm",
            _count_note(good.count, "good images were called bad")
            if good.count
            else "No good test image is called bad.",
            cards["false_alarms"],
        ),
        GalleryGroup("Typical finds", "Bad images called bad, with scores about the median.", cards["finds"]),
    ]
    return [group for group in groups if group.cards]


def _count_note(count: int, statement: str) -> str:
    """Returns a sentence such as '2 bad images were called good.', and adds if only the worst images are shown."""
    sentence = f"{count} {statement}" if count != 1 else f"1 {statement.replace('images were', 'image was')}"
    return f"{sentence}; the worst {PER_KIND} are shown." if count > PER_KIND else f"{sentence}."
