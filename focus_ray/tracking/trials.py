"""Writes a sweep to trackers: one tracker run for the sweep, and below it one run per trial with its settings as parameters.

A sweep trains with several combinations of settings; each training is a trial.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import methodcaller
from typing import Any

from focus_ray.tracking.base import RunDescription, TrackerRun, flatten_parameters
from focus_ray.tracking.recorder import BackgroundRecorder
from focus_ray.tracking.runs import hash_run_key, make_run_tags


class SweepRecorder:
    """Writes the trials and the results of one sweep to trackers. Does nothing without trackers."""

    def __init__(self, recorder: BackgroundRecorder, run_token: bytes, settings: Mapping[str, Any]) -> None:
        """Begins the run of the sweep.

        Args:
            recorder: Sends the data to the trackers.
            run_token: Unique bytes of the sweep, from its `sweep.yaml`.
            settings: All settings of the sweep, with its base configuration in `base`, as nested mappings.
        """
        self.recorder, self._run_token = recorder, run_token
        parameters = flatten_parameters({key: value for key, value in settings.items() if key != "name"})
        name, base = settings["name"], settings["base"]
        tags = make_run_tags("sweep", name, base["storage"], base["cluster"].get("team"))
        self.parent_run = RunDescription(hash_run_key(run_token), name, None, parameters, tags)
        self._logged_trials: set[str] = set()
        recorder.write_to_run(self.parent_run)

    def log_trial(self, name: str, record: Mapping[str, Any]) -> None:
        """Writes the result of a trial that has ended to the trackers. Does nothing if this object has already logged the trial.

        Args:
            name: Name of the trial.
            record: Result of the trial, a `sweep.records.TrialRecord` as a dict.
        """
        if not self.recorder or name in self._logged_trials:
            return
        self._logged_trials.add(name)
        tags = {**self.parent_run.tags, "kind": "trial", "status": str(record["status"]), "trial": name}
        tags.update({key: str(record[key]) for key in ("stage", "reason") if record[key] is not None})
        # The status is part of the key: a failed trial that is run again gets a new run.
        key = hash_run_key(self._run_token, name, str(record["status"]))
        run = RunDescription(
            key, f"{self.parent_run.name}/{name}", self.parent_run, flatten_parameters(record["point"]), tags
        )
        self.recorder.write_finished_run(run, lambda tracker_run: _log_trial_results(tracker_run, record))

    def close(self, best: Mapping[str, Mapping[str, Any]], failed: bool) -> None:
        """Writes the best trials, ends the run of the sweep, and waits until the trackers have all data.

        Args:
            best: Stage -> its best trial, a `TrialRecord` as a dict. A stage is the category that trials search for, or "" if
                trials search for all categories.
            failed: True if the sweep failed.
        """
        for stage, record in best.items():
            score = {f"best/score{f'/{stage}' if stage else ''}": float(record["score"])}
            trial = {f"best_trial{f'.{stage}' if stage else ''}": str(record["number"])}
            self.recorder.write_to_run(self.parent_run, methodcaller("log_metrics", score))
            self.recorder.write_to_run(self.parent_run, methodcaller("set_tags", trial))
        self.recorder.end_run(self.parent_run, failed)
        self.recorder.close()


def _log_trial_results(run: TrackerRun, record: Mapping[str, Any]) -> None:
    """Writes curves, scores, metrics of each category, steps and seconds of a trial to its tracker run, and ends the run."""
    metrics = {"steps": float(record["steps"]), "seconds": float(record["seconds"])}
    if record["score"] is not None:
        metrics["score"] = float(record["score"])
    for category, part in record["categories"].items():
        if len(part["curve"]) > 1:
            for step, score in part["curve"]:
                run.log_step_metrics(int(step), {f"score_by_step/{category}": float(score)})
        if part["score"] is not None:
            metrics[f"score/{category}"] = float(part["score"])
        figures = {key: value for key, value in part["figures"].items() if value is not None}
        metrics.update({f"{key}/{category}": float(value) for key, value in figures.items()})
    run.log_metrics(metrics)
    run.end(failed=record["status"] == "failed")
