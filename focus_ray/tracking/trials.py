"""What a sweep says to trackers: a subject a trial, with the point that it tries as its parameters, and one of the sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from focus_ray import __version__
from focus_ray.tracking.base import Subject, parameters_of
from focus_ray.tracking.recorder import Recorder
from focus_ray.tracking.runs import key_of


class SweepRecord:
    """Of one sweep."""

    def __init__(
        self, recorder: Recorder, claim: bytes, name: str, storage: str, team: str | None, settings: Mapping[str, Any]
    ) -> None:
        """
        Args: claim: what no other sweep has.  settings: of the sweep, nested, those of its base too.
        """
        self.recorder, self._claim = recorder, claim
        tags = {"run": name, "storage": storage, "focus_ray": __version__, **({"team": team} if team else {})}
        self.tags = tags
        parameters = parameters_of({key: value for key, value in settings.items() if key != "name"})
        self.group = Subject(key_of(claim), name, None, parameters, {"kind": "sweep", **tags})
        self._told: set[str] = set()
        recorder.begin(self.group)

    def trial(self, name: str, record: Mapping[str, Any]) -> None:
        """A trial that has ended. record: as its file holds it."""
        if not self.recorder or name in self._told:
            return
        self._told.add(name)
        tags = {**self.tags, "kind": "trial", "status": str(record["status"]), "trial": name}
        tags.update({key: str(record[key]) for key in ("stage", "reason") if record[key] is not None})
        name_there = f"{self.group.name}/{name}"
        # a failed trial may be run again, as another subject
        key = key_of(self._claim, name, str(record["status"]))
        subject = Subject(key, name_there, self.group, parameters_of(record["point"]), tags)
        curves = [
            (int(epoch), {f"score_by_epoch/{category}": float(score)})
            for category, part in record["categories"].items()
            if len(part["curve"]) > 1
            for epoch, score in part["curve"]
        ]
        self.recorder.whole(subject, curves, trial_figures(record), failed=record["status"] == "failed")

    def close(self, best: Mapping[str, Mapping[str, Any]], failed: bool) -> None:
        """The end of the sweep. best: stage, or nothing for all categories, -> its best trial's record."""
        scores = {f"best/score{f'/{stage}' if stage else ''}": float(one["score"]) for stage, one in best.items()}
        if scores:
            self.recorder.figures(self.group, scores)
            names = {f"best_trial{f'.{stage}' if stage else ''}": str(one["number"]) for stage, one in best.items()}
            self.recorder.tag(self.group, names)
        self.recorder.end(self.group, failed)
        self.recorder.close()


def trial_figures(record: Mapping[str, Any]) -> dict[str, float]:
    """Score, of each category too, with what it is made of, epochs and seconds."""
    found = {"epochs": float(record["epochs"]), "seconds": float(record["seconds"])}
    if record["score"] is not None:
        found["score"] = float(record["score"])
    for category, part in record["categories"].items():
        if part["score"] is not None:
            found[f"score/{category}"] = float(part["score"])
        found.update({f"{key}/{category}": float(value) for key, value in part["figures"].items() if value is not None})
    return found
