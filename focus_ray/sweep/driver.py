"""Runs a sweep with Ray Tune, keeps its records in the storage, and removes everything else at the end.

Tune starts trials, and restarts them if their machine is lost. A trial asks the judge after every score and ends itself
if it is pruned: if Tune stopped it, its Ray Train placement group could remain (Ray 2.60). The tried points are in our own
records (`records`), not in Tune's experiment state. So a sweep can be resumed on any machine that reaches its storage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focus_ray.cluster.connect import connect, resources_per_worker, uses_gpu
from focus_ray.cluster.failures import reason_of
from focus_ray.cluster.ownership import Heartbeat, check_resumable
from focus_ray.cluster.preflight import count_concurrent_runs, probe_nodes
from focus_ray.cluster.ray_private import remove_working_folders
from focus_ray.data.read import list_categories
from focus_ray.data.schema import COMMIT_NAME
from focus_ray.errors import ConfigError, DataError, SweepError
from focus_ray.fitting.fit import check_prerequisites
from focus_ray.fitting.settings import Config
from focus_ray.fitting.shards import BatchSchedule, fits_memory
from focus_ray.fitting.split import Split
from focus_ray.names import unique_name
from focus_ray.storage.files import join, read_bytes, remove_folder
from focus_ray.sweep import records
from focus_ray.sweep.proposer import Proposer
from focus_ray.sweep.race import Judge
from focus_ray.sweep.records import TrialRecord
from focus_ray.sweep.settings import Point, SweepConfig
from focus_ray.sweep.shared_work import SharedInputs, compute_shared_inputs
from focus_ray.sweep.trial_inputs import (
    check_trial_settings,
    split_for_judging,
)
from focus_ray.sweep.tune import Log, make_searcher, make_stopper, placement_groups, run_tune, trial_callback
from focus_ray.sweep.worker import STOPPED, StageJob, score_steps
from focus_ray.tracking.recorder import Recorder
from focus_ray.tracking.trials import SweepRecorder
from focus_ray.training.training import resolve_paths


@dataclass(frozen=True)
class SweepOutcome:
    """The result of a sweep.

    Attributes:
        root: Folder of the sweep.
        records: Records of all trials.
        stopped: True if the sweep was stopped before its end.
    """

    root: str
    records: list[TrialRecord]
    stopped: bool

    @property
    def best(self) -> dict[str | None, TrialRecord]:
        """Stage -> its best trial."""
        return records.best_records(self.records)

    @property
    def failed(self) -> list[TrialRecord]:
        """Records of the failed trials."""
        return [record for record in self.records if record.status == "failed"]


def run_sweep(config: SweepConfig, log: Log = lambda message: None) -> SweepOutcome:
    """Runs a new sweep in its own folder.

    Args:
        config: Configuration of the sweep.
        log: Takes messages.

    Raises:
        SweepError: The folder already contains a sweep, or no trial has a score.
        DataError: The data set lacks a category, or has too few images.
        ConfigError: The search space is not valid for the network, or a tracker cannot be used.
        WeightsError: The weights of the network cannot be loaded.
        TrainingError: The cluster is too small for a trial.
    """
    base = resolve_paths(config.config_at())
    if config.name is None:
        config = config.model_copy(update={"name": unique_name(base.cluster.team, base.name)})
    config = config.model_copy(update={"base": base.model_dump(mode="json")})
    root = join(base.storage, str(config.name))
    records.check_no_sweep(root)
    splits = _read_splits(config, base)
    _check_points(config, base, splits)
    fingerprints = {category: split.fingerprint for category, split in splits.items()}
    log(f"sweep: {root}")
    return _run_and_report(config, base, root, splits, log, lambda: records.claim_folder(root, config, fingerprints))


def resume_sweep(folder: str, log: Log = lambda message: None) -> SweepOutcome:
    """Resumes a sweep: runs all trials that are neither finished nor pruned. Failed trials run again.

    Args:
        folder: Folder of the sweep.
        log: Takes messages.

    Raises:
        SweepError: The folder contains no sweep, the sweep is still running, or no trial has a score.
        DataError: The images have changed.
        TrainingError: The cluster is too small for a trial.
    """
    root = folder if "://" in folder else str(Path(folder).expanduser().absolute())
    config = records.read_sweep(root)
    base = config.config_at()
    splits = _read_splits(config, base)
    check_resumable(root, {category: split.fingerprint for category, split in splits.items()}, SweepError)
    log(f"sweep: {root}, {len(records.read_records(root))} trials have records")
    return _run_and_report(config, base, root, splits, log, lambda: None)


def _read_splits(config: SweepConfig, base: Config) -> dict[str, Split]:
    """Returns category -> split of its images, in judging order: first the categories of `race.order`.

    Raises:
        DataError: The data set lacks a category, or a category has too few images.
    """
    existing = list_categories(base.data.uri)
    categories = list(base.data.categories or existing)
    unknown = sorted({*categories, *(config.race.order or ())} - set(existing))
    if unknown:
        raise DataError(f"{base.data.uri} has no category {', '.join(unknown)}; it has {', '.join(existing)}")
    first = [category for category in config.race.order or () if category in categories]
    ordered = [*first, *(category for category in categories if category not in first)]
    return {category: split_for_judging(base, category, config.objective) for category in ordered}


def _check_points(config: SweepConfig, base: Config, splits: Mapping[str, Split]) -> None:
    """Checks the points of the search space with the data and the network.

    For the searcher `optuna`, checks the values of each setting alone.

    Raises:
        ConfigError: A point is not valid for the network.
        DataError: A category has too few images for the workers.
        WeightsError: The weights of the network cannot be loaded.
    """
    if config.searcher == "optuna":
        points: Sequence[Point] = config.single_points()
    else:
        points = Proposer(config).points
    checked: set[str] = set()
    for point in points:
        settings = config.config_at(point)
        ingredients = f"{settings.model.backbone} {settings.model.weights} {settings.density.metric}"
        if ingredients not in checked:
            check_prerequisites(settings)
            checked.add(ingredients)
        try:
            check_trial_settings(settings)
        except ValueError as error:
            settings_text = ", ".join(f"{key}={value!r}" for key, value in point.items())
            raise ConfigError(f"space: at {settings_text}: {error}") from None
    for category, split in splits.items():
        try:
            BatchSchedule.agree(split.num_fit, base.cluster.num_workers, base.train.batch_size_per_worker)
        except DataError as error:
            raise DataError(f"category {category!r}: {error}") from None


def _run_and_report(
    config: SweepConfig, base: Config, root: str, splits: dict[str, Split], log: Log, claim: Callable[[], None]
) -> SweepOutcome:
    """Runs the trials of a new or resumed sweep and writes its report.

    Args:
        config: Configuration of the sweep.
        base: Base configuration, with absolute paths.
        root: Folder of the sweep.
        splits: Category -> split of its images.
        log: Takes messages.
        claim: Takes possession of the folder. Called after the check that the cluster is large enough.

    Raises:
        SweepError: No trial has a score.
    """
    from focus_ray.sweep.report import write_report

    recorder = Recorder(base.trackers, base.storage, log)
    is_private = connect()
    import ray

    try:
        trains = config.max_epochs > 0
        streams = trains and any(not fits_memory(base, split) for split in splits.values())
        limit = count_concurrent_runs(
            base.cluster,
            is_private,
            streams,
            log,
            share=config.cluster_share,
            limit=config.max_concurrent_trials,
            prefix="base.",
        )
        probe_nodes([join(base.data.uri, f"category={c}", COMMIT_NAME) for c in splits], [root])
        claim()
        sweep_recorder = SweepRecorder(
            recorder,
            read_bytes(join(root, records.SWEEP)),
            str(config.name),
            base.storage,
            base.cluster.team,
            config.model_dump(mode="json", exclude_none=True),
        )
        state = _run_trials(_SweepDriver(config, base, root, splits, streams, log, sweep_recorder), limit)
    finally:
        if is_private:
            ray.shutdown()
    trial_records = records.read_records(root)
    outcome = SweepOutcome(root, trial_records, state == "stopped")
    if outcome.best:
        write_report(root, config, trial_records)
        log(f"report: {join(root, 'report.html')}")
    elif trial_records and not outcome.stopped:
        reasons = "; ".join(f"trial {record.name}: {record.reason}" for record in outcome.failed[:3])
        raise SweepError(f"{root}: none of {len(trial_records)} trials has a score; {reasons}")
    return outcome


def _run_trials(driver: _SweepDriver, limit: int) -> str:
    """Runs all trials and releases everything that the sweep holds.

    Returns:
        "finished" or "stopped". The folder of the sweep records the same state.
    """
    heartbeat = Heartbeat(driver.root)
    state = "failed"
    try:
        with driver.stop_on_signals():
            driver.shared = compute_shared_inputs(
                driver.config, driver.splits, driver.use_gpu, driver.stopping, driver.log
            )
            for stage in [None] if driver.config.scope == "all_categories" else list(driver.splits):
                if not driver.stopping.is_set():
                    driver.run_stage(stage, limit)
        state = "stopped" if driver.stopping.is_set() else "finished"
    finally:
        try:
            driver.close()
            driver.close_trackers(state)
        finally:
            heartbeat.close(state)
    return state


class _SweepDriver:
    """The state of a running sweep in the process that started it."""

    def __init__(
        self,
        config: SweepConfig,
        base: Config,
        root: str,
        splits: dict[str, Split],
        streams: bool,
        log: Log,
        sweep_recorder: SweepRecorder,
    ) -> None:
        import ray

        self.sweep_recorder = sweep_recorder
        self.config, self.base, self.root, self.splits, self.log = config, base, root, splits, log
        self.streams = streams
        self.stopping = threading.Event()
        self.use_gpu = uses_gpu(base.cluster)
        self.shared = SharedInputs()
        self.judge: Any = None
        self.experiment = f"{config.name}-{uuid.uuid4().hex[:6]}"  # name of Tune's files, deleted at the end
        self.scratch = tempfile.mkdtemp(prefix="focus-ray-sweep-")
        self.node_id = ray.get_runtime_context().get_node_id()
        self.groups_before = placement_groups()

    @contextlib.contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """Context manager: SIGINT or SIGTERM stops the sweep in an orderly way; a second signal ends the process at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous_handlers: dict[int, Any] = {}

        def stop(number: int, frame: Any) -> None:
            """Sets `stopping` and restores the previous handler of the signal."""
            signal.signal(number, previous_handlers[number])
            self.stopping.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            previous_handlers[number] = signal.signal(number, stop)
        try:
            yield
        finally:
            for caught_signal, handler in previous_handlers.items():
                signal.signal(caught_signal, handler)

    def close(self) -> None:
        """Releases everything that this sweep holds in the cluster and on its machines."""
        import ray
        from ray import PlacementGroupID
        from ray.util.placement_group import PlacementGroup, remove_placement_group
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.shared = SharedInputs()
        if self.judge is not None:
            ray.kill(self.judge)
        shutil.rmtree(self.scratch, ignore_errors=True)
        # Tune leaves one folder per trial in the session folder of every node, also after the job (Ray 2.60).
        remove_working_folders(self.experiment)
        cleanup_tasks = []
        for node in ray.nodes():
            if node["Alive"] and node["NodeID"] != self.node_id:
                on_node = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
                task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=on_node)(remove_working_folders)
                cleanup_tasks.append(task.remote(self.experiment))
        if cleanup_tasks:
            ray.wait(cleanup_tasks, num_returns=len(cleanup_tasks), timeout=10.0)
        # A killed Ray Train controller does not remove the placement group of its workers (Ray 2.60).
        for name in placement_groups() - self.groups_before:
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(name)))
        remove_folder(join(self.root, "scratch"))

    def close_trackers(self, state: str) -> None:
        """Records the end of the sweep in the trackers, and all trials that are not recorded yet: Tune skips some callbacks."""
        if not self.sweep_recorder.recorder:
            return
        try:
            trial_records = records.read_records(self.root)
        except DataError as error:  # a failure of the records must not end a finished sweep
            self.log(f"WARNING: trackers lack some trials: {error}")
            trial_records = []
        for record in trial_records:
            self.sweep_recorder.log_trial(record.name, dataclasses.asdict(record))
        best = {
            stage or "": dataclasses.asdict(record) for stage, record in records.best_records(trial_records).items()
        }
        self.sweep_recorder.close(best, failed=state == "failed")

    # ---- trials
    def run_stage(self, stage: str | None, limit: int) -> None:
        """Runs the missing trials of a stage.

        Args:
            stage: Category to search for; None for all categories.
            limit: Largest number of trials that run at once.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        categories = list(self.splits) if stage is None else [stage]
        proposer = Proposer(self.config)
        max_epochs = self.config.max_epochs
        done_records = [
            record for record in records.read_records(self.root) if record.stage == stage and record.status != "failed"
        ]
        for record in sorted(done_records, key=lambda record: record.number):
            proposer.tell(record.number, record.point, record.score, score_steps(record, categories, max_epochs))
        num_missing = proposer.total - len(done_records)
        if num_missing <= 0:
            return
        # The judge runs on the node of the driver, so that both live and die together.
        on_this_node = NodeAffinitySchedulingStrategy(node_id=self.node_id, soft=False)
        judge_actor = ray.remote(num_cpus=0, scheduling_strategy=on_this_node)(Judge)
        self.judge = judge_actor.options(name=f"judge-{stage or 'all'}", namespace=self.experiment).remote(
            self.config, categories, max_epochs
        )
        for record in sorted(done_records, key=lambda record: record.ended_at):
            self.judge.replay.remote(record.number, record.curves())
            if record.status == "cut":
                self.judge.withdraw.remote(record.number)
        job = StageJob(
            sweep=self.config,
            reference_config=self.config.reference_config,
            stage=stage,
            splits={category: self.splits[category] for category in categories},
            root=self.root,
            use_gpu=self.use_gpu,
            images=self.shared.images,
            features=self.shared.features,
            judge=self.judge,
        )
        self.log(f"{num_missing} trial(s) on {', '.join(categories)}, {len(done_records)} already done")
        self._run_missing_trials(job, proposer, num_missing, limit)
        ray.kill(self.judge)
        self.judge = None

    def _run_missing_trials(self, job: StageJob, proposer: Proposer, num_missing: int, limit: int) -> None:
        """Runs the missing trials with Ray Tune and writes records of trials whose process was lost too often."""

        def stop() -> bool:
            """Returns True after a stop signal, and then also tells the judge to end all trials."""
            if self.stopping.is_set():
                self.judge.stop.remote(STOPPED)  # trials end at their next score; Tune ends the others soon
            return self.stopping.is_set()

        # Ray Train workers have their own placement group; `limit` leaves room for them.
        has_train_workers = self.base.cluster.num_workers > 1 or self.streams
        grid = run_tune(
            job,
            make_searcher(proposer, num_missing, self.log),
            make_stopper(stop),
            num_trials=num_missing,
            limit=limit,
            name=self.experiment if job.stage is None else f"{self.experiment}-{job.stage}",
            folder=self.scratch,
            resources=None if has_train_workers else resources_per_worker(self.base.cluster, self.use_gpu),
            labels=self.base.cluster.labels,
            max_failures=self.base.cluster.max_failures,
            callbacks=[trial_callback(self.sweep_recorder)] if self.sweep_recorder.recorder else [],
        )
        if self.stopping.is_set():
            return
        recorded_names = {record.name for record in records.read_records(self.root)}
        for result in grid:
            if result.error is None:
                continue
            config = result.config or {}
            record = TrialRecord(
                config["number"], job.stage, config["point"], "failed", None, reason=reason_of(result.error)
            )
            if record.name not in recorded_names:  # its process was lost more than max_failures times
                records.write_record(self.root, dataclasses.replace(record, ended_at=time.time()))
                self.log(f"trial {record.name}: FAILED: {record.reason}")
