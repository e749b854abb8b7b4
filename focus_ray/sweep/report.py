"""What a sweep found, to look at: table, best configurations, parameter importance, plots, one HTML page. No Ray."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from focus_ray.reporting.page import png_uri, render
from focus_ray.storage import join, write_bytes
from focus_ray.sweep import records, summary
from focus_ray.sweep.plots import importance_plot, learning_curves, parallel_coordinates
from focus_ray.sweep.proposer import distributions
from focus_ray.sweep.records import Record
from focus_ray.sweep.settings import SweepConfig

_MIN_FOR_IMPORTANCE = 4


def write_report(root: str, sweep: SweepConfig, found: Sequence[Record]) -> list[str]:
    """Writes everything beside the records. Returns: the files' names."""
    files: dict[str, bytes] = {"trials.parquet": _parquet(sweep, found)}
    best = records.best_of(found)
    for stage, record in best.items():
        files[records.best_name(stage)] = records.best_config_yaml(sweep, record, root).encode()
    pictures: dict[str, list[tuple[str, str, bytes]]] = {}
    importances: dict[str, dict[str, float] | None] = {}
    for stage in summary.stages_of(found):
        mine = [record for record in found if record.stage == stage]
        end = "" if stage is None else f"-{stage}"
        importance = importances[stage or ""] = parameter_importance(sweep, mine)
        made = [
            ("parallel", "Settings and scores", parallel_coordinates(sweep, mine)),
            ("curves", "Learning curves", learning_curves(sweep, mine)),
            ("importance", "Parameter importance", importance_plot(sweep, importance, len(records.scored(mine)))),
        ]
        for name, title, picture in made:
            if picture is not None:
                files[f"{name}{end}.png"] = picture
                pictures.setdefault(stage or "", []).append((f"{name}{end}.png", title, picture))
    files["report.md"] = _markdown(root, sweep, found).encode()
    facts = {
        "objective": sweep.objective,
        "labelled": records.is_labelled(sweep),
        "best": {stage or "all": {"number": r.number, "score": r.score, "point": r.point} for stage, r in best.items()},
        "level": {
            stage or "all": sorted(record.number for record in [*ties.equal, *ties.near])
            for stage, winner in best.items()
            for ties in [summary.ties_with(sweep, [r for r in found if r.stage == stage], winner)]
        },
        "caveats": {stage or "all": summary.told(sweep, found, stage).caveats for stage in summary.stages_of(found)},
        "importance": importances,
        "num_trials": len(found),
        "epochs": sum(record.epochs for record in found),
    }
    files["report.json"] = (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode()
    files["report.html"] = _page(root, sweep, found, pictures, importances)
    for name, data in files.items():
        write_bytes(join(root, name), data)
    return list(files)


def parameter_importance(sweep: SweepConfig, found: Sequence[Record]) -> dict[str, float] | None:
    """Each key's share of the score's variance (fANOVA on a random forest, through Optuna), largest first.

    None where it means nothing: too few finished trials, or all alike.
    """
    scored = records.scored(found)
    if (
        len(scored) < _MIN_FOR_IMPORTANCE
        or len({round(record.score or 0.0, records.DECIMALS) for record in scored}) < 2
    ):
        return None
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    spaces = distributions(sweep)
    moving = {key for key in sweep.space if len({json.dumps(record.point[key]) for record in scored}) > 1}
    if not moving:
        return None
    for record in scored:
        values = {
            key: json.dumps(record.point[key]) if sweep.space[key].choice is not None else record.point[key]
            for key in sorted(moving)
        }
        study.add_trial(
            optuna.trial.create_trial(
                params=values, distributions={key: spaces[key] for key in sorted(moving)}, value=record.score
            )
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {
        **{key: float(value) for key, value in shares.items()},
        **{key: 0.0 for key in sweep.space if key not in moving},
    }


def _markdown(root: str, sweep: SweepConfig, found: Sequence[Record]) -> str:
    trains = "\n".join(summary.commands(root, found))
    end = f"\n```\n{trains}\n```\n" if trains else ""
    return f"{records.summary_table(sweep, found)}\n{summary.text(sweep, found)}{end}"


def _parquet(sweep: SweepConfig, found: Sequence[Record]) -> bytes:
    """A row a trial: its settings, as `param:<key>`, its scores, as `score:<category>`, and how it ended."""
    categories = list(dict.fromkeys(name for record in found for name in record.categories))
    columns: dict[str, Any] = {
        "number": pa.array([record.number for record in found], pa.int64()),
        "stage": pa.array([record.stage for record in found], pa.string()),
        "status": pa.array([record.status for record in found], pa.string()),
        "score": pa.array([record.score for record in found], pa.float64()),
        "epochs": pa.array([record.epochs for record in found], pa.int64()),
        "seconds": pa.array([record.seconds for record in found], pa.float64()),
        "reason": pa.array([record.reason for record in found], pa.string()),
    }
    for key in sweep.space:
        values = [record.point.get(key) for record in found]
        simple = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        columns[f"param:{key}"] = pa.array(values if simple else [json.dumps(value) for value in values])
    for name in categories:
        scores = [record.categories.get(name, {}).get("score") for record in found]
        columns[f"score:{name}"] = pa.array(scores, pa.float64())
    metadata = {b"objective": sweep.objective.encode(), b"labelled": str(records.is_labelled(sweep)).encode()}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), buffer)
    return buffer.getvalue()


def _page(
    root: str,
    sweep: SweepConfig,
    found: Sequence[Record],
    pictures: dict[str, list[tuple[str, str, bytes]]],
    importances: dict[str, dict[str, float] | None],
) -> bytes:
    best = records.best_of(found)
    return render(
        "sweep.html",
        title=f"Sweep {sweep.name}",
        place=root,
        counts={status: sum(record.status == status for record in found) for status in ("finished", "cut", "failed")},
        epochs=sum(record.epochs for record in found),
        seconds=sum(record.seconds for record in found),
        searcher=sweep.searcher,
        seed=sweep.seed,
        objective=records.objective_words(sweep),
        is_labelled=records.is_labelled(sweep),
        min_for_importance=_MIN_FOR_IMPORTANCE,
        stages=[
            _stage(
                root,
                sweep,
                found,
                stage,
                best.get(stage),
                pictures.get(stage or "", []),
                importances.get(stage or "") is not None,
            )
            for stage in summary.stages_of(found)
        ],
        settings=json.dumps(sweep.model_dump(mode="json", exclude={"base"}), indent=1, ensure_ascii=False),
    )


def _stage(
    root: str,
    sweep: SweepConfig,
    found: Sequence[Record],
    stage: str | None,
    winner: Record | None,
    pictures: Sequence[tuple[str, str, bytes]],
    has_importance: bool,
) -> dict[str, Any]:
    """What the page shows of the trials of one stage."""
    mine = [record for record in found if record.stage == stage]
    said = summary.told(sweep, found, stage)
    return {
        "name": "All categories" if stage is None else stage,
        "words": [words for words in (said.best, *said.ties, *said.caveats) if words is not None],
        "command": None if winner is None else summary.commands(root, [winner])[0],
        "table": _table(sweep, mine, winner),
        "pictures": {title: png_uri(picture) for _, title, picture in pictures},
        "has_importance": has_importance,
    }


def _table(
    sweep: SweepConfig, mine: Sequence[Record], winner: Record | None
) -> tuple[list[str], list[tuple[str, list[str], str]]]:
    """Heads of the columns, and a row a trial, best first: how it is marked, its cells, its status."""
    categories = list(dict.fromkeys(name for record in mine for name in record.categories))
    categories = categories if len(categories) > 1 else []
    head = ["trial", *sweep.space, "score", *categories, *(["spread"] if categories else []), "epochs", "seconds"]
    rows = []
    for record in sorted(mine, key=records.rank):
        scores = [record.score, *(record.categories.get(name, {}).get("score") for name in categories)]
        if categories:
            scores.append(record.spread)
        cells = [str(record.number), *(records.shown(record.point.get(key)) for key in sweep.space)]
        cells += ["-" if score is None else f"{score:.{records.DECIMALS}f}" for score in scores]
        cells += [str(record.epochs), f"{record.seconds:.1f}"]
        mark = "best" if winner is not None and record.number == winner.number else record.status
        rows.append((mark, cells, record.status + (f": {record.reason}" if record.reason else "")))
    return head, rows
