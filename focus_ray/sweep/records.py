"""A sweep's folder in its storage: what was asked, one record a trial, a sign of life, the best. No Ray.

    sweep.yaml  data.json  state.json  trials/<number>.json  best.yaml  report.html  ...

A trial writes its record itself, whole or not at all, as soon as it ends: whatever happens to the driver, nothing that
was finished is lost, and no two processes ever write the same object.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from focus_ray.cluster.ownership import FINGERPRINTS, read_state, write_fingerprints
from focus_ray.config import config_to_yaml
from focus_ray.errors import SweepError
from focus_ray.storage import create_bytes, exists, join, list_names, read_bytes, write_bytes
from focus_ray.sweep.settings import Point, SweepConfig, parse_sweep
from focus_ray.yaml_text import load_yaml

SWEEP, TRIALS = "sweep.yaml", "trials"
DONE = ("finished", "cut")  # what a resumed sweep does not try again
DECIMALS = 4  # of a score, as it is shown; scores that are the same to these are equal


@dataclass(frozen=True)
class Record:
    """How one trial ended.

    stage: the category that it was for, or None if it was for all.  status: finished, cut or failed.
    score: mean over categories; None unless finished.  categories: name -> score, figures, curve, epochs, seconds, ...
    reason: why it was cut, or what failed.  epochs: trained, over all categories.  ended_at: Unix time.
    """

    number: int
    stage: str | None
    point: Point
    status: str
    score: float | None
    categories: dict[str, dict[str, Any]] = field(default_factory=dict)
    reason: str | None = None
    epochs: int = 0
    seconds: float = 0.0
    ended_at: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.number:05d}" if self.stage is None else f"{self.stage}-{self.number:05d}"

    @property
    def spread(self) -> float | None:
        """Best less worst category."""
        scores = [part["score"] for part in self.categories.values() if part.get("score") is not None]
        return max(scores) - min(scores) if len(scores) > 1 else None

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Category -> (epochs trained, score)."""
        return {name: [(int(e), float(s)) for e, s in part["curve"]] for name, part in self.categories.items()}


_RECORD = TypeAdapter(Record)


def write_record(root: str, record: Record) -> None:
    text = json.dumps(dataclasses.asdict(record), allow_nan=False, indent=1)
    write_bytes(join(root, TRIALS, f"{record.name}.json"), (text + "\n").encode())


def read_records(root: str) -> list[Record]:
    """Those that are there, by stage and number. Raises: SweepError: one cannot be understood."""
    found = []
    for name in list_names(join(root, TRIALS)):
        if not name.endswith(".json") or name.startswith("."):
            continue
        place = join(root, TRIALS, name)
        try:
            found.append(_RECORD.validate_json(read_bytes(place)))
        except ValidationError as error:
            raise SweepError(
                f"{place}: not a trial's record ({error}): remove it to have the trial run again"
            ) from None
    return sorted(found, key=lambda record: (record.stage or "", record.number))


def rank(record: Record) -> tuple[bool, float, str, int]:
    """Sorts the best first: finished ones by score, of equal ones the lower number, then the others."""
    score = 0.0 if record.score is None else record.score
    return record.status != "finished", -round(score, DECIMALS), record.status, record.number


def best_of(records: Sequence[Record]) -> dict[str | None, Record]:
    """The first of each stage by `rank`."""
    best: dict[str | None, Record] = {}
    for record in sorted(scored(records), key=lambda record: (record.stage or "", rank(record))):
        best.setdefault(record.stage, record)
    return best


def scored(found: Sequence[Record]) -> list[Record]:
    """Those that finished, with a score."""
    return [record for record in found if record.status == "finished" and record.score is not None]


def best_name(stage: str | None) -> str:
    """The file of a stage's best configuration."""
    return "best.yaml" if stage is None else f"best-{stage}.yaml"


def is_labelled(sweep: SweepConfig) -> bool:
    return sweep.objective != "validation"


def objective_words(sweep: SweepConfig) -> str:
    """What is maximised, marked where it looks at labels."""
    return f"{sweep.objective} on LABELLED test images" if is_labelled(sweep) else "label-free validation score"


def check_free(root: str) -> None:
    """Raises: SweepError: the folder holds a sweep already."""
    if exists(join(root, SWEEP)):
        raise SweepError(f"{root} holds a sweep already: give another name, or `focus-ray sweep resume {root}`")


def claim(root: str, sweep: SweepConfig, fingerprints: Mapping[str, str]) -> None:
    """Writes what the sweep is. Raises: SweepError: the folder holds one already, or one begun at the same time was first."""
    check_free(root)
    # only where there is none, and no two have the same bytes; what else is written is then the winner's alone
    text = f"# begun by {socket.gethostname()}, {uuid.uuid4().hex}\n{config_to_yaml(sweep)}"
    if not create_bytes(join(root, SWEEP), text.encode()):
        raise SweepError(f"{root} was taken by a sweep started at the same time: give another name")
    write_fingerprints(root, fingerprints)


def read_sweep(root: str) -> SweepConfig:
    """What the sweep of a folder is. Raises: SweepError: there is none."""
    try:
        text = read_bytes(join(root, SWEEP))
    except FileNotFoundError:
        raise SweepError(f"{root}: no sweep here: give the folder that `focus-ray sweep` named") from None
    tree = load_yaml(text)
    tree["space"] = {
        key: {kind: value for kind, value in domain.items() if value is not None}
        for key, domain in tree["space"].items()
    }
    return parse_sweep(tree, source=join(root, SWEEP))


def progress(root: str, sweep: SweepConfig, found: Sequence[Record]) -> dict[str, Any]:
    """How far a sweep is: its state, trials by status, and the best so far."""
    base = sweep.base_config()
    stages = 1
    if sweep.scope == "per_category":
        stages = len(json.loads(read_bytes(join(root, FINGERPRINTS))))
    return {
        **{key: value for key, value in read_state(root).items() if key in ("state", "host", "pid")},
        "storage": base.storage,
        "objective": objective_words(sweep),
        "planned": sweep.planned_trials * stages,
        **{status: sum(record.status == status for record in found) for status in ("finished", "cut", "failed")},
        "epochs": sum(record.epochs for record in found),
        "best": {
            stage or "all categories": {"trial": record.number, "score": record.score, **record.point}
            for stage, record in best_of(found).items()
        },
    }


def best_config_yaml(sweep: SweepConfig, record: Record, root: str) -> str:
    """The best trial's configuration, ready for `focus-ray train`: its run lies beside the sweep, under the sweep's name."""
    config = sweep.base_config(record.point)
    categories = config.data.categories if record.stage is None else (record.stage,)
    end = "-best" if record.stage is None else f"-best-{record.stage}"
    name = f"{(sweep.name or config.name)[: 100 - len(end)]}{end}"
    config = config.model_copy(update={"name": name, "data": config.data.model_copy(update={"categories": categories})})
    assert record.score is not None
    head = [
        f"Best of {root}, trial {record.number}{f' for {record.stage}' if record.stage else ''}: "
        f"{objective_words(sweep)} {record.score:.4f}",
        ", ".join(f"{key}={json.dumps(value)}" for key, value in record.point.items()),
    ]
    if is_labelled(sweep):
        head.append("Chosen by labelled test images: figures on these images are no fair test of it any more.")
    return "".join(f"# {line}\n" for line in head) + config_to_yaml(config)


def summary_table(sweep: SweepConfig, records: Sequence[Record]) -> str:
    """A Markdown table of all trials, best first."""
    keys = list(sweep.space)
    stages = sorted({record.stage for record in records}, key=lambda stage: stage or "")
    lines = []
    for stage in stages:
        mine = [record for record in records if record.stage == stage]
        categories = list(dict.fromkeys(name for record in mine for name in record.categories))
        ordered = sorted(mine, key=rank)
        title = objective_words(sweep) + (f", {stage}" if stage else "")
        head = [
            "trial",
            *keys,
            "score",
            *(categories if stage is None else []),
            "spread",
            "epochs",
            "seconds",
            "status",
        ]
        lines += [f"**{title}**", "", _row(head), "|" + "---|" * len(head)]
        for record in ordered:
            parts = [record.categories.get(name, {}).get("score") for name in categories] if stage is None else []
            lines.append(
                _row(
                    [
                        str(record.number),
                        *(shown(record.point.get(key)) for key in keys),
                        _figure(record.score),
                        *(_figure(part) for part in parts),
                        _figure(record.spread),
                        str(record.epochs),
                        f"{record.seconds:.1f}",
                        record.status,
                    ]
                )
            )
        lines.append("")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A parameter's value, short."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def mean_score(scores: Sequence[float]) -> float:
    return float(np.mean(scores))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.{DECIMALS}f}"
