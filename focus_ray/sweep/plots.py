"""A sweep's plots as PNG: settings against scores, learning curves, parameter importance. No Ray."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from focus_ray.drawings import MARK
from focus_ray.reporting.plots import plain
from focus_ray.sweep import records
from focus_ray.sweep.records import Record
from focus_ray.sweep.settings import SweepConfig

MIN_SPAN = 0.02  # of a score axis: twice what a score's noise is (`summary.NOISE`)
_BEST, _CUT, _GRID = "#c0392b", "#9aa5b1", "#e3e7eb"


def score_axis(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis of scores: theirs, or further apart where that would magnify noise.

    At least `MIN_SPAN` for scores in [0, 1], which it then does not leave, and 2 % of the largest for others.
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


def range_words(values: Sequence[float]) -> str:
    low, high = (f"{value:.{records.DECIMALS}f}" for value in (min(values), max(values)))
    return f"score {low}" if low == high else f"scores {low} to {high}"


def parallel_coordinates(sweep: SweepConfig, found: Sequence[Record]) -> bytes | None:
    """A line a finished trial through its settings, the scores of its categories and the mean; PNG."""
    scored = sorted(records.scored(found), key=records.rank, reverse=True)
    if not scored:
        return None
    keys = list(sweep.space)
    categories = list(scored[0].categories) if len(scored[0].categories) > 1 else []
    columns: list[tuple[str, list[float], list[tuple[float, str]]]] = []
    for key in keys:
        positions, ticks = _axis(sweep, key, [record.point[key] for record in scored])
        columns.append((key.replace(".", ".\n", 1), positions, ticks))
    results = [(name, [record.categories[name]["score"] for record in scored]) for name in categories]
    results.append(("mean score" if categories else "score", [record.score or 0.0 for record in scored]))
    for name, values in results:
        columns.append((name, *_scale(values)))
    figure, axes = _figure(1.6 * len(columns) + 1.6, 4.4)
    low, high = score_axis(results[-1][1])
    rng = np.random.default_rng(0)
    shift = rng.uniform(-0.012, 0.012, (len(scored), len(columns)))  # so that equal settings stay apart
    shift[:, len(keys) :] = 0
    for number, record in enumerate(scored):
        is_best = number == len(scored) - 1
        place = ((record.score or 0.0) - low) / (high - low)
        heights = [column[1][number] + shift[number, at] for at, column in enumerate(columns)]
        axes.plot(
            range(len(columns)),
            heights,
            color=_BEST if is_best else _shade(place),
            linewidth=2.6 if is_best else 1.3,
            alpha=1.0 if is_best else 0.85,
            zorder=3 if is_best else 2,
            label=f"best: trial {record.number}" if is_best else None,
        )
    for at, (_, _, ticks) in enumerate(columns):
        axes.axvline(at, color="#5f6b76", linewidth=1.0, zorder=1)
        for height, text in ticks:
            axes.text(
                at + 0.05, height, plain(text), fontsize=8, va="center", zorder=4,
                bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8},
            )  # fmt: skip
    axes.set_xticks(range(len(columns)), [plain(column[0]) for column in columns], fontsize=9)
    axes.set_yticks([])
    axes.set_xlim(-0.2, len(columns) - 1 + 0.55)
    axes.set_ylim(-0.08, 1.12)
    axes.legend(loc="upper left", fontsize=8, frameon=False, ncols=2)
    title = f"{len(scored)} finished trials, {range_words(results[-1][1])}; darker is better"
    axes.set_title(f"{title}\n{records.objective_words(sweep)}; axes of scores span {MIN_SPAN:g} at least", fontsize=10)
    return _png(figure)


def learning_curves(sweep: SweepConfig, found: Sequence[Record]) -> bytes | None:
    """The score by epoch, a panel a category, trials that were cut in grey up to where they were; PNG. None where nothing
    was trained."""
    categories = list(dict.fromkeys(name for record in found for name in record.categories))
    if not any(len(curve) > 1 for record in found for curve in record.curves().values()):
        return None
    best = records.best_of(found)
    names = {record.name for record in best.values()}
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(categories), 3.6), layout="constrained")
    panels = figure.subplots(1, len(categories), squeeze=False)[0]
    for panel, category in zip(panels, categories, strict=True):
        _style(panel)
        seen: list[float] = []
        for record in found:
            curve = record.curves().get(category)
            if not curve:
                continue
            epochs, scores = zip(*curve, strict=True)
            seen += scores
            is_best, is_cut = record.name in names, record.status != "finished"
            panel.plot(
                epochs, scores, marker="x" if is_cut else "o", markersize=4,
                markevery=[len(curve) - 1] if len(curve) > 1 else None,
                color=_BEST if is_best else _CUT if is_cut else "#2c6fad",
                linewidth=2.4 if is_best else 1.1, zorder=3 if is_best else 1 if is_cut else 2,
            )  # fmt: skip
        low, high = score_axis(seen)
        panel.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        panel.set_title(f"{plain(category)}\n{range_words(seen)}", fontsize=10)
        panel.set_xlabel("epochs")
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel(records.objective_words(sweep), fontsize=9)
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=_BEST, linewidth=2.4, marker="o", markersize=4, label="best"),
        Line2D([], [], color="#2c6fad", marker="o", markersize=4, label="finished"),
        Line2D([], [], color=_CUT, marker="x", markersize=4, label="cut"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return _png(figure)


def importance_plot(sweep: SweepConfig, importance: dict[str, float] | None, num_trials: int) -> bytes | None:
    if not importance:
        return None
    keys = list(importance)[::-1]
    figure, axes = _figure(6.4, 1.1 + 0.42 * len(keys))
    axes.barh(keys, [importance[key] for key in keys], color="#2c6fad", height=0.6)
    for number, key in enumerate(keys):
        axes.text(importance[key] + 0.012, number, f"{importance[key]:.2f}", va="center", fontsize=9)
    axes.set_xlim(0, max(importance.values()) * 1.15 + 0.02)
    axes.set_xlabel("share of the score's variance (fANOVA)")
    axes.set_title(f"from {num_trials} finished trials", fontsize=10)
    axes.grid(axis="x", color=_GRID)
    return _png(figure)


def _axis(sweep: SweepConfig, key: str, values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights in 0..1 of values on their parameter's axis, and its ticks."""
    domain = sweep.space[key]
    if domain.choice is not None:
        texts = [json.dumps(value) for value in domain.choice]
        heights = np.linspace(0, 1, len(texts)) if len(texts) > 1 else np.array([0.5])
        labels = [(float(height), records.shown(value)) for height, value in zip(heights, domain.choice, strict=True)]
        return [float(heights[texts.index(json.dumps(value))]) for value in values], labels
    low, high = (np.log(domain.ends) if domain.is_log else np.asarray(domain.ends)).tolist()
    numbers = np.log(values) if domain.is_log else np.asarray(values, dtype=float)
    places = np.linspace(0, 1, 3)
    ticks = low + places * (high - low)
    shown = [records.shown(float(np.exp(tick) if domain.is_log else tick)) for tick in ticks]
    return [float(v) for v in (numbers - low) / (high - low)], list(zip(places.tolist(), shown, strict=True))


def _scale(values: Sequence[float]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights in 0..1 of scores on their axis, and its ticks."""
    low, high = score_axis(values)
    ticks = [(place, f"{end:.{records.DECIMALS}f}") for place, end in ((0.0, low), (1.0, high))]
    return [(value - low) / (high - low) for value in values], ticks


def _shade(place: float) -> str:
    """Pale to dark blue: the luminance falls with the score, so that it reads without colour."""
    start, end = np.array([190, 212, 232]), np.array([16, 58, 110])
    return "#" + "".join(f"{int(v):02x}" for v in start + place * (end - start))


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: it keeps figures, and may look for a display

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _style(axes)
    return figure, axes


def _style(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_GRID)
    axes.tick_params(labelsize=9)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": MARK})
    return buffer.getvalue()
