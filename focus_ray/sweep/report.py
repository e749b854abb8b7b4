"""What a sweep found, to look at: table, best configurations, parameter importance, plots, one HTML page. No Ray."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from focus_ray.reporting.page import png_uri, render
from focus_ray.storage import join, write_bytes
from focus_ray.sweep import records
from focus_ray.sweep.proposer import distributions
from focus_ray.sweep.records import Record
from focus_ray.sweep.settings import SweepConfig

_BEST, _CUT, _GRID = "#c0392b", "#9aa5b1", "#e3e7eb"
_MIN_FOR_IMPORTANCE = 4


def write_report(root: str, sweep: SweepConfig, found: Sequence[Record]) -> list[str]:
    """Writes everything beside the records. Returns: the files' names."""
    files: dict[str, bytes] = {"trials.parquet": _parquet(sweep, found)}
    best = records.best_of(found)
    for stage, record in best.items():
        name = "best.yaml" if stage is None else f"best-{stage}.yaml"
        files[name] = records.best_config_yaml(sweep, record, root).encode()
    pictures: dict[str, list[tuple[str, str, bytes]]] = {}
    importances: dict[str, dict[str, float] | None] = {}
    for stage in sorted({record.stage for record in found}, key=lambda stage: stage or ""):
        mine = [record for record in found if record.stage == stage]
        end = "" if stage is None else f"-{stage}"
        importance = importances[stage or ""] = parameter_importance(sweep, mine)
        made = [
            ("parallel", "Settings and scores", parallel_coordinates(sweep, mine)),
            ("curves", "Learning curves", learning_curves(sweep, mine)),
            ("importance", "Parameter importance", importance_plot(sweep, importance, len(_scored(mine)))),
        ]
        for name, title, picture in made:
            if picture is not None:
                files[f"{name}{end}.png"] = picture
                pictures.setdefault(stage or "", []).append((f"{name}{end}.png", title, picture))
    table = records.summary_table(sweep, found)
    files["report.md"] = table.encode()
    facts = {
        "objective": sweep.objective,
        "labelled": records.is_labelled(sweep),
        "best": {stage or "all": {"number": r.number, "score": r.score, "point": r.point} for stage, r in best.items()},
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
    scored = _scored(found)
    if len(scored) < _MIN_FOR_IMPORTANCE or len({record.score for record in scored}) < 2:
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


def parallel_coordinates(sweep: SweepConfig, found: Sequence[Record]) -> bytes | None:
    """A line a finished trial through its settings, the scores of its categories and the mean; PNG."""
    scored = sorted(_scored(found), key=lambda record: record.score or 0.0)
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
    low, high = min(record.score or 0.0 for record in scored), max(record.score or 0.0 for record in scored)
    rng = np.random.default_rng(0)
    shift = rng.uniform(-0.012, 0.012, (len(scored), len(columns)))  # so that equal settings stay apart
    shift[:, len(keys) :] = 0
    for number, record in enumerate(scored):
        is_best = number == len(scored) - 1
        place = ((record.score or 0.0) - low) / (high - low) if high > low else 1.0
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
                at + 0.05, height, text, fontsize=8, va="center", zorder=4,
                bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8},
            )  # fmt: skip
    axes.set_xticks(range(len(columns)), [column[0] for column in columns], fontsize=9)
    axes.set_yticks([])
    axes.set_xlim(-0.2, len(columns) - 1 + 0.55)
    axes.set_ylim(-0.08, 1.12)
    axes.legend(loc="upper left", fontsize=8, frameon=False, ncols=2)
    axes.set_title(f"{len(scored)} finished trials; darker is better ({records.objective_words(sweep)})", fontsize=10)
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
        for record in found:
            curve = record.curves().get(category)
            if not curve:
                continue
            epochs, scores = zip(*curve, strict=True)
            is_best, is_cut = record.name in names, record.status != "finished"
            panel.plot(
                epochs, scores, marker="x" if is_cut else "o", markersize=4,
                markevery=[len(curve) - 1] if len(curve) > 1 else None,
                color=_BEST if is_best else _CUT if is_cut else "#2c6fad",
                linewidth=2.4 if is_best else 1.1, zorder=3 if is_best else 1 if is_cut else 2,
            )  # fmt: skip
        panel.set_title(category, fontsize=10)
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


def _scored(found: Sequence[Record]) -> list[Record]:
    return [record for record in found if record.status == "finished" and record.score is not None]


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
    low, high = min(values), max(values)
    if high == low:
        return [0.5] * len(values), [(0.5, f"{low:.4f}")]
    return [(value - low) / (high - low) for value in values], [(0.0, f"{low:.4f}"), (1.0, f"{high:.4f}")]


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
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


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
    stages = sorted({record.stage for record in found}, key=lambda stage: stage or "")
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
        noise=records.NOISE,
        min_for_importance=_MIN_FOR_IMPORTANCE,
        stages=[
            _stage(
                root,
                sweep,
                [record for record in found if record.stage == stage],
                best.get(stage),
                pictures.get(stage or "", []),
                importances.get(stage or "") is not None,
            )
            for stage in stages
        ],
        settings=json.dumps(sweep.model_dump(mode="json", exclude={"base"}), indent=1, ensure_ascii=False),
    )


def _stage(
    root: str,
    sweep: SweepConfig,
    mine: Sequence[Record],
    winner: Record | None,
    pictures: Sequence[tuple[str, str, bytes]],
    has_importance: bool,
) -> dict[str, Any]:
    """What the page shows of the trials of one stage."""
    stage, num_scored = mine[0].stage, len(_scored(mine))
    return {
        "name": "All categories" if stage is None else stage,
        "winner": winner,
        "point": "" if winner is None else ", ".join(f"{k} = {records.shown(v)}" for k, v in winner.point.items()),
        "tied": 0 if winner is None else records.tied_with_best(mine, winner),
        "best_yaml": join(root, "best.yaml" if stage is None else f"best-{stage}.yaml"),
        "table": _table(sweep, mine, winner),
        "pictures": {title: png_uri(picture) for _, title, picture in pictures},
        "num_scored": num_scored,
        "num_parameters": len(sweep.space),
        "is_hint": num_scored < 10 * len(sweep.space),
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
    for record in sorted(mine, key=lambda r: (r.status != "finished", -(r.score or 0.0), r.status, r.number)):
        scores = [record.score, *(record.categories.get(name, {}).get("score") for name in categories)]
        if categories:
            scores.append(record.spread)
        cells = [str(record.number), *(records.shown(record.point.get(key)) for key in sweep.space)]
        cells += ["-" if score is None else f"{score:.4f}" for score in scores]
        cells += [str(record.epochs), f"{record.seconds:.1f}"]
        mark = "best" if winner is not None and record.number == winner.number else record.status
        rows.append((mark, cells, record.status + (f": {record.reason}" if record.reason else "")))
    return head, rows
