"""What a sweep found, to look at: table, best configurations, parameter importance, plots, one HTML page. No Ray."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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
    files["report.html"] = _page(root, sweep, found, pictures, importances).encode()
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


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#1d2733;background:#fff}
table{border-collapse:collapse;font-size:14px}td,th{padding:.3rem .7rem;border-bottom:1px solid #e3e7eb;text-align:right}
th{background:#f4f6f8}td.text,th.text{text-align:left}tr.best td{background:#fdecea;font-weight:600}
tr.cut td,tr.failed td{color:#6b7783}img{max-width:100%}pre{background:#f4f6f8;padding:.8rem;overflow:auto}
.mark{background:#c0392b;color:#fff;padding:.1rem .5rem;border-radius:.3rem}.wide{overflow-x:auto}
"""


def _page(
    root: str,
    sweep: SweepConfig,
    found: Sequence[Record],
    pictures: dict[str, list[tuple[str, str, bytes]]],
    importances: dict[str, dict[str, float] | None],
) -> str:
    best = records.best_of(found)
    say = html.escape
    name = str(sweep.name)
    counts = {status: sum(record.status == status for record in found) for status in ("finished", "cut", "failed")}
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{say(name)}</title><style>{_STYLE}</style><h1>Sweep {say(name)}</h1>",
        f"<p>{say(root)}<br>"
        + ", ".join(f"{count} {status}" for status, count in counts.items())
        + f"; {sum(record.epochs for record in found)} epochs, {sum(record.seconds for record in found):.0f} s of trials. "
        f"Searcher {say(sweep.searcher)}, seed {sweep.seed}. Maximised: {say(records.objective_words(sweep))}.</p>",
    ]
    if records.is_labelled(sweep):
        parts.append("<p><span class=mark>labelled</span></p>")
    for stage in summary.stages_of(found):
        mine = [record for record in found if record.stage == stage]
        parts.append(f"<h2>{'All categories' if stage is None else say(stage)}</h2>")
        winner = best.get(stage)
        said = summary.told(sweep, found, stage)
        words = [said.best, *said.ties, *said.caveats]
        parts.append("<ul>" + "".join(f"<li>{say(line)}</li>" for line in words if line is not None) + "</ul>")
        if winner is not None:
            parts.append(f"<pre>{say(summary.commands(root, [winner])[0])}</pre>")
        parts.append(_html_table(sweep, mine, winner))
        for _, title, picture in pictures.get(stage or "", []):
            data = base64.b64encode(picture).decode()
            parts.append(f"<h3>{say(title)}</h3><img alt='{say(title)}' src='data:image/png;base64,{data}'>")
        if importances.get(stage or "") is None:
            parts.append(f"<p>No parameter importance: it needs {_MIN_FOR_IMPORTANCE} finished trials that differ.</p>")
    parts.append(
        f"<h2>Configuration</h2><pre>{say(json.dumps(sweep.model_dump(mode='json', exclude={'base'}), indent=1))}</pre>"
    )
    return "\n".join(parts) + "</html>\n"


def _html_table(sweep: SweepConfig, mine: Sequence[Record], winner: Record | None) -> str:
    categories = list(dict.fromkeys(name for record in mine for name in record.categories))
    categories = categories if len(categories) > 1 else []
    head = ["trial", *sweep.space, "score", *categories, *(["spread"] if categories else []), "epochs", "seconds"]
    rows = ["<tr>" + "".join(f"<th>{html.escape(title)}</th>" for title in head) + "<th class=text>status</th></tr>"]
    for record in sorted(mine, key=records.rank):
        scores = [record.score, *(record.categories.get(name, {}).get("score") for name in categories)]
        if categories:
            scores.append(record.spread)
        cells = [str(record.number), *(records.shown(record.point.get(key)) for key in sweep.space)]
        cells += ["-" if score is None else f"{score:.{records.DECIMALS}f}" for score in scores]
        cells += [str(record.epochs), f"{record.seconds:.1f}"]
        kind = "best" if winner is not None and record.number == winner.number else record.status
        status = record.status + (f": {record.reason}" if record.reason else "")
        rows.append(
            f"<tr class={kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
            + f"<td class=text>{html.escape(status)}</td></tr>"
        )  # fmt: skip
    return "<div class=wide><table>" + "".join(rows) + "</table></div>"
