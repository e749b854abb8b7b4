"""Runs a sweep (a search for good settings) with Ray Tune, keeps its results, and deletes temporary files at the end.

Tune starts trials, and restarts them if their machine is lost. A trial asks the `Judge` actor after every score and ends itself
if it is pruned, i.e. stopped early for a low score: if Tune stopped it, its Ray Train placement group could remain (Ray 2.60).
Each trial writes a record of its settings and scores (`records`); Tune's experiment state is not used. So a sweep can be resumed
on any machine that reaches its storage.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

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
from focus_ray.names import Log, make_unique_name
from focus_ray.storage.files import join_path, read_bytes, remove_folder
from focus_ray.sweep import records
from focus_ray.sweep.proposer import Proposer
from focus_ray.sweep.race import Judge
from focus_ray.sweep.records import TrialRecord
from focus_ray.sweep.settings import Point, SweepConfig
from focus_ray.sweep.shared_work import SharedInputs, compute_shared_inputs
from focus_ray.sweep.trial_inputs import check_trial_settings, split_for_judging
from focus_ray.sweep.tune import SweepStopper, TuneSearcher, run_tune
from focus_ray.sweep.worker import STOPPED, StageJob, run_trial
from focus_ray.tracking.recorder import Recorder
from focus_ray.tracking.trials import SweepRecorder
from focus_ray.training.training import resolve_paths


@dataclass(frozen=True)
class SweepOutcome:
    """The result of a sweep: its folder, the results of all trials, and whether it was stopped early.

    Attributes:
        root: Folder of the sweep.
        records: Results of all trials.
        stopped: True if the sweep was stopped before its end.
    """

    root: str
    records: list[TrialRecord]
    stopped: bool

    @property
    def best(self) -> dict[str | None, TrialRecord]:
        """The best trials: stage -> record (result) of its best trial.

        A stage is one search: for a category, or, with the stage None, for all categories together.
        """
        return records.best_records(self.records)

    @property
    def failed(self) -> list[TrialRecord]:
        """The records of the failed trials."""
        return [record for record in self.records if record.status == "failed"]


def run_sweep(config: SweepConfig, log: Log = lambda message: None) -> SweepOutcome:
    """Runs a new sweep (a search for good settings) in its own folder, writes its report, and returns its result.

    It joins or starts a Ray cluster, see `cluster.connect.connect`.

    Args:
        config: Configuration of the sweep.
        log: Called with messages.

    Raises:
        SweepError: The folder already contains a sweep, or no trial has a score although the sweep was not stopped.
        DataError: The data set lacks a category, or has too few images, images cannot be read, or a node cannot access the
            storage.
        ConfigError: The search space is not valid for the network, or a tracker cannot be used.
        WeightsError: The weights of the network cannot be loaded.
        TrainingError: Ray does not start or answer, or the cluster is too small for a trial.
    """
    base = resolve_paths(config.config_at())
    if config.name is None:
        config = config.model_copy(update={"name": make_unique_name(base.cluster.team, base.name)})
    config = config.model_copy(update={"base": base.model_dump(mode="json")})
    root = join_path(base.storage, str(config.name))
    records.check_no_sweep(root)
    splits = _read_splits(config, base)
    _check_points(config, base, splits)
    fingerprints = {category: split.fingerprint for category, split in splits.items()}
    log(f"sweep: {root}")
    return _run_and_report(config, root, splits, log, lambda: records.claim_folder(root, config, fingerprints))


def resume_sweep(folder: str, log: Log = lambda message: None) -> SweepOutcome:
    """Resumes a sweep: runs all trials that have no result yet, and all failed trials again. Writes the report anew.

    Finished and pruned trials (stopped early for a low score) do not run again.

    Args:
        folder: Folder of the sweep.
        log: Called with messages.

    Raises:
        SweepError: The folder contains no sweep, the sweep is still running, a record is damaged, or no trial has a score
            although the sweep was not stopped.
        ConfigError: The stored configuration is not valid, or a tracker cannot be used.
        DataError: The images have changed, the data set lacks a category or images, or a node cannot access the storage.
        TrainingError: Ray does not start or answer, or the cluster is too small for a trial.
    """
    root = folder if "://" in folder else str(Path(folder).expanduser().absolute())
    config = records.read_sweep(root)
    base = config.config_at()
    splits = _read_splits(config, base)
    check_resumable(root, {category: split.fingerprint for category, split in splits.items()}, SweepError)
    log(f"sweep: {root}, {len(records.read_records(root))} trials have records")
    return _run_and_report(config, root, splits, log, lambda: None)


def _read_splits(config: SweepConfig, base: Config) -> dict[str, Split]:
    """Divides the images of each category into images for training and for scoring trials. Returns category -> split.

    The categories are in the order in which trials go through them: first the categories of `race.order`.

    Args:
        config: Configuration of the sweep.
        base: Base configuration of all trials.

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
    """Checks before the sweep that the settings of the search space work with the data and the network.

    For the searcher `optuna`, checks the values of each setting alone.

    Args:
        config: Configuration of the sweep.
        base: Base configuration of all trials.
        splits: Category -> split of its images.

    Raises:
        ConfigError: A combination of settings is not valid for the network.
        DataError: A category has too few images for the workers.
        WeightsError: The weights of the network cannot be loaded.
    """
    points = config.single_points() if config.searcher == "optuna" else Proposer(config).points
    checked: set[tuple[str, str, str | None]] = set()
    for point in points:
        settings = config.config_at(point)
        ingredients = (settings.model.backbone, settings.model.weights, settings.density.metric)
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
    config: SweepConfig, root: str, splits: dict[str, Split], log: Log, claim: Callable[[], None]
) -> SweepOutcome:
    """Runs the trials of a new or resumed sweep and writes its report.

    Args:
        config: Configuration of the sweep, with absolute paths.
        root: Folder of the sweep.
        splits: Category -> split of its images.
        log: Called with messages.
        claim: Takes possession of the folder. Called after the check that the cluster is large enough.

    Raises:
        SweepError: No trial has a score although the sweep was not stopped, or `claim` fails.
        ConfigError: A tracker cannot be used.
        DataError: A node cannot access the storage, or images cannot be read.
        TrainingError: Ray does not start or answer, or the cluster is too small for a trial.
    """
    from focus_ray.sweep.report import write_report

    base = config.config_at()
    recorder = Recorder(base.trackers, base.storage, log)
    is_private = connect()

    try:
        streams = config.max_epochs > 0 and any(not fits_memory(base, split) for split in splits.values())
        limit = count_concurrent_runs(
            base.cluster,
            is_private,
            streams,
            log,
            share=config.cluster_share,
            limit=config.max_concurrent_trials,
            prefix="base.",
        )
        probe_nodes([join_path(base.data.uri, f"category={c}", COMMIT_NAME) for c in splits], [root])
        claim()
        sweep_recorder = SweepRecorder(
            recorder,
            read_bytes(join_path(root, records.SWEEP)),
            str(config.name),
            base.storage,
            base.cluster.team,
            config.model_dump(mode="json", exclude_none=True),
        )
        state = _SweepDriver(config, root, splits, streams, limit, log, sweep_recorder).run()
    finally:
        if is_private:
            ray.shutdown()
    trial_records = records.read_records(root)
    outcome = SweepOutcome(root, trial_records, state == "stopped")
    if outcome.best:
        write_report(root, config, trial_records)
        log(f"report: {join_path(root, 'report.html')}")
    elif trial_records and not outcome.stopped:
        reasons = "; ".join(f"trial {record.name}: {record.reason}" for record in outcome.failed[:3])
        raise SweepError(f"{root}: none of {len(trial_records)} trials has a score; {reasons}")
    return outcome


@dataclass
class _SweepDriver:
    """Runs the trials of a sweep, in the process that started the sweep.

    Attributes:
        config: Configuration of the sweep.
        root: Folder of the sweep.
        splits: Category -> split of its images.
        streams: True if images are streamed, which needs Ray Train workers.
        limit: Largest number of trials that run at once.
        log: Called with messages.
        recorder: Sends results to the experiment trackers.
        stopping: Set by a signal: the sweep ends in an orderly way.
        experiment: Name of Tune's files, which are deleted at the end.
        scratch: Folder of Tune's files on this machine.
    """

    config: SweepConfig
    root: str
    splits: dict[str, Split]
    streams: bool
    limit: int
    log: Log
    recorder: SweepRecorder
    stopping: threading.Event = field(default_factory=threading.Event)
    experiment: str = field(default_factory=lambda: f"sweep-{uuid.uuid4().hex[:8]}")
    scratch: str = field(default_factory=lambda: tempfile.mkdtemp(prefix="focus-ray-sweep-"))

    def run(self) -> str:
        """Runs all trials that have no result yet. At the end deletes temporary files and releases Ray's resources.

        Returns:
            "finished" or "stopped". The folder of the sweep records the same state, and "failed" if an error is raised.

        Raises:
            DataError: Images cannot be read, or the storage fails.
            SweepError: A stored result of a trial is not valid.
        """
        groups_before = placement_groups()
        heartbeat = Heartbeat(self.root)
        state = "failed"
        try:
            with self.stop_on_signals():
                use_gpu = uses_gpu(self.config.config_at().cluster)
                shared = compute_shared_inputs(self.config, self.splits, use_gpu, self.stopping, self.log)
                for stage in [None] if self.config.scope == "all_categories" else list(self.splits):
                    if not self.stopping.is_set():
                        self.run_stage(stage, shared, use_gpu)
            state = "stopped" if self.stopping.is_set() else "finished"
        finally:
            try:
                self.remove_files()
                # A killed Ray Train controller does not remove the placement group of its workers (Ray 2.60).
                for name in placement_groups() - groups_before:
                    remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(name)))
                self.close_trackers(state)
            finally:
                heartbeat.close(state)
        return state

    @contextlib.contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """Context manager: SIGINT or SIGTERM stops the sweep in an orderly way; a second signal is handled as before.

        Outside the main thread it does nothing.
        """
        previous_handlers: dict[int, Any] = {}

        def stop(number: int, frame: Any) -> None:
            """Sets `stopping` and restores the previous handler of the signal."""
            signal.signal(number, previous_handlers[number])
            self.stopping.set()

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                previous_handlers[number] = signal.signal(number, stop)
        try:
            yield
        finally:
            for caught_signal, handler in previous_handlers.items():
                signal.signal(caught_signal, handler)

    def remove_files(self) -> None:
        """Deletes all temporary files of the sweep: on this machine, in its folder, and on all nodes of the cluster.

        Tune leaves one folder per trial in the session folder of every node, also after the job (Ray 2.60).
        """
        shutil.rmtree(self.scratch, ignore_errors=True)
        remove_folder(join_path(self.root, "scratch"))
        tasks = []
        for node in ray.nodes():
            if node["Alive"]:
                on_node = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
                task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=on_node)(remove_working_folders)
                tasks.append(task.remote(self.experiment))
        ray.wait(tasks, num_returns=len(tasks), timeout=10.0)

    def close_trackers(self, state: str) -> None:
        """Sends the trials that are not recorded yet and the end of the sweep to the experiment trackers.

        Args: state: "finished", "stopped" or "failed".
        """
        if not self.recorder.recorder:
            return
        try:
            trial_records = records.read_records(self.root)
        except DataError as error:  # a failure of the records must not end a finished sweep
            self.log(f"WARNING: trackers lack some trials: {error}")
            trial_records = []
        for record in trial_records:
            self.recorder.log_trial(record.name, dataclasses.asdict(record))
        best = records.best_records(trial_records)
        self.recorder.close(
            {stage or "": dataclasses.asdict(record) for stage, record in best.items()}, failed=state == "failed"
        )

    def run_stage(self, stage: str | None, shared: SharedInputs, use_gpu: bool) -> None:
        """Runs the trials of a stage that have no result yet, or that failed. A stage is one search: for a category, or for all.

        Args:
            stage: Category to search for; None for all categories.
            shared: Images and features that are the same for all trials.
            use_gpu: True if trials use a GPU.
        """
        splits = {name: split for name, split in self.splits.items() if stage in (None, name)}
        proposer = Proposer(self.config)
        done_records = [
            record for record in records.read_records(self.root) if record.stage == stage and record.status != "failed"
        ]
        for record in done_records:
            proposer.tell(record.number, record.point, record.score, self.score_steps(record, splits))
        num_left = proposer.total - len(done_records)
        if num_left <= 0:
            return
        self.log(f"{num_left} trial(s) on {', '.join(splits)}, {len(done_records)} already done")
        # The judge runs on the node of the driver, so that both live and die together.
        on_this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        judge = ray.remote(num_cpus=0, scheduling_strategy=on_this_node)(Judge).remote(
            self.config, list(splits), self.config.max_epochs
        )
        for record in sorted(done_records, key=lambda record: record.ended_at):
            judge.replay.remote(record.number, record.curves())
            if record.status == "cut":
                judge.withdraw.remote(record.number)

        def stop() -> bool:
            """Returns whether a signal asked to stop. If so, also tells the `Judge` actor to end all trials."""
            if self.stopping.is_set():
                judge.stop.remote(STOPPED)  # trials end at their next score; Tune ends the others soon
            return self.stopping.is_set()

        def end_trial(number: int, point: Point, record: TrialRecord | None) -> None:
            """Passes the result of an ended trial to the proposer, the experiment trackers and the log."""
            nonlocal num_left
            if record is None or record.status == "failed":
                proposer.tell(number, point, None, failed=True)
            else:
                proposer.tell(number, point, record.score, self.score_steps(record, splits))
                num_left -= 1
            if record is not None:
                self.recorder.log_trial(record.name, dataclasses.asdict(record))
                settings = ", ".join(f"{key}={records.format_value(value)}" for key, value in point.items())
                result = f"{record.status}: {record.reason}" if record.score is None else f"score {record.score:.4f}"
                self.log(f"trial {record.name}: {settings}: {result} ({record.seconds:.1f} s; {num_left} left)")

        cluster = self.config.config_at().cluster
        # Ray Train workers reserve their own resources, for which `limit` leaves room; Tune refuses an empty bundle (2.60).
        has_train_workers = cluster.num_workers > 1 or self.streams
        bundle = {"memory": float(2**20)} if has_train_workers else resources_per_worker(cluster, use_gpu)
        labels = [dict(cluster.labels)] if cluster.labels else None
        job = StageJob(self.config, stage, splits, self.root, use_gpu, shared.images, shared.features, judge)
        try:
            grid = run_tune(
                tune.with_parameters(run_trial, job=job),
                tune.PlacementGroupFactory([bundle], bundle_label_selector=labels),
                tune.TuneConfig(
                    search_alg=TuneSearcher(proposer, end_trial),
                    num_samples=num_left,
                    max_concurrent_trials=self.limit,
                ),
                tune.RunConfig(
                    name=f"{self.experiment}-{stage or 'all'}",
                    storage_path=self.scratch,
                    stop=SweepStopper(stop),
                    failure_config=tune.FailureConfig(max_failures=cluster.max_failures),
                    verbose=0,
                ),
            )
        finally:
            ray.kill(judge)
        recorded_names = {record.name for record in records.read_records(self.root)}
        for result in [] if self.stopping.is_set() else grid:
            if result.error is not None:  # its process was lost more than max_failures times
                number, point = result.config["number"], result.config["point"]
                reason = reason_of(result.error)
                record = TrialRecord(number, stage, point, "failed", None, reason=reason, ended_at=time.time())
                if record.name not in recorded_names:
                    records.write_record(self.root, record)
                    self.log(f"trial {record.name}: {record.status}: {record.reason}")

    def score_steps(self, record: TrialRecord, categories: Iterable[str]) -> list[tuple[int, float]]:
        """Returns (step, mean score so far) for each report of a trial, to tell the searcher about trials that ended early.

        A step counts training epochs over all categories.

        Args:
            record: Result of the trial.
            categories: Categories in the order in which trials go through them.
        """
        max_epochs = max(1, self.config.max_epochs)
        final_scores: list[float] = []
        steps = {}
        for index, category in enumerate(categories):
            curve = record.curves().get(category, [])
            for epoch, score in curve:
                steps[index * max_epochs + max(1, epoch)] = float(np.mean([*final_scores, score]))
            final_scores += [score for _, score in curve[-1:]]
        return list(steps.items())


def placement_groups() -> set[str]:
    """Returns the ids of the Ray placement groups (reserved resources) of this job."""
    job = ray.get_runtime_context().get_job_id()
    table = ray.util.placement_group_table()
    return {name for name, group in table.items() if name.endswith(job) and group["state"] != "REMOVED"}
