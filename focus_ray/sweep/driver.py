"""Runs a sweep (a search for good settings) with Ray Tune, keeps its results, and deletes temporary files at the end.

Tune starts trials, and restarts them if their machine is lost. A trial asks the `TrialPruner` actor after every score and ends
itself if it is pruned, i.e. stopped early for a low score: if Tune stopped it, its placement group could remain (Ray 2.60).
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

from focus_ray.cluster.capacity import ClusterCapacity
from focus_ray.cluster.connect import connect_to_ray
from focus_ray.cluster.failures import describe_root_cause
from focus_ray.cluster.ownership import FolderOwner, check_folder_owned, check_images_unchanged, find_next_generation
from focus_ray.cluster.preflight import check_storage_on_nodes
from focus_ray.cluster.ray_private import remove_tune_folders
from focus_ray.cluster.resource_wait import ResourceWait
from focus_ray.cluster.settings import MAX_FAILURES
from focus_ray.data.read import list_categories
from focus_ray.data.schema import COMMIT_NAME
from focus_ray.errors import ConfigError, DataError, SweepError
from focus_ray.fitting.fit import check_fit_prerequisites
from focus_ray.fitting.settings import Config
from focus_ray.fitting.shards import streams_training_images
from focus_ray.fitting.split import SplitRule
from focus_ray.names import Log, make_unique_name
from focus_ray.settings.sections import dump_settings
from focus_ray.storage.files import file_exists, join_path, read_bytes, remove_folder
from focus_ray.sweep import records
from focus_ray.sweep.proposer import SettingsProposer
from focus_ray.sweep.race import TrialPruner
from focus_ray.sweep.records import TrialRecord
from focus_ray.sweep.settings import Point, SweepConfig, describe_point
from focus_ray.sweep.shared_work import SharedTrialInputs, compute_shared_inputs
from focus_ray.sweep.trial_inputs import check_trial_settings, split_for_scoring
from focus_ray.sweep.tune import SweepStopper, TuneSearcher, run_tune_trials
from focus_ray.sweep.worker import STOPPED, SweepStageInputs, run_trial
from focus_ray.tracking.recorder import BackgroundRecorder
from focus_ray.tracking.trials import SweepRecorder
from focus_ray.training.training import check_enough_images, describe_changed_settings, make_paths_absolute


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
    def best_records(self) -> dict[str | None, TrialRecord]:
        """The best trials: stage -> record (result) of its best trial.

        A stage is one search: for a category, or, with the stage None, for all categories together.
        """
        return records.find_best_records(self.records)

    @property
    def failed_records(self) -> list[TrialRecord]:
        """The records of the failed trials."""
        return [record for record in self.records if record.status == "failed"]


def run_sweep(config: SweepConfig, *, resume: bool = False, log: Log = lambda message: None) -> SweepOutcome:
    """Runs a sweep (a search for good settings) in its own folder, writes its report, and returns its result.

    It joins or starts a Ray cluster, see `cluster.connect.connect_to_ray`.

    Args:
        config: Configuration of the sweep.
        resume: If the folder already contains a sweep of this configuration, continue it as `resume_sweep` does.
        log: Called with messages.

    Raises:
        SweepError: The folder contains a sweep and `resume` is False, `resume` is True without a name or with changed settings,
            another process runs the sweep, or no trial has a score although the sweep was not stopped.
        DataError: The data set lacks a category, or has too few images, images cannot be read, or a node cannot access the
            storage.
        ConfigError: The search space is not valid for the network, or a tracker cannot be used.
        WeightsError: The weights of the network cannot be loaded.
        TrainingError: Ray does not start or answer, or the cluster is too small for a trial.
    """
    base = make_paths_absolute(config.make_trial_config())
    if config.name is None:
        if resume:
            raise SweepError("--resume needs the name of the sweep to continue: name=...")
        config = config.model_copy(update={"name": make_unique_name(base.cluster.team, base.name)})
    config = config.model_copy(update={"base": dump_settings(base)})
    root = join_path(base.storage, str(config.name))
    if resume and file_exists(join_path(root, records.SWEEP_FILE)):
        if changed := describe_changed_settings(records.read_sweep_config(root), config):
            raise SweepError(
                f"{root}: the sweep began with other settings: {'; '.join(changed.values())}. Continue with the same settings, "
                f"with `focus-ray sweep resume {root}`, or start a new sweep under another name"
            )
        return resume_sweep(root, log)
    records.check_folder_has_no_sweep(root)
    splits = _split_categories(config, base)
    _check_trial_configs(config, base, splits)
    fingerprints = {category: split.fingerprint for category, split in splits.items()}
    log(f"sweep: {root}")
    return _run_and_report_sweep(
        config, root, splits, log, 1, lambda: records.claim_sweep_folder(root, config, fingerprints)
    )


def resume_sweep(folder: str, log: Log = lambda message: None) -> SweepOutcome:
    """Resumes a sweep: runs all trials that have no result yet, and all failed trials again. Writes the report anew.

    Finished and pruned trials (stopped early for a low score) do not run again. The function may wait up to `LEASE_S` for a sign
    of life of the earlier driver.

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
    config = records.read_sweep_config(root)
    base = config.make_trial_config()
    splits = _split_categories(config, base)
    generation = find_next_generation(root, SweepError, log)
    check_images_unchanged(root, {category: split.fingerprint for category, split in splits.items()})
    log(f"sweep: {root}, {len(records.read_trial_records(root))} trials have records")
    return _run_and_report_sweep(config, root, splits, log, generation, lambda: None)


def _split_categories(config: SweepConfig, base: Config) -> dict[str, SplitRule]:
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
    return {category: split_for_scoring(base, category, config.objective) for category in ordered}


def _check_trial_configs(config: SweepConfig, base: Config, splits: Mapping[str, SplitRule]) -> None:
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
    points = config.list_single_setting_points() if config.searcher == "optuna" else SettingsProposer(config).points
    checked: set[tuple[str, str, str | None]] = set()
    for point in points:
        settings = config.make_trial_config(point)
        ingredients = (settings.model.backbone, settings.model.weights, settings.density.metric)
        if ingredients not in checked:
            check_fit_prerequisites(settings)
            checked.add(ingredients)
        try:
            check_trial_settings(settings)
        except ValueError as error:
            raise ConfigError(f"space: at {describe_point(point)}: {error}") from None
    check_enough_images(base, splits)


def _run_and_report_sweep(
    config: SweepConfig, root: str, splits: dict[str, SplitRule], log: Log, generation: int, claim: Callable[[], None]
) -> SweepOutcome:
    """Runs the trials of a new or resumed sweep and writes its report.

    Args:
        config: Configuration of the sweep, with absolute paths.
        root: Folder of the sweep.
        splits: Category -> split of its images.
        log: Called with messages.
        generation: Generation of the folder that this process takes, see `FolderOwner`.
        claim: Takes possession of a new folder. Called after the check that the cluster is large enough.

    Raises:
        SweepError: No trial has a score although the sweep was not stopped, `claim` fails, or another process takes the folder
            over.
        ConfigError: A tracker cannot be used.
        DataError: A node cannot access the storage, or images cannot be read.
        TrainingError: Ray does not start or answer, or the cluster is too small for a trial.
    """
    from focus_ray.sweep.report import write_sweep_report

    base = config.make_trial_config()
    recorder = BackgroundRecorder(base.trackers, base.storage, log)
    is_private = connect_to_ray(namespace=base.cluster.ray_namespace)

    try:
        streams = config.max_steps > 0 and streams_training_images(base, splits.values())
        capacity = ClusterCapacity(
            base.cluster,
            is_private,
            log,
            streams=streams,
            share=config.cluster_share,
            limit=config.max_concurrent_trials,
            prefix="base.",
        )
        check_storage_on_nodes(
            [join_path(base.data.uri, f"category={c}", COMMIT_NAME) for c in splits], [root], base.cluster.labels, log
        )
        claim()
        sweep_recorder = SweepRecorder(
            recorder,
            read_bytes(join_path(root, records.SWEEP_FILE)),
            config.model_dump(mode="json", exclude_none=True),
        )
        state = _SweepDriver(config, root, generation, splits, streams, capacity, log, sweep_recorder).run_trials()
    finally:
        if is_private:
            ray.shutdown()
    trial_records = records.read_trial_records(root)
    outcome = SweepOutcome(root, trial_records, state == "stopped")
    if outcome.best_records:
        write_sweep_report(root, config, trial_records)
        log(f"report: {join_path(root, 'report.html')}")
    elif trial_records and not outcome.stopped:
        reasons = "; ".join(f"trial {record.name}: {record.reason}" for record in outcome.failed_records[:3])
        raise SweepError(f"{root}: none of {len(trial_records)} trials has a score; {reasons}")
    return outcome


@dataclass
class _SweepDriver:
    """Runs the trials of a sweep, in the process that started the sweep.

    Attributes:
        config: Configuration of the sweep.
        root: Folder of the sweep.
        generation: Generation of the folder that this process takes, see `FolderOwner`.
        splits: Category -> split of its images.
        streams: True if images are streamed, which needs Ray Train workers.
        capacity: Gives the number of trials that run at once.
        log: Called with messages.
        recorder: Sends results to the experiment trackers.
        stopping: Set by a signal, or when another process takes the folder over: the sweep ends in an orderly way.
        experiment: Name of Tune's files, which are deleted at the end.
        scratch: Folder of Tune's files on this machine.
    """

    config: SweepConfig
    root: str
    generation: int
    splits: dict[str, SplitRule]
    streams: bool
    capacity: ClusterCapacity
    log: Log
    recorder: SweepRecorder
    stopping: threading.Event = field(default_factory=threading.Event)
    experiment: str = field(default_factory=lambda: f"sweep-{uuid.uuid4().hex[:8]}")
    scratch: str = field(default_factory=lambda: tempfile.mkdtemp(prefix="focus-ray-sweep-"))

    def run_trials(self) -> str:
        """Runs all trials that have no result yet. At the end deletes temporary files and releases Ray's resources.

        Returns:
            "finished" or "stopped". The folder of the sweep records the same state, and "failed" if an error is raised.

        Raises:
            DataError: Images cannot be read, or the storage fails.
            SweepError: A stored result of a trial is not valid, or another process owns the folder or takes it over.
        """
        groups_before = list_placement_groups()
        owner = FolderOwner(self.root, self.generation, SweepError, self.stopping.set)
        state = "failed"
        try:
            with self.stop_on_signals():
                use_gpu = self.capacity.use_gpu
                shared = compute_shared_inputs(self.config, self.splits, use_gpu, self.stopping, self.log)
                for stage in [None] if self.config.scope == "all_categories" else list(self.splits):
                    if not self.stopping.is_set():
                        self.run_stage(stage, shared, use_gpu)
            state = "stopped" if self.stopping.is_set() else "finished"
        finally:
            try:
                self.remove_temporary_files(keep_shared_files=owner.is_taken_over)
                # A killed Ray Train controller does not remove the placement group of its workers (Ray 2.60).
                for name in list_placement_groups() - groups_before:
                    remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(name)))
                if not owner.is_taken_over:  # otherwise the new owner continues the runs of the trackers
                    self.close_trackers(state)
            finally:
                owner.close(state)
        return state

    @contextlib.contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """Context manager: SIGINT or SIGTERM stops the sweep in an orderly way.

        A second signal of the same kind is handled as before.

        Outside the main thread it does nothing.
        """
        previous_handlers: dict[int, Any] = {}

        def handle_stop_signal(number: int, frame: Any) -> None:
            """Sets `stopping` and restores the previous handler of the signal."""
            signal.signal(number, previous_handlers[number])
            self.stopping.set()

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                previous_handlers[number] = signal.signal(number, handle_stop_signal)
        try:
            yield
        finally:
            for caught_signal, handler in previous_handlers.items():
                signal.signal(caught_signal, handler)

    def remove_temporary_files(self, keep_shared_files: bool) -> None:
        """Deletes all temporary files of the sweep: on this machine, in its folder, and on all nodes of the cluster.

        Tune leaves one folder per trial in the session folder of every node, also after the job (Ray 2.60).

        Args: keep_shared_files: True keeps temporary files in the folder of the sweep, which another process may use.
        """
        shutil.rmtree(self.scratch, ignore_errors=True)
        if not keep_shared_files:
            remove_folder(join_path(self.root, "scratch"))
        tasks = []
        for node in ray.nodes():
            if node["Alive"]:
                on_node = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
                task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=on_node)(remove_tune_folders)
                tasks.append(task.remote(self.experiment))
        ray.wait(tasks, num_returns=len(tasks), timeout=10.0)

    def close_trackers(self, state: str) -> None:
        """Sends the trials that are not recorded yet and the end of the sweep to the experiment trackers.

        Args: state: "finished", "stopped" or "failed".
        """
        if not self.recorder.recorder:
            return
        try:
            trial_records = records.read_trial_records(self.root)
        except DataError as error:  # a failure of the records must not end a finished sweep
            self.log(f"WARNING: trackers lack some trials: {error}")
            trial_records = []
        for record in trial_records:
            self.recorder.log_trial(record.name, dataclasses.asdict(record))
        best = records.find_best_records(trial_records)
        self.recorder.close(
            {stage or "": dataclasses.asdict(record) for stage, record in best.items()}, failed=state == "failed"
        )

    def run_stage(self, stage: str | None, shared: SharedTrialInputs, use_gpu: bool) -> None:
        """Runs the trials of a stage that have no result yet, or that failed. A stage is one search: for a category, or for all.

        Args:
            stage: Category to search for; None for all categories.
            shared: Images and features that are the same for all trials.
            use_gpu: True if trials use a GPU.
        """
        splits = {name: split for name, split in self.splits.items() if stage in (None, name)}
        proposer = SettingsProposer(self.config)
        done_records = [
            record
            for record in records.read_trial_records(self.root)
            if record.stage == stage and record.status != "failed"
        ]
        for record in done_records:
            proposer.record_result(record.number, record.point, record.score, self.list_mean_scores(record, splits))
        num_left = proposer.num_trials - len(done_records)
        if num_left <= 0:
            return
        self.log(f"{num_left} trial(s) on {', '.join(splits)}, {len(done_records)} already done")
        # The pruner runs on the node of the driver, so that both live and die together.
        on_this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        pruner = ray.remote(num_cpus=0, scheduling_strategy=on_this_node)(TrialPruner).remote(
            self.config, list(splits), self.config.max_steps
        )
        for record in sorted(done_records, key=lambda record: record.ended_at):
            pruner.replay_scores.remote(record.number, record.parse_curves())
            if record.status == "cut":
                pruner.exclude_trial.remote(record.number)

        wait = ResourceWait(self.capacity, self.log)

        def should_stop() -> bool:
            """Returns whether a signal asked to stop. If so, also tells the `TrialPruner` actor to end all trials.

            Raises: TrainingError: the trials have waited too long for resources.
            """
            wait.check()
            if self.stopping.is_set():
                pruner.end_all_trials.remote(STOPPED)  # trials end at their next score; Tune ends the others soon
            return self.stopping.is_set()

        def handle_ended_trial(number: int, point: Point, record: TrialRecord | None) -> None:
            """Passes the result of an ended trial to the proposer, the experiment trackers and the log."""
            nonlocal num_left
            if record is None or record.status == "failed":
                proposer.record_result(number, point, None, failed=True)
            else:
                proposer.record_result(number, point, record.score, self.list_mean_scores(record, splits))
                num_left -= 1
            if record is not None:
                self.recorder.log_trial(record.name, dataclasses.asdict(record))
                settings = ", ".join(f"{key}={records.format_setting_value(value)}" for key, value in point.items())
                result = f"{record.status}: {record.reason}" if record.score is None else f"score {record.score:.4f}"
                self.log(f"trial {record.name}: {settings}: {result} ({record.seconds:.1f} s; {num_left} left)")

        cluster = self.config.make_trial_config().cluster
        # Ray Train workers reserve their own resources, for which `capacity` leaves room; Tune refuses an empty bundle (2.60).
        has_train_workers = cluster.num_workers > 1 or self.streams
        bundle = {"memory": float(2**20)} if has_train_workers else self.capacity.worker
        labels = [dict(cluster.labels)] if cluster.labels else None
        job = SweepStageInputs(
            self.config,
            stage,
            splits,
            self.root,
            self.generation,
            use_gpu,
            has_train_workers,
            shared.images,
            shared.features,
            pruner,
        )
        try:
            grid = run_tune_trials(
                tune.with_parameters(run_trial, job=job),
                tune.PlacementGroupFactory([bundle], bundle_label_selector=labels),
                tune.TuneConfig(
                    search_alg=TuneSearcher(proposer, handle_ended_trial, self.capacity),
                    num_samples=num_left,
                ),
                tune.RunConfig(
                    name=f"{self.experiment}-{stage or 'all'}",
                    storage_path=self.scratch,
                    stop=SweepStopper(should_stop),
                    failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                    verbose=0,
                ),
            )
        finally:
            ray.kill(pruner)
        recorded_names = {record.name for record in records.read_trial_records(self.root)}
        for result in [] if self.stopping.is_set() else grid:
            if result.error is not None:  # its process was lost more than MAX_FAILURES times
                number, point = result.config["number"], result.config["point"]
                reason = describe_root_cause(result.error)
                record = TrialRecord(number, stage, point, "failed", None, reason=reason, ended_at=time.time())
                if record.name not in recorded_names:
                    check_folder_owned(self.root, self.generation, SweepError)
                    records.write_trial_record(self.root, record)
                    self.log(f"trial {record.name}: {record.status}: {record.reason}")

    def list_mean_scores(self, record: TrialRecord, categories: Iterable[str]) -> list[tuple[int, float]]:
        """Returns (step, mean score so far) for each report of a trial, to tell the searcher about trials that ended early.

        A step counts training steps over all categories.

        Args:
            record: Result of the trial.
            categories: Categories in the order in which trials go through them.
        """
        max_steps = max(1, self.config.max_steps)
        final_scores: list[float] = []
        steps = {}
        for index, category in enumerate(categories):
            curve = record.parse_curves().get(category, [])
            for step, score in curve:
                steps[index * max_steps + max(1, step)] = float(np.mean([*final_scores, score]))
            final_scores += [score for _, score in curve[-1:]]
        return list(steps.items())


def list_placement_groups() -> set[str]:
    """Returns the ids of the Ray placement groups (reserved resources) of this job."""
    job = ray.get_runtime_context().get_job_id()
    table = ray.util.placement_group_table()
    return {name for name, group in table.items() if name.endswith(job) and group["state"] != "REMOVED"}
