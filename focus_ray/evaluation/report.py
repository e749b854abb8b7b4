"""What people look at: metric tables in Markdown, heat-map overlays, contact sheets."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from focus_ray.evaluation.inspection import Inspection, resize_map
from focus_ray.kinds import METRICS

# dark blue, violet, red, orange, pale yellow: the luminance rises throughout, so it reads without colour too
_HEAT = np.array([[8, 6, 60], [96, 20, 120], [196, 50, 70], [250, 150, 30], [255, 250, 190]], dtype=np.float64)


def evaluation_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Category -> metrics (as `Inspector.evaluate` gives) -> a Markdown table with a mean row, and one of defect types.

    A metric that a category's test set cannot give is shown as '-' and left out of the mean; where something stood in its way,
    and where a category could not be measured at all (its result is an 'error' alone), the reason follows below the tables. So
    does a notice of a distribution shift. Images left out because the model was trained on them are told first.
    """
    metrics = {key: METRICS[key] for key in METRICS}
    notices = [(category, (result.get("trained_on") or {}).get("notice")) for category, result in results.items()]
    first = [f"- {markdown_text(category)}: {markdown_text(notice)}" for category, notice in notices if notice]
    lines = [*first, ""] if first else []
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
    told = {key: metric.title for key, metric in metrics.items() if metric.per_defect}
    lines += ["", _row(["category", "defect type", "images", *told.values()]), _rule(3 + len(told))]
    for category, result in results.items():
        for kind, part in result.get("defect_types", {}).items():
            values = [_number(part.get(key), part.get("bounds", {}).get(key)) for key in told]
            lines.append(_row([markdown_text(category), markdown_text(kind), str(part["num_images"]), *values]))
    reasons = [
        f"{category}: not measured: {result['error']}" for category, result in results.items() if "error" in result
    ]
    for category, result in results.items():
        reasons += [f"{category}: {where}: {reason}" for where, reason in result.get("reasons", {}).items()]
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
            f"Pixels counted in bins ({markdown_text(', '.join(binned))}): the exact figure lies within the ± that stands beside "
            "it.",
        ]
    reduced = [category for category, result in results.items() if result.get("reduced")]
    if reduced:
        lines += [
            "",
            f"Compared at a reduced size ({markdown_text(', '.join(reduced))}): a reduced pixel is defective where any that it "
            "stands for is, so defects are up to a pixel wider there.",
        ]
    return "\n".join(lines) + "\n"


def mean_metrics(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Unweighted means over categories, of those that have the metric."""
    means: dict[str, float | None] = {}
    for key in METRICS:
        values = [result[key] for result in results.values() if result.get(key) is not None]
        means[key] = float(np.mean(values)) if values else None
    return means


def heat_map(values: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint8]:
    """(H, W) -> (H, W, 3) RGB; `low` and below is the darkest, `high` and above the lightest."""
    position = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * (len(_HEAT) - 1)
    index = np.minimum(position.astype(int), len(_HEAT) - 2)
    part = (position - index)[..., None]
    return (_HEAT[index] * (1 - part) + _HEAT[index + 1] * part).astype(np.uint8)


def overlay(image: NDArray[np.uint8], inspection: Inspection) -> NDArray[np.uint8]:
    """The image (H, W, 3) under its heat map: the scale's middle is the pixel threshold, regions are outlined.

    Returns: (H, W, 3) uint8.
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


def contact_sheet(
    rows: Sequence[Sequence[NDArray[np.uint8]]], titles: Sequence[str], cell_px: int = 192
) -> Image.Image:
    """Rows of pictures (H, W, 3), each row with a title above it."""
    bar = 18
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (cell_px + 4), len(rows) * (cell_px + bar + 4)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for number, (row, title) in enumerate(zip(rows, titles, strict=True)):
        top = number * (cell_px + bar + 4)
        draw.text((4, top + 3), title, fill=(0, 0, 0))
        for column, picture in enumerate(row):
            scaled = Image.fromarray(picture).resize((cell_px, cell_px), Image.Resampling.BILINEAR)
            sheet.paste(scaled, (column * (cell_px + 4), top + bar))
    return sheet


def markdown_text(text: object) -> str:
    """Text of a record as one line of Markdown that shows it letter by letter: no markup, no further column."""
    return re.sub(r"([\\|<`\[\]])", r"\\\1", " ".join(str(text).split()))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns


def _number(value: float | None, bound: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if bound is None else f"{value:.4f} {within(bound)}"


def within(bound: float) -> str:
    """'±2e-05': a bound to one digit, rounded up."""
    if bound <= 0:
        return "±0"
    unit = 10.0 ** math.floor(math.log10(bound))
    return f"±{math.ceil(bound / unit - 1e-9) * unit:.1g}"
