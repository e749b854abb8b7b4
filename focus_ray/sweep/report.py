"""The report of a sweep: tables, best configurations, parameter importance, plots and one HTML page. No Ray."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from focus_ray.drawing.sweep_plots import importance_plot
from focus_ray.reporting.page import png_uri, render
from focus_ray.storage.files import join, write_bytes
from focus_ray.sweep import records, summary
from focus_ray.sweep.plots import learning_curves, parallel_coordinates
from focus_ray.sweep.proposer import optuna_distributions
from focus_ray.sweep.records import TrialRecord
from focus_ray.sweep.settings import SweepConfig

_MIN_FOR_IMPORTANCE = 4  # finished trials; with fewer, importance has no meaning


def write_report(root: str, sweep: SweepConfig, trials: Sequence[TrialRecord]) -> list[str]:
    """Writes the report into the folder of the sweep.

    Returns:
        The names of the files.
    """
    files: dict[str, bytes] = {"trials.parquet": _encode_parquet(sweep, trials)}
    best = records.best_records(trials)
    for stage, record in best.items():
        files[records.best_file_name(stage)] = records.best_config_yaml(sweep, record, root).encode()
    pictures: dict[str, list[tuple[str, str, bytes]]] = {}
    importances: dict[str, dict[str, float] | None] = {}
    for stage in summary.list_stages(trials):
        stage_trials = [record for record in trials if record.stage == stage]
        suffix = "" if stage is None else f"-{stage}"
        importance = importances[stage or ""] = parameter_importance(sweep, stage_trials)
        plots = [
            ("parallel", "Settings and scores", parallel_coordinates(sweep, stage_trials)),
            ("curves", "Learning curves", learning_curves(sweep, stage_trials)),
        ]
        if importance:
            num_finished = len(records.finished_records(stage_trials))
            plots.append(("importance", "Parameter importance", importance_plot(importance, num_finished)))
        for name, title, picture in plots:
            if picture is not None:
                files[f"{name}{suffix}.png"] = picture
                pictures.setdefault(stage or "", []).append((f"{name}{suffix}.png", title, picture))
    files["report.md"] = _format_markdown(root, sweep, trials).encode()
    facts = {
        "objective": sweep.objective,
        "labelled": records.is_labelled(sweep),
        "best": {stage or "all": {"number": r.number, "score": r.score, "point": r.point} for stage, r in best.items()},
        "level": {
            stage or "all": sorted(record.number for record in [*ties.equal, *ties.near])
            for stage, winner in best.items()
            for ties in [summary.find_ties(sweep, [r for r in trials if r.stage == stage], winner)]
        },
        "caveats": {
            stage or "all": summary.summarize_stage(sweep, trials, stage).caveats
            for stage in summary.list_stages(trials)
        },
        "importance": importances,
        "num_trials": len(trials),
        "epochs": sum(record.epochs for record in trials),
    }
    files["report.json"] = (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode()
    files["report.html"] = _render_page(root, sweep, trials, pictures, importances)
    for name, data in files.items():
        write_bytes(join(root, name), data)
    return list(files)


def parameter_importance(sweep: SweepConfig, trials: Sequence[TrialRecord]) -> dict[str, float] | None:
    """Returns each key's share of the score's variance, the largest first (fANOVA on a random forest, with Optuna).

    Returns None if the shares would mean nothing: too few finished trials, or equal scores.
    """
    scored = records.finished_records(trials)
    if (
        len(scored) < _MIN_FOR_IMPORTANCE
        or len({round(record.score or 0.0, records.DECIMALS) for record in scored}) < 2
    ):
        return None
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    spaces = optuna_distributions(sweep)
    varied_keys = {key for key in sweep.space if len({json.dumps(record.point[key]) for record in scored}) > 1}
    if not varied_keys:
        return None
    for record in scored:
        values = {
            key: json.dumps(record.point[key]) if sweep.space[key].choice is not None else record.point[key]
            for key in sorted(varied_keys)
        }
        study.add_trial(
            optuna.trial.create_trial(
                params=values,
                distributions={key: spaces[key] for key in sorted(varied_keys)},
                value=record.score,
            )
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {
        **{key: float(value) for key, value in shares.items()},
        **{key: 0.0 for key in sweep.space if key not in varied_keys},
    }


def _format_markdown(root: str, sweep: SweepConfig, trials: Sequence[TrialRecord]) -> str:
    """Returns the text of report.md: the table of trials, the sentences, and the commands that train the best settings."""
    commands = "\n".join(summary.train_commands(root, trials))
    code_block = f"\n```\n{commands}\n```\n" if commands else ""
    return f"{records.summary_table(sweep, trials)}\n{summary.format_summaries(sweep, trials)}{code_block}"


def _encode_parquet(sweep: SweepConfig, trials: Sequence[TrialRecord]) -> bytes:
    """Returns a Parquet file with one row per trial: settings (`param:<key>`), scores (`score:<category>`) and the result."""
    categories = list(dict.fromkeys(name for record in trials for name in record.categories))
    columns: dict[str, Any] = {
        "number": pa.array([record.number for record in trials], pa.int64()),
        "stage": pa.array([record.stage for record in trials], pa.string()),
        "status": pa.array([record.status for record in trials], pa.string()),
        "score": pa.array([record.score for record in trials], pa.float64()),
        "epochs": pa.array([record.epochs for record in trials], pa.int64()),
        "seconds": pa.array([record.seconds for record in trials], pa.float64()),
        "reason": pa.array([record.reason for record in trials], pa.string()),
    }
    for key in sweep.space:
        values = [record.point.get(key) for record in trials]
        is_numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        columns[f"param:{key}"] = pa.array(values if is_numeric else [json.dumps(value) for value in values])
    for name in categories:
        scores = [record.categories.get(name, {}).get("score") for record in trials]
        columns[f"score:{name}"] = pa.array(scores, pa.float64())
    metadata = {b"objective": sweep.objective.encode(), b"labelled": str(records.is_labelled(sweep)).encode()}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), buffer)
    return buffer.getvalue()


def _render_page(
    root: str,
    sweep: SweepConfig,
    trials: Sequence[TrialRecord],
    pictures: dict[str, list[tuple[str, str, bytes]]],
    importances: dict[str, dict[str, float] | None],
) -> bytes:
    """Returns the HTML page as UTF-8 bytes."""
    best = records.best_records(trials)
    return render(
        "sweep.html",
        title=f"Sweep {sweep.name}",
        place=root,
        counts={status: sum(record.status == status for record in trials) for status in ("finished", "cut", "failed")},
        epochs=sum(record.epochs for record in trials),
        seconds=sum(record.seconds for record in trials),
        searcher=sweep.searcher,
        seed=sweep.seed,
        objective=records.describe_objective(sweep),
        is_labelled=records.is_labelled(sweep),
        min_for_importance=_MIN_FOR_IMPORTANCE,
        stages=[
            _stage_values(
                root,
                sweep,
                trials,
                stage,
                best.get(stage),
                pictures.get(stage or "", []),
                importances.get(stage or "") is not None,
            )
            for stage in summary.list_stages(trials)
        ],
        settings=json.dumps(sweep.model_dump(mode="json", exclude={"base"}), indent=1, ensure_ascii=False),
    )


def _stage_values(
    root: str,
    sweep: SweepConfig,
    trials: Sequence[TrialRecord],
    stage: str | None,
    winner: TrialRecord | None,
    pictures: Sequence[tuple[str, str, bytes]],
    has_importance: bool,
) -> dict[str, Any]:
    """Returns the template's values for one stage."""
    stage_trials = [record for record in trials if record.stage == stage]
    summary_of_stage = summary.summarize_stage(sweep, trials, stage)
    return {
        "name": "All categories" if stage is None else stage,
        "words": [
            sentence
            for sentence in (summary_of_stage.best, *summary_of_stage.ties, *summary_of_stage.caveats)
            if sentence is not None
        ],
        "command": None if winner is None else summary.train_commands(root, [winner])[0],
        "table": _table_rows(sweep, stage_trials, winner),
        "pictures": {title: png_uri(picture) for _, title, picture in pictures},
        "has_importance": has_importance,
    }


def _table_rows(
    sweep: SweepConfig, stage_trials: Sequence[TrialRecord], winner: TrialRecord | None
) -> tuple[list[str], list[tuple[str, list[str], str]]]:
    """Returns the headers, and for each trial, the best first, (CSS class of the row, cells, status text)."""
    categories = list(dict.fromkeys(name for record in stage_trials for name in record.categories))
    categories = categories if len(categories) > 1 else []
    head = ["trial", *sweep.space, "score", *categories, *(["spread"] if categories else []), "epochs", "seconds"]
    rows = []
    for record in sorted(stage_trials, key=records.rank_key):
        scores = [record.score, *(record.categories.get(name, {}).get("score") for name in categories)]
        if categories:
            scores.append(record.spread)
        cells = [str(record.number), *(records.format_value(record.point.get(key)) for key in sweep.space)]
        cells += ["-" if score is None else f"{score:.{records.DECIMALS}f}" for score in scores]
        cells += [str(record.epochs), f"{record.seconds:.1f}"]
        mark = "best" if winner is not None and record.number == winner.number else record.status
        rows.append((mark, cells, record.status + (f": {record.reason}" if record.reason else "")))
    return head, rows
