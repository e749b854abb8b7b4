"""Makes metric tables in Markdown, heat maps and overlays."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from focus_ray.detect.inspection import Inspection, resize_map
from focus_ray.settings.kinds import METRICS

# dark blue, violet, red, orange, pale yellow: the luminance rises steadily, so the map is readable without colour too
_HEAT = np.array([[8, 6, 60], [96, 20, 120], [196, 50, 70], [250, 150, 30], [255, 250, 190]], dtype=np.float64)


def evaluation_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a Markdown text with a table of the metrics of each category and a table of the metrics of each defect type.

    A missing metric is shown as '-' and left out of the mean row. The text begins with notices about images that the model was
    trained on. Below the tables follow the reasons of failed metrics and failed categories, and notices of a distribution
    shift.

    Args: results: category -> metrics, as `Inspector.evaluate` returns them, or a mapping with the key 'error' alone.
    """
    metrics = {key: METRICS[key] for key in METRICS}
    notices = [(category, (result.get("trained_on") or {}).get("notice")) for category, result in results.items()]
    notice_lines = [f"- {markdown_text(category)}: {markdown_text(notice)}" for category, notice in notices if notice]
    lines = [*notice_lines, ""] if notice_lines else []
    lines += [
        _row(["category", "good", "bad", *(metric.title for metric in metrics.values())]),
        _rule(3 + len(metrics)),
    ]
    for category, result in results.items():
        values = [_number(result.get(key), result.get("bounds", {}).get(key)) for key in metrics]
        counts = ["-" if "error" in result else str(result[key]) for key in ("num_normal", "num_anomalous")]
        lines.append(_row([markdown_text(category), *counts, *values]))
    if len(results) > 1:
        means = mean_metrics(results)
        lines.append(_row(["**mean**", "", "", *(_number(means[key]) for key in metrics)]))
    defect_metrics = {key: metric.title for key, metric in metrics.items() if metric.per_defect}
    lines += ["", _row(["category", "defect type", "images", *defect_metrics.values()]), _rule(3 + len(defect_metrics))]
    for category, result in results.items():
        for defect_type, type_result in result.get("defect_types", {}).items():
            values = [_number(type_result.get(key), type_result.get("bounds", {}).get(key)) for key in defect_metrics]
            lines.append(
                _row([markdown_text(category), markdown_text(defect_type), str(type_result["num_images"]), *values])
            )
    reasons = [
        f"{category}: not measured: {result['error']}" for category, result in results.items() if "error" in result
    ]
    for category, result in results.items():
        reasons += [f"{category}: {metric_key}: {reason}" for metric_key, reason in result.get("reasons", {}).items()]
    for category, result in results.items():
        for finding in ("shift", "repeats"):
            if notice := (result.get(finding) or {}).get("notice"):
                reasons.append(f"{category}: {notice}")
    if reasons:
        lines += ["", *(f"- {markdown_text(reason)}" for reason in reasons)]
    binned = [category for category, result in results.items() if result.get("binned")]
    if binned:
        lines += [
            "",
            f"Pixels counted in bins ({markdown_text(', '.join(binned))}): the exact value lies within the ± next to each value.",
        ]
    reduced = [category for category, result in results.items() if result.get("reduced")]
    if reduced:
        lines += [
            "",
            f"Compared at a reduced size ({markdown_text(', '.join(reduced))}): a reduced pixel is defective if any of its "
            "original pixels is defective, so defects are up to one pixel wider.",
        ]
    return "\n".join(lines) + "\n"


def mean_metrics(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Returns the unweighted mean of each metric over the categories that have it; None if no category has it."""
    means: dict[str, float | None] = {}
    for key in METRICS:
        values = [result[key] for result in results.values() if result.get(key) is not None]
        means[key] = float(np.mean(values)) if values else None
    return means


def heat_map(values: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint8]:
    """Colours values (H, W) as RGB (H, W, 3) uint8, from dark at `low` and below to light at `high` and above."""
    position = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * (len(_HEAT) - 1)
    index = np.minimum(position.astype(int), len(_HEAT) - 2)
    fraction = (position - index)[..., None]
    return (_HEAT[index] * (1 - fraction) + _HEAT[index + 1] * fraction).astype(np.uint8)


def overlay(image: NDArray[np.uint8], inspection: Inspection) -> NDArray[np.uint8]:
    """Draws the heat map over an image (H, W, 3) and outlines the regions. Returns (H, W, 3) uint8.

    The pixel threshold has the colour in the middle of the scale.
    """
    height, width = image.shape[:2]
    full = resize_map(inspection.anomaly_map, height, width)
    threshold = inspection.pixel_threshold
    colours = heat_map(full, 0.0, 2 * threshold)
    weight = np.clip(full / (2 * threshold), 0.05, 0.6)[..., None]
    blended = (image * (1 - weight) + colours * weight).astype(np.uint8)
    picture = Image.fromarray(blended)
    draw = ImageDraw.Draw(picture)
    line = max(1, round(min(height, width) / 160))
    for region in inspection.regions:
        corner = (region.x + region.width - 1, region.y + region.height - 1)
        draw.rectangle([(region.x, region.y), corner], outline=(0, 255, 255), width=line)
    return np.asarray(picture)


def markdown_text(text: object) -> str:
    """Returns a text as one line of Markdown that is shown literally, without markup and without new table columns."""
    return re.sub(r"([\\|<`\[\]])", r"\\\1", " ".join(str(text).split()))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns


def _number(value: float | None, bound: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if bound is None else f"{value:.4f} {format_bound(bound)}"


def format_bound(bound: float) -> str:
    """Returns an error bound as text such as '±2e-05', rounded up to one digit."""
    if bound <= 0:
        return "±0"
    unit = 10.0 ** math.floor(math.log10(bound))
    return f"±{math.ceil(bound / unit - 1e-9) * unit:.1g}"
