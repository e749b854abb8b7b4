"""The plots of a sweep as PNG: settings with scores, learning curves, parameter importance. No Ray."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from focus_ray.drawing.mark import MARK
from focus_ray.drawing.plots import escape_text
from focus_ray.sweep import records
from focus_ray.sweep.records import TrialRecord
from focus_ray.sweep.settings import SweepConfig

MIN_SPAN = 0.02  # least length of a score axis: twice the noise of a score (`summary.NOISE`)
_BEST, _CUT, _GRID = "#c0392b", "#9aa5b1", "#e3e7eb"


def score_axis(values: Sequence[float]) -> tuple[float, float]:
    """Returns both ends of a score axis: the range of the scores. Widens a small range, which would only show noise.

    The length is at least `MIN_SPAN` for scores in [0, 1], where the axis stays inside [0, 1], and at least 2 % of the
    largest absolute score for other scores.
    """
    low, high = min(values), max(values)
    bounded = low >= 0.0 and high <= 1.0
    span = MIN_SPAN if bounded else max(MIN_SPAN, MIN_SPAN * max(abs(low), abs(high)))
    if high - low >= span:
        return low, high
    start = (low + high - span) / 2
    if bounded:
        start = min(max(start, 0.0), 1.0 - span)
    return start, start + span


def describe_range(values: Sequence[float]) -> str:
    """Returns the range of scores as text: "scores 0.9100 to 0.9500"; "score 0.9100" if both ends print the same."""
    low, high = (f"{value:.{records.DECIMALS}f}" for value in (min(values), max(values)))
    return f"score {low}" if low == high else f"scores {low} to {high}"


def parallel_coordinates(sweep: SweepConfig, trials: Sequence[TrialRecord]) -> bytes | None:
    """Returns a PNG with one line per finished trial through its settings, its category scores and the mean score.

    Returns None if no trial finished.
    """
    scored = sorted(records.finished_records(trials), key=records.rank_key, reverse=True)
    if not scored:
        return None
    keys = list(sweep.space)
    categories = list(scored[0].categories) if len(scored[0].categories) > 1 else []
    columns: list[tuple[str, list[float], list[tuple[float, str]]]] = []
    for key in keys:
        positions, ticks = _place_on_setting_axis(sweep, key, [record.point[key] for record in scored])
        columns.append((key.replace(".", ".\n", 1), positions, ticks))
    results = [(name, [record.categories[name]["score"] for record in scored]) for name in categories]
    results.append(("mean score" if categories else "score", [record.score or 0.0 for record in scored]))
    for name, values in results:
        columns.append((name, *_place_on_score_axis(values)))
    figure, axes = _make_figure(1.6 * len(columns) + 1.6, 4.4)
    low, high = score_axis(results[-1][1])
    rng = np.random.default_rng(0)
    # Jitter, so that lines with equal settings do not cover each other.
    jitter = rng.uniform(-0.012, 0.012, (len(scored), len(columns)))
    jitter[:, len(keys) :] = 0
    for number, record in enumerate(scored):
        is_best = number == len(scored) - 1
        relative_score = ((record.score or 0.0) - low) / (high - low)
        heights = [column[1][number] + jitter[number, column_index] for column_index, column in enumerate(columns)]
        axes.plot(
            range(len(columns)),
            heights,
            color=_BEST if is_best else _score_colour(relative_score),
            linewidth=2.6 if is_best else 1.3,
            alpha=1.0 if is_best else 0.85,
            zorder=3 if is_best else 2,
            label=f"best: trial {record.number}" if is_best else None,
        )
    for column_index, (_, _, ticks) in enumerate(columns):
        axes.axvline(column_index, color="#5f6b76", linewidth=1.0, zorder=1)
        for height, text in ticks:
            axes.text(
                column_index + 0.05, height, escape_text(text), fontsize=8, va="center", zorder=4,
                bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8},
            )  # fmt: skip
    axes.set_xticks(range(len(columns)), [escape_text(column[0]) for column in columns], fontsize=9)
    axes.set_yticks([])
    axes.set_xlim(-0.2, len(columns) - 1 + 0.55)
    axes.set_ylim(-0.08, 1.12)
    axes.legend(loc="upper left", fontsize=8, frameon=False, ncols=2)
    title = f"{len(scored)} finished trials, {describe_range(results[-1][1])}; darker is better"
    axes.set_title(
        f"{title}\n{records.describe_objective(sweep)}; axes of scores span {MIN_SPAN:g} at least", fontsize=10
    )
    return _encode_png(figure)


def learning_curves(sweep: SweepConfig, trials: Sequence[TrialRecord]) -> bytes | None:
    """Returns a PNG of the score by epoch with one panel per category. The curve of a pruned trial is grey and short.

    Returns None if nothing was trained.
    """
    categories = list(dict.fromkeys(name for record in trials for name in record.categories))
    if not any(len(curve) > 1 for record in trials for curve in record.curves().values()):
        return None
    best = records.best_records(trials)
    best_names = {record.name for record in best.values()}
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(categories), 3.6), layout="constrained")
    panels = figure.subplots(1, len(categories), squeeze=False)[0]
    for panel, category in zip(panels, categories, strict=True):
        _style_axes(panel)
        panel_scores: list[float] = []
        for record in trials:
            curve = record.curves().get(category)
            if not curve:
                continue
            epochs, scores = zip(*curve, strict=True)
            panel_scores += scores
            is_best, is_cut = record.name in best_names, record.status != "finished"
            panel.plot(
                epochs, scores, marker="x" if is_cut else "o", markersize=4,
                markevery=[len(curve) - 1] if len(curve) > 1 else None,
                color=_BEST if is_best else _CUT if is_cut else "#2c6fad",
                linewidth=2.4 if is_best else 1.1, zorder=3 if is_best else 1 if is_cut else 2,
            )  # fmt: skip
        low, high = score_axis(panel_scores)
        panel.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        panel.set_title(f"{escape_text(category)}\n{describe_range(panel_scores)}", fontsize=10)
        panel.set_xlabel("epochs")
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel(records.describe_objective(sweep), fontsize=9)
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=_BEST, linewidth=2.4, marker="o", markersize=4, label="best"),
        Line2D([], [], color="#2c6fad", marker="o", markersize=4, label="finished"),
        Line2D([], [], color=_CUT, marker="x", markersize=4, label="cut"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return _encode_png(figure)


def importance_plot(sweep: SweepConfig, importance: dict[str, float] | None, num_trials: int) -> bytes | None:
    """Returns a PNG of the parameter importance; None if there is none."""
    if not importance:
        return None
    keys = list(importance)[::-1]
    figure, axes = _make_figure(6.4, 1.1 + 0.42 * len(keys))
    axes.barh(keys, [importance[key] for key in keys], color="#2c6fad", height=0.6)
    for number, key in enumerate(keys):
        axes.text(importance[key] + 0.012, number, f"{importance[key]:.2f}", va="center", fontsize=9)
    axes.set_xlim(0, max(importance.values()) * 1.15 + 0.02)
    axes.set_xlabel("share of the score's variance (fANOVA)")
    axes.set_title(f"from {num_trials} finished trials", fontsize=10)
    axes.grid(axis="x", color=_GRID)
    return _encode_png(figure)


def _place_on_setting_axis(
    sweep: SweepConfig, key: str, values: Sequence[Any]
) -> tuple[list[float], list[tuple[float, str]]]:
    """Returns the heights in [0, 1] of values on the axis of a setting, and the ticks (height, text)."""
    domain = sweep.space[key]
    if domain.choice is not None:
        texts = [json.dumps(value) for value in domain.choice]
        heights = np.linspace(0, 1, len(texts)) if len(texts) > 1 else np.array([0.5])
        labels = [
            (float(height), records.format_value(value)) for height, value in zip(heights, domain.choice, strict=True)
        ]
        return [float(heights[texts.index(json.dumps(value))]) for value in values], labels
    low, high = (np.log(domain.ends) if domain.is_log else np.asarray(domain.ends)).tolist()
    numbers = np.log(values) if domain.is_log else np.asarray(values, dtype=float)
    tick_heights = np.linspace(0, 1, 3)
    ticks = low + tick_heights * (high - low)
    labels_shown = [records.format_value(float(np.exp(tick) if domain.is_log else tick)) for tick in ticks]
    return [float(v) for v in (numbers - low) / (high - low)], list(
        zip(tick_heights.tolist(), labels_shown, strict=True)
    )


def _place_on_score_axis(values: Sequence[float]) -> tuple[list[float], list[tuple[float, str]]]:
    """Returns the heights in [0, 1] of scores on their axis, and the ticks (height, text)."""
    low, high = score_axis(values)
    ticks = [(height, f"{end:.{records.DECIMALS}f}") for height, end in ((0.0, low), (1.0, high))]
    return [(value - low) / (high - low) for value in values], ticks


def _score_colour(relative_score: float) -> str:
    """Returns a colour from pale blue (0) to dark blue (1). Brightness alone shows the score, so a grey print is readable."""
    start, end = np.array([190, 212, 232]), np.array([16, 58, 110])
    return "#" + "".join(f"{int(v):02x}" for v in start + relative_score * (end - start))


def _make_figure(width: float, height: float) -> tuple[Any, Any]:
    """Returns a Matplotlib figure with one styled pair of axes."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures in memory and may need a display

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _style_axes(axes)
    return figure, axes


def _style_axes(axes: Any) -> None:
    """Sets the style of axes."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_GRID)
    axes.tick_params(labelsize=9)


def _encode_png(figure: Any) -> bytes:
    """Returns a figure as PNG bytes.

    The metadata contains `drawings.MARK`, so that no command mistakes the plot for a photograph.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": MARK})
    return buffer.getvalue()
