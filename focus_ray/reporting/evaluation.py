"""The page of an evaluation: what would happen at the thresholds, what to know first, then plots, tables and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import quote

import numpy as np

from focus_ray.bundle.inspector import Inspector
from focus_ray.evaluation.evaluate import LabelledImages
from focus_ray.evaluation.metrics import ScoredImages
from focus_ray.evaluation.report import evaluation_table, mean_metrics
from focus_ray.kinds import METRICS
from focus_ray.reporting import plots
from focus_ray.reporting.caveats import Share, called_bad, evaluation_caveats
from focus_ray.reporting.gallery import PER_KIND, Card, Kind, make_cards
from focus_ray.reporting.page import render

PRO_LIMIT = 0.3  # false positive rate to which the PRO curve is drawn and AUPRO 0.3 taken
_PRO_POINTS = 400  # of a curve with a corner a pixel


@dataclass(frozen=True)
class Pictures:
    """A part of the gallery. title and note: what these images are."""

    title: str
    note: str
    cards: list[Card]


@dataclass(frozen=True)
class Section:
    """One category, ready to be shown. good, bad: how many of the good and bad test images are called bad."""

    good: Share
    bad: Share
    target_fpr: float
    num_calibration: int
    method: str
    caveats: list[str]
    plots: list[plots.Plot]
    gallery: list[Pictures]


def describe(inspector: Inspector, labelled: LabelledImages, result: Mapping[str, Any], data: str) -> Section:
    """What a page shows of one category.

    Args:
        labelled: as `inspector.measure` gives.  result: as `inspector.figures` gives of it.
        data: the data set that the images came from; those of the gallery are read again.

    Raises: DataError: an image of the gallery cannot be read again.
    """
    calibration, measured = inspector.bundle.calibration, labelled.measured
    good, bad = called_bad(measured, 0), called_bad(measured, 1)
    warnings = inspector.bundle.manifest.get("metrics", {}).get("warnings", [])
    return Section(
        good=good,
        bad=bad,
        target_fpr=calibration.target_fpr,
        num_calibration=calibration.num_images,
        method=calibration.method,
        caveats=evaluation_caveats(calibration.caveats(), warnings, result, good, bad),
        plots=_plots(measured, calibration.image_scores, result, good, bad),
        gallery=_gallery(make_cards(inspector, data, labelled), good, bad),
    )


def section_to_dict(section: Section) -> dict[str, Any]:
    """JSON types."""
    return asdict(section)


def section_from_dict(tree: Mapping[str, Any]) -> Section:
    """What `section_to_dict` gave."""
    gallery = [{**part, "cards": [Card(**card) for card in part["cards"]]} for part in tree["gallery"]]
    return Section(
        **{
            **tree,
            "good": Share(**tree["good"]),
            "bad": Share(**tree["bad"]),
            "plots": [plots.Plot(**plot) for plot in tree["plots"]],
            "gallery": [Pictures(**part) for part in gallery],
        }
    )


def without_pictures(section: Section) -> Section:
    """Its figures and caveats alone: small."""
    return replace(section, plots=[], gallery=[])


def summary_of(result: Mapping[str, Any]) -> str:
    """A line of a category's first figures."""
    shown = [(METRICS[key].title, result.get(key)) for key in ("image_auroc", "pixel_auroc", "aupro_0.3", "recall")]
    num_left_out = (result.get("trained_on") or {}).get("num_images", 0)
    before = f"without {num_left_out} images that the model was trained on: " if num_left_out else ""
    figures = ", ".join(f"{title} {value:.4f}" for title, value in shown if value is not None)
    return before + (figures or "no metric can be had")


def results_table(results: Mapping[str, Mapping[str, Any]]) -> tuple[str, bytes]:
    """report.md and report.json of what is known so far."""
    content = {"categories": results, "mean": mean_metrics(results)}
    return evaluation_table(results), (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def evaluation_page(
    results: Mapping[str, Mapping[str, Any]], sections: Mapping[str, Section], pages: Mapping[str, str] | None = None
) -> bytes:
    """The page.

    Args:
        results: category -> metrics, or an 'error' alone.  sections: of those that could be measured.
        pages: category -> its own page, beside this one, where plots and pictures are.
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


def roc(measured: ScoredImages) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """False and true positive rates, over all thresholds."""
    from sklearn.metrics import roc_curve  # a second of imports, which other commands can do without

    false, true, _ = roc_curve(measured.labels, measured.scores)
    return false, true


def precision_recall(measured: ScoredImages) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Recall, rising, and the precision there, over all thresholds."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(measured.labels, measured.scores)
    return recall[::-1], precision[::-1]


def pro(measured: ScoredImages, limit: float = PRO_LIMIT) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
    """False positive rate of pixels, up to the limit, and the mean overlap of regions; None where no mask tells."""
    if measured.curve is None:
        return None
    false, overlap = measured.curve.pro()
    places = limit * np.linspace(0.0, 1.0, _PRO_POINTS) ** 2  # dense where the curve is steep
    return places, np.interp(places, false, overlap)


def _total(shares: Any) -> Share:
    every = list(shares)
    return Share(sum(share.count for share in every), sum(share.total for share in every))


def _plots(
    measured: ScoredImages, calibration_scores: Sequence[float], result: Mapping[str, Any], good: Share, bad: Share
) -> list[plots.Plot]:
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
        called = good.count + bad.count
        drawn.append(
            plots.curve(
                "Precision and recall",
                f"Average precision {result['image_average_precision']:.4f}. The dot is the calibrated threshold. Precision "
                f"hangs on how many are bad: here {bad.total} of {good.total + bad.total}.",
                precision_recall(measured),
                ("recall: bad images found", "precision"),
                point=(bad.share, bad.count / called) if called else None,
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


def _gallery(cards: Mapping[Kind, list[Card]], good: Share, bad: Share) -> list[Pictures]:
    missed = bad.total - bad.count
    parts = [
        Pictures(
            "Worst misses" if missed else "Bad images that came closest to being missed",
            _of(missed, "bad images were called good") if missed else "Every bad test image is found.",
            cards["misses"],
        ),
        Pictures(
            "Worst false alarms" if good.count else "Good images that came closest to a false alarm",
            _of(good.count, "good images were called bad") if good.count else "No good test image is called bad.",
            cards["false_alarms"],
        ),
        Pictures("Typical finds", "Bad images called bad, with scores about the median.", cards["finds"]),
    ]
    return [part for part in parts if part.cards]


def _of(count: int, what: str) -> str:
    words = f"{count} {what}" if count != 1 else f"1 {what.replace('images were', 'image was')}"
    return f"{words}; the worst {PER_KIND} are shown." if count > PER_KIND else f"{words}."
