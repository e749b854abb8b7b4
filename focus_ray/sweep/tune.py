"""The seams to Ray Tune: a searcher that hands out the proposer's points, a stopper, placement groups."""

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
from focus_ray.sweep import records
from focus_ray.sweep.proposer import Proposer
from focus_ray.sweep.settings import Point
from focus_ray.sweep.worker import StageJob, run_trial
from focus_ray.tracking.trials import SweepRecorder

_CLEANUP_S = 2  # a trial that is stopped may go on so long before its process is ended


def placement_groups() -> set[str]:
    """Ids of this job's placement groups; none where the dashboard, which knows them, does not answer."""
    import ray
    from ray.util.state import list_placement_groups
    from ray.util.state.exception import RayStateApiException

    context = ray.get_runtime_context()
    address = context.gcs_address  # without it, two clusters on a machine confuse the state API
    for pause_s in (1.0, 3.0, 0.0):
        with contextlib.suppress(RayStateApiException, ConnectionError, RuntimeError):
            groups = list_placement_groups(
                address=address,
                filters=[("creator_job_id", "=", context.get_job_id())],
                limit=10_000,
                raise_on_missing_output=False,
            )
            return {group.placement_group_id for group in groups if group.state != "REMOVED"}
        time.sleep(pause_s)
    return set()


def make_stopper(stop: Callable[[], bool]) -> Any:
    """Ends Tune's run once `stop` says so; it is asked all the time."""
    from ray import tune

    class SweepStopper(tune.Stopper):
        def __init__(self, stop: Callable[[], bool] | None) -> None:
            self.stop = stop

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return self.stop is not None and self.stop()

        def __getstate__(self) -> dict[str, Any]:  # Tune keeps a copy to restore a run from, which is never done
            return {"stop": None}

    return SweepStopper(stop)


def make_searcher(proposer: Proposer, missing: int, log: Log) -> Any:
    """A Tune searcher that hands out the proposer's points."""
    from ray.tune.search import Searcher

    class PointSearcher(Searcher):
        def __init__(self, proposer: Proposer, left: int, log: Log) -> None:
            super().__init__(metric="score", mode="max")
            self.proposer, self.left, self.log = proposer, left, log
            self.running: dict[str, tuple[int, Point]] = {}

        def __getstate__(self) -> dict[str, Any]:  # as the stopper's
            return {}

        def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
            return True

        def suggest(self, trial_id: str) -> Any:
            asked = self.proposer.ask()
            if asked is None:
                return Searcher.FINISHED
            self.running[trial_id] = asked
            return {"number": asked[0], "point": asked[1]}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            number, point = self.running.pop(trial_id)
            told = json.loads((result or {}).get("told", "{}"))
            record = told.get("record")
            if error or record is None or record["status"] not in records.DONE:
                self.proposer.fail(number)
                if record is not None:
                    self.log(f"trial {number}: FAILED: {record['reason']}")
                return
            self.proposer.tell(number, point, record["score"], told["steps"])
            self.left -= 1
            settings = ", ".join(f"{key}={records.shown(value)}" for key, value in point.items())
            ended = f"score {record['score']:.4f}" if record["status"] == "finished" else f"cut, {record['reason']}"
            self.log(f"trial {number}: {settings}: {ended} ({record['seconds']:.1f} s; {self.left} to go)")

        def save(self, checkpoint_path: str) -> None:
            Path(checkpoint_path).write_bytes(b"")  # the records are what a sweep is taken up again from

        def restore(self, checkpoint_path: str) -> None:
            raise NotImplementedError

    return PointSearcher(proposer, missing, log)


def trial_callback(told: SweepRecorder) -> Any:
    """A callback of Tune that tells trackers of a trial as soon as it ends."""
    from ray import tune

    class TrialCallback(tune.Callback):
        def __init__(self, told: SweepRecorder | None) -> None:
            self.told = told

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            record = json.loads(result.get("told", "{}")).get("record")
            if self.told is not None and record is not None:
                self.told.log_trial(records.Record(**record).name, record)

        def __getstate__(self) -> dict[str, Any]:  # as the stopper's
            return {"told": None}

    return TrialCallback(told)


def run_tune(
    job: StageJob,
    searcher: Any,
    stopper: Any,
    *,
    num_trials: int,
    limit: int,
    name: str,
    folder: str,
    asked: Mapping[str, float] | None,
    labels: Mapping[str, str],
    max_failures: int,
    callbacks: Sequence[Any] = (),
) -> Any:
    """Runs trials until the searcher has no more or the stopper ends them.

    Args:
        limit: so many side by side.  name, folder: of Tune's own files.
        asked: of Ray, for a trial; None: its work is done by workers that ask for themselves.
        labels: of the nodes that trials run on.  max_failures: of a trial, by lost processes.
        callbacks: of Tune.

    Returns: Tune's grid of results.
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

    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it misses its own result files, which are not kept
    bundle = {"memory": float(2**20)} if asked is None else dict(asked)  # Tune refuses an empty bundle (2.60)
    where = tune.PlacementGroupFactory([bundle], bundle_label_selector=[dict(labels)] if labels else None)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, job=job), where),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=num_trials,
            max_concurrent_trials=limit,
            reuse_actors=True,
            trial_name_creator=_name_of,
            trial_dirname_creator=_name_of,
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


def _name_of(trial: Any) -> str:
    return f"trial-{trial.config.get('number', 0):05d}-{trial.trial_id}"
