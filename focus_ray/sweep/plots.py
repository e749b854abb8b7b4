"""Draws the plots of a sweep's report from the results of its trials."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from focus_ray.drawing import sweep_plots
from focus_ray.drawing.sweep_plots import LearningCurve, VerticalAxis
from focus_ray.sweep import records
from focus_ray.sweep.records import TrialRecord
from focus_ray.sweep.settings import SweepConfig


def draw_parallel_coordinates(sweep: SweepConfig, trials: Sequence[TrialRecord]) -> bytes | None:
    """Draws a PNG with one line per finished trial through its settings, its category scores and its mean score.

    Args:
        sweep: Configuration of the sweep.
        trials: Results of the trials.

    Returns: the bytes of the PNG; None if no trial finished.
    """
    scored = sorted(records.select_finished_records(trials), key=records.make_ranking_key, reverse=True)
    if not scored:
        return None
    settings = [_make_setting_axis(sweep, key, [record.point[key] for record in scored]) for key in sweep.space]
    categories = list(scored[0].categories) if len(scored[0].categories) > 1 else []
    scores = {name: [record.categories[name]["score"] for record in scored] for name in categories}
    scores["mean score" if categories else "score"] = [record.score or 0.0 for record in scored]
    best = f"trial {scored[-1].number}"
    return sweep_plots.plot_parallel_coordinates(settings, scores, best, records.describe_objective(sweep))


def draw_learning_curves(sweep: SweepConfig, trials: Sequence[TrialRecord]) -> bytes | None:
    """Draws a PNG of the score by training step, with one panel per category.

    Args:
        sweep: Configuration of the sweep.
        trials: Results of the trials.

    Returns: the bytes of the PNG; None if no trial has more than one score for a category.
    """
    if not any(len(curve) > 1 for record in trials for curve in record.parse_curves().values()):
        return None
    best_names = {record.name for record in records.find_best_records(trials).values()}
    panels: dict[str, list[LearningCurve]] = {name: [] for record in trials for name in record.categories}
    for record in trials:
        kind = "best" if record.name in best_names else "finished" if record.status == "finished" else "cut"
        for category, curve in record.parse_curves().items():
            if curve:
                steps, scores = zip(*curve, strict=True)
                panels[category].append(LearningCurve(steps, scores, kind))
    return sweep_plots.plot_learning_curves(panels, records.describe_objective(sweep))


def _make_setting_axis(sweep: SweepConfig, key: str, values: Sequence[Any]) -> VerticalAxis:
    """Returns the plot axis of a setting: listed values at equal distances, or numbers between the ends of their range.

    Args:
        sweep: Configuration of the sweep.
        key: Dotted key of the setting.
        values: Value of each trial.
    """
    domain, name = sweep.space[key], key.replace(".", ".\n", 1)
    if domain.choice is not None:
        texts = [json.dumps(value) for value in domain.choice]
        heights = np.linspace(0, 1, len(texts)).tolist() if len(texts) > 1 else [0.5]
        labels = [records.format_setting_value(value) for value in domain.choice]
        return VerticalAxis(
            name, [heights[texts.index(json.dumps(v))] for v in values], list(zip(heights, labels, strict=True))
        )
    low, high = (np.log(domain.bounds) if domain.is_logarithmic else np.asarray(domain.bounds)).tolist()
    numbers = np.log(values) if domain.is_logarithmic else np.asarray(values, dtype=float)
    tick_heights = np.linspace(0, 1, 3)
    ticks = low + tick_heights * (high - low)
    labels = [records.format_setting_value(float(np.exp(tick) if domain.is_logarithmic else tick)) for tick in ticks]
    return VerticalAxis(
        name, ((numbers - low) / (high - low)).tolist(), list(zip(tick_heights.tolist(), labels, strict=True))
    )
