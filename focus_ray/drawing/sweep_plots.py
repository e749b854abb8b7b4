"""The plots of a sweep as PNG: settings with scores, learning curves, parameter importance."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from focus_ray.drawing.mark import MARK
from focus_ray.drawing.plots import create_figure, escape_matplotlib_text

MIN_SPAN = 0.02  # least length of a score axis: twice the noise of a score (`summary.NOISE`)
_BEST, _FINISHED, _CUT = "#c0392b", "#2c6fad", "#9aa5b1"
_LABEL_BOX = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
_CURVE_STYLES: dict[str, dict[str, Any]] = {
    "best": {"color": _BEST, "linewidth": 2.4, "marker": "o", "zorder": 3},
    "finished": {"color": _FINISHED, "linewidth": 1.1, "marker": "o", "zorder": 2},
    "cut": {"color": _CUT, "linewidth": 1.1, "marker": "x", "zorder": 1},
}


class VerticalAxis(NamedTuple):
    """A vertical axis. heights: of each line, in 0..1.  ticks: (height, text)."""

    name: str
    heights: list[float]
    ticks: list[tuple[float, str]]


class LearningCurve(NamedTuple):
    """Scores of a trial by step. kind: best, finished or cut."""

    steps: Sequence[float]
    scores: Sequence[float]
    kind: str


def compute_score_axis_limits(values: Sequence[float]) -> tuple[float, float]:
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


def describe_score_range(values: Sequence[float]) -> str:
    """Returns the range of scores as text: "scores 0.9100 to 0.9500"; "score 0.9100" if both ends print the same."""
    low, high = (f"{value:.4f}" for value in (min(values), max(values)))
    return f"score {low}" if low == high else f"scores {low} to {high}"


def plot_parallel_coordinates(
    settings: Sequence[VerticalAxis], scores: Mapping[str, Sequence[float]], best: str, objective: str
) -> bytes:
    """Returns a PNG with one line per trial through its settings and its scores. The last trial is the best.

    Args:
        settings: the axes of the settings.
        scores: name of an axis -> score of each trial; the last axis has the score that ranks the trials.
        best: name of the best trial.
        objective: what the scores measure.
    """
    columns = [*settings, *(_make_score_axis(name, values) for name, values in scores.items())]
    figure, (axes,) = create_figure(1.6 * len(columns) + 1.6, 4.4)
    ranking = list(scores.values())[-1]
    low, high = compute_score_axis_limits(ranking)
    # Jitter, so that lines with equal settings do not cover each other.
    jitter = np.random.default_rng(0).uniform(-0.012, 0.012, (len(ranking), len(columns)))
    jitter[:, len(settings) :] = 0
    for number, score in enumerate(ranking):
        heights = [column.heights[number] + jitter[number, index] for index, column in enumerate(columns)]
        if number == len(ranking) - 1:
            style = {"color": _BEST, "linewidth": 2.6, "zorder": 3, "label": f"best: {best}"}
        else:
            colour = _choose_score_colour((score - low) / (high - low))
            style = {"color": colour, "linewidth": 1.3, "alpha": 0.85, "zorder": 2}
        axes.plot(range(len(columns)), heights, **style)
    for index, column in enumerate(columns):
        axes.axvline(index, color="#5f6b76", linewidth=1.0, zorder=1)
        for height, text in column.ticks:
            label = escape_matplotlib_text(text)
            axes.text(index + 0.05, height, label, fontsize=8, va="center", zorder=4, bbox=_LABEL_BOX)
    axes.set_xticks(range(len(columns)), [escape_matplotlib_text(column.name) for column in columns], fontsize=9)
    axes.set_yticks([])
    axes.set_xlim(-0.2, len(columns) - 1 + 0.55)
    axes.set_ylim(-0.08, 1.12)
    axes.legend(loc="upper left", fontsize=8, frameon=False, ncols=2)
    title = f"{len(ranking)} finished trials, {describe_score_range(ranking)}; darker is better"
    axes.set_title(f"{title}\n{objective}; axes of scores span {MIN_SPAN:g} at least", fontsize=10)
    return _render_png(figure)


def plot_learning_curves(panels: Mapping[str, Sequence[LearningCurve]], objective: str) -> bytes:
    """Returns a PNG of the score by step with one panel per category. The curve of a pruned trial is grey and short.

    Args:
        panels: category -> its curves.
        objective: what the scores measure.
    """
    from matplotlib.lines import Line2D

    figure, all_axes = create_figure(4.6 * len(panels), 3.6, columns=len(panels))
    for axes, (category, curves) in zip(all_axes, panels.items(), strict=True):
        for steps, scores, kind in curves:
            last = [len(scores) - 1] if len(scores) > 1 else None
            axes.plot(steps, scores, markersize=4, markevery=last, **_CURVE_STYLES[kind])
        panel_scores = [score for curve in curves for score in curve.scores]
        low, high = compute_score_axis_limits(panel_scores)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axes.set_title(f"{escape_matplotlib_text(category)}\n{describe_score_range(panel_scores)}", fontsize=10)
        axes.set_xlabel("optimiser steps")
        axes.xaxis.get_major_locator().set_params(integer=True)
    all_axes[0].set_ylabel(objective, fontsize=9)
    handles = [Line2D([], [], markersize=4, label=kind, **style) for kind, style in _CURVE_STYLES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return _render_png(figure)


def plot_parameter_importance(importance: Mapping[str, float], num_trials: int) -> bytes:
    """Returns a PNG of the parameter importance: setting -> share of the score's variance."""
    keys = list(importance)[::-1]
    figure, (axes,) = create_figure(6.4, 1.1 + 0.42 * len(keys))
    axes.barh(keys, [importance[key] for key in keys], color=_FINISHED, height=0.6)
    for number, key in enumerate(keys):
        axes.text(importance[key] + 0.012, number, f"{importance[key]:.2f}", va="center", fontsize=9)
    axes.set_xlim(0, max(importance.values()) * 1.15 + 0.02)
    axes.set_xlabel("share of the score's variance (fANOVA)")
    axes.set_title(f"from {num_trials} finished trials", fontsize=10)
    axes.grid(axis="x", color="#e3e7eb")
    return _render_png(figure)


def _make_score_axis(name: str, values: Sequence[float]) -> VerticalAxis:
    """Returns the axis of scores."""
    low, high = compute_score_axis_limits(values)
    heights = [(value - low) / (high - low) for value in values]
    return VerticalAxis(name, heights, [(0.0, f"{low:.4f}"), (1.0, f"{high:.4f}")])


def _choose_score_colour(relative_score: float) -> str:
    """Returns a colour from pale blue (0) to dark blue (1). Brightness alone shows the score, so a grey print is readable."""
    start, end = np.array([190, 212, 232]), np.array([16, 58, 110])
    return "#" + bytes((start + relative_score * (end - start)).astype(np.uint8).tolist()).hex()


def _render_png(figure: Any) -> bytes:
    """Returns a figure as PNG bytes.

    The metadata contains `mark.MARK`, so that no command mistakes the plot for a photograph.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": MARK})
    return buffer.getvalue()
