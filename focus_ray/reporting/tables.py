"""Makes the tables of an evaluation in Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from focus_ray.metrics.registry import METRICS


def format_evaluation_tables(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a Markdown text with a table of the metrics of each category and a table of the metrics of each defect type.

    A missing metric is shown as '-' and left out of the mean row, which exists for two or more categories. Notices about images
    that the model was trained on come first. Below the tables follow the reasons of failed categories and metrics, notices of a
    distribution shift and of repeated images, and explanations of approximate metrics.

    Args: results: category -> metrics, as `Inspector.evaluate` returns them. A category whose evaluation failed has only the
        entry 'error' with the reason.
    """
    rows = [
        [category, result.get("num_normal", "-"), result.get("num_anomalous", "-"), *_format_metrics(result, METRICS)]
        for category, result in results.items()
    ]
    if len(results) > 1:
        rows.append(["**mean**", "", "", *_format_metrics(compute_mean_metrics(results), METRICS)])
    per_defect = [key for key in METRICS if METRICS[key].per_defect]
    type_rows = [
        [category, defect_type, type_result["num_images"], *_format_metrics(type_result, per_defect)]
        for category, result in results.items()
        for defect_type, type_result in result.get("defect_types", {}).items()
    ]
    reasons = [
        f"{category}: not measured: {result['error']}" for category, result in results.items() if "error" in result
    ]
    for category, result in results.items():
        reasons += [f"{category}: {metric_key}: {reason}" for metric_key, reason in result.get("reasons", {}).items()]
    notices_first, notices = (
        [
            f"{category}: {notice}"
            for category, result in results.items()
            for notice in collect_notices(result, *findings)
        ]
        for findings in (("trained_on",), ("shift", "repeats"))
    )
    sections = [
        _format_list(notices_first),
        _format_table(["category", "good", "bad"], METRICS, rows),
        _format_table(["category", "defect type", "images"], per_defect, type_rows),
        _format_list([*reasons, *notices]),
    ]
    explanations = {
        "binned": "Pixels counted in bins ({}): the exact value lies within the ± next to each value.",
        "reduced": "Compared at a reduced size ({}): a reduced pixel is defective if any of its original pixels is "
        "defective, so defects are up to one pixel wider.",
    }
    for key, explanation in explanations.items():
        categories = [category for category, result in results.items() if result.get(key)]
        sections.append(explanation.format(_escape_markdown(", ".join(categories))) if categories else "")
    return "\n\n".join(filter(None, sections)) + "\n"


def compute_mean_metrics(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Returns metric -> unweighted mean over the categories with this metric; None if no category has the metric."""
    means: dict[str, float | None] = {}
    for key in METRICS:
        values = [result[key] for result in results.values() if result.get(key) is not None]
        means[key] = float(np.mean(values)) if values else None
    return means


def format_error_bound(bound: float) -> str:
    """Returns an error bound as text such as '±2e-05', rounded up to one digit."""
    if bound <= 0:
        return "±0"
    unit = 10.0 ** math.floor(math.log10(bound))
    return f"±{math.ceil(bound / unit - 1e-9) * unit:.1g}"


def collect_notices(result: Mapping[str, Any], *findings: str) -> list[str]:
    """Returns the notices of some findings in the result of a category, such as 'shift'."""
    notices = ((result.get(finding) or {}).get("notice") for finding in findings)
    return [notice for notice in notices if notice]


def _format_metrics(result: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Returns some metrics of a category or defect type as texts, with their error bounds; '-' for a missing metric.

    Args: keys: names of the metrics, in the order of the texts.
    """
    figures = []
    for key in keys:
        value, bound = result.get(key), result.get("bounds", {}).get(key)
        figures.append(
            "-" if value is None else f"{value:.4f}" + ("" if bound is None else f" {format_error_bound(bound)}")
        )
    return figures


def _format_table(head: list[str], metrics: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Returns a Markdown table. Its first columns have the headings `head`; then follows a column for each metric."""
    titles = [*head, *(METRICS[key].title for key in metrics)]
    lines = [f"| {' | '.join(map(_escape_markdown, cells))} |" for cells in (titles, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(titles), *lines[1:]])


def _format_list(items: Iterable[str]) -> str:
    """Returns texts as a Markdown list with one item per line; an empty text if there are no items."""
    return "\n".join(f"- {_escape_markdown(item)}" for item in items)


def _escape_markdown(text: object) -> str:
    """Returns a text as one line for a cell of a Markdown table: escapes backslashes, bars, `<`, backticks and brackets."""
    return re.sub(r"([\\|<`\[\]])", r"\\\1", " ".join(str(text).split()))
