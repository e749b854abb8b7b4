"""Writes the report of a sweep: tables, best configurations, parameter importance, plots and one HTML page. Without Ray."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from focus_ray.drawing.sweep_plots import plot_parameter_importance
from focus_ray.reporting.page import encode_data_uri, render_page
from focus_ray.storage.files import join_path, write_bytes
from focus_ray.sweep import records, summary
from focus_ray.sweep.plots import draw_learning_curves, draw_parallel_coordinates
from focus_ray.sweep.proposer import SettingsProposer
from focus_ray.sweep.records import TrialRecord
from focus_ray.sweep.settings import SweepConfig

_MIN_FOR_IMPORTANCE = 4  # finished trials; with fewer, importance has no meaning


def write_sweep_report(root: str, sweep: SweepConfig, trials: Sequence[TrialRecord]) -> list[str]:
    """Writes the report of a sweep (tables, plots, best configurations, HTML page) into its folder. Replaces an older report.

    Args:
        root: Folder of the sweep.
        sweep: Configuration of the sweep.
        trials: Results of the trials.

    Returns:
        The names of the written files.

    Raises:
        DataError: A file cannot be written.
    """
    commands = summary.list_train_commands(root, trials)
    code_block = "\n```\n" + "\n".join(commands) + "\n```\n" if commands else ""
    files: dict[str, bytes] = {
        "trials.parquet": _encode_trials_as_parquet(sweep, trials),
        "report.md": (summary.format_sweep_summary(sweep, trials) + code_block).encode(),
    }
    summaries = summary.summarize_stages(sweep, trials)
    importances: dict[str, dict[str, float] | None] = {}
    sections = []
    for stage in summaries:
        stage_trials = [record for record in trials if record.stage == stage.stage]
        importance = importances[stage.stage or ""] = estimate_parameter_importance(sweep, stage_trials)
        num_finished = len(records.select_finished_records(stage_trials))
        plots = {
            ("parallel", "Settings and scores"): draw_parallel_coordinates(sweep, stage_trials),
            ("curves", "Learning curves"): draw_learning_curves(sweep, stage_trials),
            ("importance", "Parameter importance"): plot_parameter_importance(importance, num_finished)
            if importance
            else None,
        }
        pictures = {}
        for (name, title), picture in plots.items():
            if picture is not None:
                files[f"{name}-{stage.stage}.png" if stage.stage else f"{name}.png"] = picture
                pictures[title] = encode_data_uri("png", picture)
        if stage.best is not None:
            best_yaml = records.format_best_config(sweep, stage.best, root)
            files[records.name_best_config_file(stage.stage)] = best_yaml.encode()
        rows = [  # CSS class, cells, and status with the reason
            (
                "best" if record is stage.best else record.status,
                cells[:-1],
                ": ".join(filter(None, (record.status, record.reason))),
            )
            for record, cells in zip(stage.trials, stage.rows, strict=True)
        ]
        sections.append(
            {
                "name": stage.stage or "All categories",
                "words": [*stage.results, *stage.caveats],
                "command": None if stage.best is None else summary.list_train_commands(root, [stage.best])[0],
                "table": (stage.header[:-1], rows),
                "pictures": pictures,
                "has_importance": importance is not None,
            }
        )
    best = {stage.stage or "all": stage.best for stage in summaries if stage.best is not None}
    facts = {
        "objective": sweep.objective,
        "labelled": records.uses_labelled_images(sweep),
        "best": {name: {"number": r.number, "score": r.score, "point": r.point} for name, r in best.items()},
        "level": {stage.stage or "all": sorted(r.number for r in stage.ties) for stage in summaries if stage.best},
        "caveats": {stage.stage or "all": stage.caveats for stage in summaries},
        "importance": importances,
        "num_trials": len(trials),
        "steps": sum(record.steps for record in trials),
    }
    files["report.json"] = (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode()
    files["report.html"] = render_page(
        "sweep.html",
        title=f"Sweep {sweep.name}",
        place=root,
        counts=records.count_statuses(trials),
        steps=facts["steps"],
        seconds=sum(record.seconds for record in trials),
        searcher=sweep.searcher,
        seed=sweep.seed,
        objective=records.describe_objective(sweep),
        is_labelled=records.uses_labelled_images(sweep),
        min_for_importance=_MIN_FOR_IMPORTANCE,
        stages=sections,
        settings=json.dumps(sweep.model_dump(mode="json", exclude={"base"}), indent=1, ensure_ascii=False),
    )
    for name, data in files.items():
        write_bytes(join_path(root, name), data)
    return list(files)


def estimate_parameter_importance(sweep: SweepConfig, trials: Sequence[TrialRecord]) -> dict[str, float] | None:
    """Estimates how much each searched setting changes the score (fANOVA on a random forest, with Optuna).

    Args:
        sweep: Configuration of the sweep.
        trials: Results of the trials of one stage.

    Returns: dotted key of a setting -> its share of the variance of the score, the largest first. None if the shares would mean
        nothing: too few finished trials, or equal scores or settings.
    """
    finished = records.select_finished_records(trials)
    varied_keys = sorted(key for key in sweep.space if len({json.dumps(r.point[key]) for r in finished}) > 1)
    num_scores = len({round(record.score or 0.0, records.DECIMALS) for record in finished})
    if len(finished) < _MIN_FOR_IMPORTANCE or num_scores < 2 or not varied_keys:
        return None
    import optuna

    proposer = SettingsProposer(sweep.model_copy(update={"searcher": "optuna"}))
    for record in finished:
        proposer.record_result(record.number, record.point, record.score)
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(proposer.study, evaluator=evaluator, params=varied_keys)
    return {**shares, **{key: 0.0 for key in sweep.space if key not in varied_keys}}


def _encode_trials_as_parquet(sweep: SweepConfig, trials: Sequence[TrialRecord]) -> bytes:
    """Returns a Parquet file with one row per trial: settings (`param:<key>`), scores (`score:<category>`) and the result.

    The metadata of the file contains the objective of the sweep.
    """
    kinds = {"number": pa.int64(), "stage": pa.string(), "status": pa.string(), "score": pa.float64()}
    kinds |= {"steps": pa.int64(), "seconds": pa.float64(), "reason": pa.string()}
    columns: dict[str, Any] = {
        name: pa.array([getattr(record, name) for record in trials], kind) for name, kind in kinds.items()
    }
    for key in sweep.space:
        values = [record.point.get(key) for record in trials]
        is_numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        columns[f"param:{key}"] = pa.array(values if is_numeric else [json.dumps(value) for value in values])
    for name in dict.fromkeys(name for record in trials for name in record.categories):
        columns[f"score:{name}"] = pa.array([record.category_scores.get(name) for record in trials], pa.float64())
    metadata = {b"objective": sweep.objective.encode(), b"labelled": str(records.uses_labelled_images(sweep)).encode()}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), buffer)
    return buffer.getvalue()
