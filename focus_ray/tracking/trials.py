"""Records a sweep in trackers: one run for the sweep, and below it one run per trial with its point as parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from focus_ray import __version__
from focus_ray.tracking.base import RunDescription, flatten_parameters
from focus_ray.tracking.recorder import Recorder
from focus_ray.tracking.runs import run_key


class SweepRecorder:
    """Records one sweep."""

    def __init__(
        self, recorder: Recorder, claim: bytes, name: str, storage: str, team: str | None, settings: Mapping[str, Any]
    ) -> None:
        """Begins the run of the sweep.

        Args:
            recorder: Trackers.
            claim: Unique bytes of the sweep, from its `sweep.yaml`.
            name: Name of the sweep.
            storage: Storage of the sweep.
            team: Team that owns the sweep.
            settings: All settings of the sweep and of its base configuration, as nested mappings.
        """
        self.recorder, self._claim = recorder, claim
        tags = {"run": name, "storage": storage, "focus_ray": __version__, **({"team": team} if team else {})}
        self.tags = tags
        parameters = flatten_parameters({key: value for key, value in settings.items() if key != "name"})
        self.group = RunDescription(run_key(claim), name, None, parameters, {"kind": "sweep", **tags})
        self._logged_trials: set[str] = set()
        recorder.begin(self.group)

    def log_trial(self, name: str, record: Mapping[str, Any]) -> None:
        """Records a trial that has ended. Does nothing if this recorder has already recorded the trial.

        Args:
            name: Name of the trial.
            record: `sweep.records.TrialRecord` as a dict.
        """
        if not self.recorder or name in self._logged_trials:
            return
        self._logged_trials.add(name)
        tags = {**self.tags, "kind": "trial", "status": str(record["status"]), "trial": name}
        tags.update({key: str(record[key]) for key in ("stage", "reason") if record[key] is not None})
        run_name = f"{self.group.name}/{name}"
        # The status is part of the key: a failed trial that is run again gets a new run.
        key = run_key(self._claim, name, str(record["status"]))
        run = RunDescription(key, run_name, self.group, flatten_parameters(record["point"]), tags)
        curves = [
            (int(epoch), {f"score_by_epoch/{category}": float(score)})
            for category, part in record["categories"].items()
            if len(part["curve"]) > 1
            for epoch, score in part["curve"]
        ]
        self.recorder.log_finished_run(run, curves, trial_metrics(record), failed=record["status"] == "failed")

    def close(self, best: Mapping[str, Mapping[str, Any]], failed: bool) -> None:
        """Ends the run of the sweep and waits for the trackers.

        Args:
            best: Stage ("" if trials cover all categories) -> record of its best trial as a dict.
            failed: True if the sweep failed.
        """
        scores = {f"best/score{f'/{stage}' if stage else ''}": float(record["score"]) for stage, record in best.items()}
        if scores:
            self.recorder.log_metrics(self.group, scores)
            names = {
                f"best_trial{f'.{stage}' if stage else ''}": str(record["number"]) for stage, record in best.items()
            }
            self.recorder.set_tags(self.group, names)
        self.recorder.end(self.group, failed)
        self.recorder.close()


def trial_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of a trial: scores, the components of the scores, epochs and seconds."""
    metrics = {"epochs": float(record["epochs"]), "seconds": float(record["seconds"])}
    if record["score"] is not None:
        metrics["score"] = float(record["score"])
    for category, part in record["categories"].items():
        if part["score"] is not None:
            metrics[f"score/{category}"] = float(part["score"])
        metrics.update(
            {f"{key}/{category}": float(value) for key, value in part["figures"].items() if value is not None}
        )
    return metrics
