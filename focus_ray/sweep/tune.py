"""The connection to Ray Tune: a searcher that gives settings to trials, a stopper that ends all trials, and the call of Tune."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from focus_ray.cluster.capacity import MAX_REQUESTED, ClusterCapacity
from focus_ray.sweep.proposer import SettingsProposer
from focus_ray.sweep.records import TrialRecord
from focus_ray.sweep.settings import Point

_CLEANUP_S = 2  # a stopped trial has this time to end before its process is killed


class SweepStopper(tune.Stopper):
    """The stopper for Ray Tune: ends all trials when a function returns True. Tune calls the function again and again."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self.stop = stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Returns whether Tune must end all trials."""
        return self.stop()

    def __getstate__(self) -> dict[str, Any]:  # Tune pickles it to restore a run, which never happens here
        return {}


class TuneSearcher(Searcher):
    """The searcher for Ray Tune: takes the settings of each new trial from a `SettingsProposer`, and reports when a trial ends.

    Args:
        proposer: Proposes the settings.
        handle_ended_trial: Called with number, settings and result of each ended trial; a missing result is None.
        capacity: Gives the number of trials that run at once.
    """

    def __init__(
        self,
        proposer: SettingsProposer,
        handle_ended_trial: Callable[[int, Point, TrialRecord | None], None],
        capacity: ClusterCapacity,
    ) -> None:
        super().__init__(metric="score", mode="max")
        self.proposer, self.handle_ended_trial, self.capacity = proposer, handle_ended_trial, capacity
        self.running: dict[str, tuple[int, Point]] = {}

    def __getstate__(self) -> dict[str, Any]:  # as in SweepStopper
        return {}

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        """Ignores all properties and returns True: the proposer already knows the search space."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """Returns the number and the settings of the next trial as a dict; FINISHED if all trials were proposed.

        The result None means that the cluster has no room for a further trial now; Tune then asks again.
        """
        if len(self.running) >= self.capacity.count_trainings(len(self.running)):
            return None
        proposal = self.proposer.propose_trial()
        if proposal is None:
            return Searcher.FINISHED
        self.running[trial_id] = proposal
        return {"number": proposal[0], "point": proposal[1]}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Calls `handle_ended_trial` with the result of an ended trial.

        Args:
            trial_id: Tune's id of the trial.
            result: Last report of the trial, with the result as JSON text in "record".
            error: True if the trial failed.
        """
        text = (result or {}).get("record")
        self.handle_ended_trial(
            *self.running.pop(trial_id), None if error or text is None else TrialRecord(**json.loads(text))
        )

    def save(self, checkpoint_path: str) -> None:
        """Writes an empty file: Tune requires a file, but a resumed sweep reads the results of its trials instead."""
        Path(checkpoint_path).write_bytes(b"")

    def restore(self, checkpoint_path: str) -> None:
        """Raises NotImplementedError. It is never called, because Tune never restores a sweep."""
        raise NotImplementedError


def run_tune_trials(
    trial: Callable[[dict[str, Any]], None],
    resources: tune.PlacementGroupFactory,
    config: tune.TuneConfig,
    run_config: tune.RunConfig,
) -> tune.ResultGrid:
    """Runs trials with Ray Tune until the searcher has no more settings. A process that ends a trial runs the next trial.

    It sets environment variables of Tune, and changes `config`.

    Args:
        trial: Runs one trial. Called with the values that the searcher suggests.
        resources: Ray resources of a trial.
        config: Searcher and number of trials.
        run_config: Stopper, and place of Tune's own files.

    Returns: the last report or the error of each trial.
    """
    os.environ.update(
        {
            "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
            "TUNE_DISABLE_SIGINT_HANDLER": "1",
            "TUNE_FORCE_TRIAL_CLEANUP_S": str(_CLEANUP_S),
            # Tune's default is 1 with a searcher, so that an autoscaler would see the request of one trial at a time
            "TUNE_MAX_PENDING_TRIALS_PG": str(MAX_REQUESTED),
            "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
            "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
            "RAY_CHDIR_TO_TRIAL_DIR": "0",
            "RAY_AIR_NEW_OUTPUT": "0",
        }
    )
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it warns about its result files, which are deleted
    config.reuse_actors = True
    config.trial_name_creator = config.trial_dirname_creator = _make_trial_name
    return tune.Tuner(tune.with_resources(trial, resources), tune_config=config, run_config=run_config).fit()


def _make_trial_name(trial: Any) -> str:
    """Returns the name that Tune gives to a trial and its folder: the number of the trial, and Tune's id."""
    return f"trial-{trial.config.get('number', 0):05d}-{trial.trial_id}"
