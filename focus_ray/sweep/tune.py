"""The connection to Ray Tune: a searcher that proposes points, a stopper, a callback for trackers, and the call of Tune."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from focus_ray.names import Log
from focus_ray.retries import retry_pause_s
from focus_ray.sweep import records
from focus_ray.sweep.proposer import Proposer
from focus_ray.sweep.settings import Point
from focus_ray.sweep.worker import StageJob, run_trial
from focus_ray.tracking.trials import SweepRecorder

_CLEANUP_S = 2  # a stopped trial has this time to end before its process is killed


def placement_groups() -> set[str]:
    """Returns the ids of this job's placement groups; empty if Ray's dashboard does not answer."""
    import ray
    from ray.util.state import list_placement_groups
    from ray.util.state.exception import RayStateApiException

    context = ray.get_runtime_context()
    address = context.gcs_address  # without the address, the state API can read another cluster on this machine
    for attempt in range(6):
        with contextlib.suppress(RayStateApiException, ConnectionError, RuntimeError):
            groups = list_placement_groups(
                address=address,
                filters=[("creator_job_id", "=", context.get_job_id())],
                limit=10_000,
                raise_on_missing_output=False,
            )
            return {group.placement_group_id for group in groups if group.state != "REMOVED"}
        time.sleep(retry_pause_s(attempt))
    return set()


def make_stopper(stop: Callable[[], bool]) -> Any:
    """Returns a Tune stopper that ends the run when `stop` returns True. Tune calls `stop` continually."""
    from ray import tune

    class SweepStopper(tune.Stopper):
        """Ends all trials when `stop` returns True."""

        def __init__(self, stop: Callable[[], bool] | None) -> None:
            self.stop = stop

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            """Returns True if Tune must end the run."""
            return self.stop is not None and self.stop()

        def __getstate__(self) -> dict[str, Any]:  # Tune pickles it to restore a run, which never happens here
            return {"stop": None}

    return SweepStopper(stop)


def make_searcher(proposer: Proposer, num_missing: int, log: Log) -> Any:
    """Returns a Tune searcher that proposes the points of a proposer.

    Args:
        proposer: Source of the points.
        num_missing: Number of trials to run.
        log: Takes a message about each ended trial.
    """
    from ray.tune.search import Searcher

    class PointSearcher(Searcher):
        """Proposes the points of a proposer and passes the results back."""

        def __init__(self, proposer: Proposer, num_left: int, log: Log) -> None:
            super().__init__(metric="score", mode="max")
            self.proposer, self.num_left, self.log = proposer, num_left, log
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
            """Tells the proposer the result of a trial, and logs it."""
            number, point = self.running.pop(trial_id)
            outcome = json.loads((result or {}).get("outcome", "{}"))
            record = outcome.get("record")
            if error or record is None or record["status"] not in ("finished", "cut"):
                self.proposer.tell(number, point, None, failed=True)
                if record is not None:
                    self.log(f"trial {number}: FAILED: {record['reason']}")
                return
            self.proposer.tell(number, point, record["score"], outcome["steps"])
            self.num_left -= 1
            settings = ", ".join(f"{key}={records.format_value(value)}" for key, value in point.items())
            result_text = (
                f"score {record['score']:.4f}" if record["status"] == "finished" else f"pruned, {record['reason']}"
            )
            self.log(f"trial {number}: {settings}: {result_text} ({record['seconds']:.1f} s; {self.num_left} left)")

        def save(self, checkpoint_path: str) -> None:
            """Writes an empty file: Tune requires a file, but a resumed sweep reads its own records instead."""
            Path(checkpoint_path).write_bytes(b"")  # a resumed sweep reads the records instead

        def restore(self, checkpoint_path: str) -> None:
            """Is never called, because Tune never restores a sweep."""
            raise NotImplementedError

    return PointSearcher(proposer, num_missing, log)


def trial_callback(recorder: SweepRecorder) -> Any:
    """Returns a Tune callback that records each trial in the trackers as soon as it ends."""
    from ray import tune

    class TrialCallback(tune.Callback):
        """Records each ended trial in the trackers."""

        def __init__(self, recorder: SweepRecorder | None) -> None:
            self.recorder = recorder

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            """Records a trial when it reports its only result, which is its complete record."""
            record = json.loads(result.get("outcome", "{}")).get("record")
            if self.recorder is not None and record is not None:
                self.recorder.log_trial(records.TrialRecord(**record).name, record)

        def __getstate__(self) -> dict[str, Any]:  # as in SweepStopper
            return {"recorder": None}

    return TrialCallback(recorder)


def run_tune(
    job: StageJob,
    searcher: Any,
    stopper: Any,
    *,
    num_trials: int,
    limit: int,
    name: str,
    folder: str,
    resources: Mapping[str, float] | None,
    labels: Mapping[str, str],
    max_failures: int,
    callbacks: Sequence[Any] = (),
) -> Any:
    """Runs trials until the searcher has no more points or the stopper ends the run.

    Args:
        job: The stage that every trial gets.
        searcher: Result of `make_searcher`.
        stopper: Result of `make_stopper`.
        num_trials: Number of trials.
        limit: Largest number of trials that run at once.
        name, folder: Name and folder of Tune's own files.
        resources: Ray resources of a trial; None if Ray Train workers do its work and reserve their own.
        labels: Labels of the nodes on which trials run.
        max_failures: How often a trial is restarted after its process is lost.
        callbacks: Tune callbacks.

    Returns:
        Tune's ResultGrid.
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
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it warns about its result files, which are deleted
    bundle = {"memory": float(2**20)} if resources is None else dict(resources)  # Tune refuses an empty bundle (2.60)
    trial_resources = tune.PlacementGroupFactory([bundle], bundle_label_selector=[dict(labels)] if labels else None)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, job=job), trial_resources),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=num_trials,
            max_concurrent_trials=limit,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=folder,
            stop=stopper,
            failure_config=tune.FailureConfig(max_failures=max_failures),
            verbose=0,
            callbacks=list(callbacks),
        ),
    )
    return tuner.fit()


def _trial_name(trial: Any) -> str:
    """Returns the name of a Tune trial and of its folder."""
    return f"trial-{trial.config.get('number', 0):05d}-{trial.trial_id}"
