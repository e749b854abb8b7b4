"""The connection to Ray Tune: a searcher that proposes points, a stopper, and the call of Tune."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from focus_ray.sweep.proposer import Proposer
from focus_ray.sweep.records import TrialRecord
from focus_ray.sweep.settings import Point

_CLEANUP_S = 2  # a stopped trial has this time to end before its process is killed


class SweepStopper(tune.Stopper):
    """Ends all trials when `stop` returns True. Tune calls `stop` continually."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self.stop = stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Returns True if Tune must end the run."""
        return self.stop()

    def __getstate__(self) -> dict[str, Any]:  # Tune pickles it to restore a run, which never happens here
        return {}


class TuneSearcher(Searcher):
    """The searcher that Ray Tune calls: takes each new point from a `Proposer`, and calls `end_trial` when a trial ends.

    Args:
        proposer: Source of the points.
        end_trial: Takes number, point and record of each ended trial; the record is None if the trial wrote none.
    """

    def __init__(self, proposer: Proposer, end_trial: Callable[[int, Point, TrialRecord | None], None]) -> None:
        super().__init__(metric="score", mode="max")
        self.proposer, self.end_trial = proposer, end_trial
        self.running: dict[str, tuple[int, Point]] = {}

    def __getstate__(self) -> dict[str, Any]:  # as in SweepStopper
        return {}

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        """Accepts all properties and uses none: the proposer already knows the search space."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """Returns the number and the point of the next trial; FINISHED if there is none."""
        proposal = self.proposer.ask()
        if proposal is None:
            return Searcher.FINISHED
        self.running[trial_id] = proposal
        return {"number": proposal[0], "point": proposal[1]}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Passes on the record that the trial reported."""
        text = (result or {}).get("record")
        self.end_trial(*self.running.pop(trial_id), None if error or text is None else TrialRecord(**json.loads(text)))

    def save(self, checkpoint_path: str) -> None:
        """Writes an empty file: Tune requires a file, but a resumed sweep reads its own records instead."""
        Path(checkpoint_path).write_bytes(b"")

    def restore(self, checkpoint_path: str) -> None:
        """Is never called, because Tune never restores a sweep."""
        raise NotImplementedError


def run_tune(
    trial: Callable[[dict[str, Any]], None],
    resources: tune.PlacementGroupFactory,
    config: tune.TuneConfig,
    run_config: tune.RunConfig,
) -> tune.ResultGrid:
    """Runs trials, each in an actor that runs the next trial afterwards, until the searcher has no more points.

    Args:
        trial: Runs one trial. Takes the values that the searcher suggests.
        resources: Ray resources of a trial.
        config: Searcher and number of trials.
        run_config: Stopper, and place of Tune's own files.
    """
    os.environ.update(
        {
            "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
            "TUNE_DISABLE_SIGINT_HANDLER": "1",
            "TUNE_FORCE_TRIAL_CLEANUP_S": str(_CLEANUP_S),
            "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
            "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
            "RAY_CHDIR_TO_TRIAL_DIR": "0",
            "RAY_AIR_NEW_OUTPUT": "0",
        }
    )
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it warns about its result files, which are deleted
    config.reuse_actors = True
    config.trial_name_creator = config.trial_dirname_creator = _trial_name
    return tune.Tuner(tune.with_resources(trial, resources), tune_config=config, run_config=run_config).fit()


def _trial_name(trial: Any) -> str:
    """Returns the name of a Tune trial and of its folder."""
    return f"trial-{trial.config.get('number', 0):05d}-{trial.trial_id}"
