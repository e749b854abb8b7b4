"""A sweep on Ray Tune: trials as the cluster allows, shared work made once, records in storage, nothing left behind.

Tune starts trials and replaces those whose machine is lost. What has lost is ended by the trial itself, which asks the
judge after every score: a trial that Tune stops from outside can leave its Train placement group behind (Ray 2.60).
What was tried is in our own records (`records`), not in Tune's experiment state: a sweep is taken up again from any
machine that reaches its storage.
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
from focus_ray.cluster.ownership import SignOfLife, check_resumable
from focus_ray.cluster.preflight import concurrent_runs, probe_nodes
from focus_ray.cluster.ray_private import remove_working_folders
from focus_ray.cluster.training import absolute
from focus_ray.config import Config
from focus_ray.data.read import list_categories
from focus_ray.data.schema import COMMIT_NAME
from focus_ray.data.shards import Steps, fits_memory
from focus_ray.data.split import Split
from focus_ray.errors import ConfigError, DataError, SweepError
from focus_ray.fitting.fit import check_prerequisites
from focus_ray.names import unique_name
from focus_ray.storage import join, read_bytes, remove_folder
from focus_ray.sweep import records
from focus_ray.sweep.proposer import Proposer
from focus_ray.sweep.race import Judge
from focus_ray.sweep.records import Record
from focus_ray.sweep.settings import Point, SweepConfig
from focus_ray.sweep.shared import (
    check_settings,
    judging_split,
)
from focus_ray.sweep.sharing import SharedWork
from focus_ray.sweep.tune import Log, make_searcher, make_stopper, placement_groups, run_tune, trial_callback
from focus_ray.sweep.worker import STOPPED, StageJob, steps_of
from focus_ray.tracking.recorder import Recorder
from focus_ray.tracking.trials import SweepRecord


@dataclass(frozen=True)
class Outcome:
    """What became of a sweep: its folder, all records, the best of each stage, and whether it was stopped early."""

    root: str
    records: list[Record]
    best: dict[str | None, Record]
    stopped: bool

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records if record.status == "failed"]


def sweep(config: SweepConfig, log: Log = lambda message: None) -> Outcome:
    """Starts a sweep in a folder of its own; see `SweepConfig`.

    Raises: SweepError: the folder is taken, or every trial failed. DataError, ConfigError: data or space do not fit.
        TrainingError: the cluster can never hold a trial.
    """
    base = absolute(config.base_config())
    if config.name is None:
        config = config.model_copy(update={"name": unique_name(base.cluster.team, base.name)})
    config = config.model_copy(update={"base": base.model_dump(mode="json")})
    root = join(base.storage, str(config.name))
    records.check_free(root)
    splits = _splits(config, base)
    _check_points(config, base, splits)
    fingerprints = {category: split.fingerprint for category, split in splits.items()}
    log(f"sweep: {root}")
    return _carry_out(config, base, root, splits, log, lambda: records.claim(root, config, fingerprints))


def resume(place: str, log: Log = lambda message: None) -> Outcome:
    """Goes on with a sweep: trials that were finished or cut stay, others, the failed ones too, are run.

    Raises: SweepError: no sweep there, or it is still running. DataError: its images have changed.
    """
    root = place if "://" in place else str(Path(place).expanduser().absolute())
    config = records.read_sweep(root)
    base = config.base_config()
    splits = _splits(config, base)
    check_resumable(root, {category: split.fingerprint for category, split in splits.items()}, SweepError)
    log(f"sweep: {root}, {len(records.read_records(root))} trials are there")
    return _carry_out(config, base, root, splits, log, lambda: None)


def _splits(config: SweepConfig, base: Config) -> dict[str, Split]:
    """The categories in the order in which they are judged, and which images each trial learns from."""
    there = list_categories(base.data.uri)
    categories = list(base.data.categories or there)
    unknown = sorted({*categories, *(config.race.order or ())} - set(there))
    if unknown:
        raise DataError(f"{base.data.uri} has no category {', '.join(unknown)}; it has {', '.join(there)}")
    first = [category for category in config.race.order or () if category in categories]
    ordered = [*first, *(category for category in categories if category not in first)]
    return {category: judging_split(base, category, config.objective) for category in ordered}


def _check_points(config: SweepConfig, base: Config, splits: Mapping[str, Split]) -> None:
    """What only data and network can tell. Raises: ConfigError, DataError."""
    if config.searcher == "optuna":
        points: Sequence[Point] = [{key: value} for key, domain in config.space.items() for value in domain.samples()]
    else:
        points = Proposer(config).known
    checked: set[str] = set()
    for point in points:
        settings = config.base_config(point)
        ingredients = f"{settings.model.backbone} {settings.model.weights} {settings.density.metric}"
        if ingredients not in checked:
            check_prerequisites(settings)
            checked.add(ingredients)
        try:
            check_settings(settings)
        except ValueError as error:
            where = ", ".join(f"{key}={value!r}" for key, value in point.items())
            raise ConfigError(f"space: at {where}: {error}") from None
    for category, split in splits.items():
        try:
            Steps.agree(split.num_fit, base.cluster.num_workers, base.train.batch_size_per_worker)
        except DataError as error:
            raise DataError(f"category {category!r}: {error}") from None


def _carry_out(
    config: SweepConfig, base: Config, root: str, splits: dict[str, Split], log: Log, claim: Callable[[], None]
) -> Outcome:
    """claim: makes the folder this sweep's, once the cluster is known to be able to run it."""
    from focus_ray.sweep.report import write_report

    recorder = Recorder(base.trackers, base.storage, log)
    private = connect()
    import ray

    try:
        trains = config.max_epochs > 0
        streams = trains and any(not fits_memory(base, split) for split in splits.values())
        limit = concurrent_runs(
            base.cluster,
            private,
            streams,
            log,
            share=config.cluster_share,
            limit=config.max_concurrent_trials,
            prefix="base.",
        )
        probe_nodes([join(base.data.uri, f"category={c}", COMMIT_NAME) for c in splits], [root])
        claim()
        told = SweepRecord(
            recorder,
            read_bytes(join(root, records.SWEEP)),
            str(config.name),
            base.storage,
            base.cluster.team,
            config.model_dump(mode="json", exclude_none=True),
        )
        state = _run(_Driver(config, base, root, splits, streams, log, told), limit)
    finally:
        if private:
            ray.shutdown()
    found = records.read_records(root)
    outcome = Outcome(root, found, records.best_of(found), state == "stopped")
    if outcome.best:
        write_report(root, config, found)
        log(f"report: {join(root, 'report.html')}")
    elif found and not outcome.stopped:
        reasons = "; ".join(f"trial {record.name}: {record.reason}" for record in outcome.failed[:3])
        raise SweepError(f"{root}: none of {len(found)} trials came to a score; {reasons}")
    return outcome


def _run(driver: _Driver, limit: int) -> str:
    """Runs all trials and lets go of everything. Returns: finished or stopped, as the folder tells it too."""
    alive = SignOfLife(driver.root)
    state = "failed"
    try:
        with driver.signals():
            driver.shared.make()
            for stage in [None] if driver.config.scope == "all_categories" else list(driver.splits):
                if not driver.stopping.is_set():
                    driver.run_stage(stage, limit)
        state = "stopped" if driver.stopping.is_set() else "finished"
    finally:
        try:
            driver.close()
            driver.tell_trackers(state)
        finally:
            alive.close(state)
    return state


class _Driver:
    """One process's part of a sweep."""

    def __init__(
        self,
        config: SweepConfig,
        base: Config,
        root: str,
        splits: dict[str, Split],
        streams: bool,
        log: Log,
        told: SweepRecord,
    ) -> None:
        import ray

        self.told = told
        self.config, self.base, self.root, self.splits, self.log = config, base, root, splits, log
        self.streams = streams
        self.stopping = threading.Event()
        self.use_gpu = uses_gpu(base.cluster)
        self.shared = SharedWork(config, base, splits, self.use_gpu, self.stopping, log)
        self.judge: Any = None
        self.experiment = f"{config.name}-{uuid.uuid4().hex[:6]}"  # Tune's own files, gone at the end
        self.scratch = tempfile.mkdtemp(prefix="focus-ray-sweep-")
        self.here = ray.get_runtime_context().get_node_id()
        self.groups_before = placement_groups()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM stop the sweep in good order; a second one ends the process at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former: dict[int, Any] = {}

        def stop(number: int, frame: Any) -> None:
            signal.signal(number, former[number])
            self.stopping.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, stop)
        try:
            yield
        finally:
            for caught, handler in former.items():
                signal.signal(caught, handler)

    def close(self) -> None:
        """Lets go of everything that this sweep holds in the cluster and on its machines."""
        import ray
        from ray import PlacementGroupID
        from ray.util.placement_group import PlacementGroup, remove_placement_group
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.shared.clear()
        if self.judge is not None:
            ray.kill(self.judge)
        shutil.rmtree(self.scratch, ignore_errors=True)
        # Tune leaves a folder a trial in every node's session folder, which outlives the job (Ray 2.60)
        remove_working_folders(self.experiment)
        sweepers = []
        for node in ray.nodes():
            if node["Alive"] and node["NodeID"] != self.here:
                where = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
                task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=where)(remove_working_folders)
                sweepers.append(task.remote(self.experiment))
        if sweepers:
            ray.wait(sweepers, num_returns=len(sweepers), timeout=10.0)
        # a Train controller that is ended by force leaves its workers' placement group behind (Ray 2.60)
        for name in placement_groups() - self.groups_before:
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(name)))
        remove_folder(join(self.root, "scratch"))

    def tell_trackers(self, state: str) -> None:
        """The end, and trials whose end no callback was called of."""
        if not self.told.recorder:
            return
        try:
            found = records.read_records(self.root)
        except DataError as error:  # the sweep is done whatever trackers learn of it
            self.log(f"WARNING: not everything was recorded: {error}")
            found = []
        for record in found:
            self.told.trial(record.name, dataclasses.asdict(record))
        best = {stage or "": dataclasses.asdict(record) for stage, record in records.best_of(found).items()}
        self.told.close(best, failed=state == "failed")

    # ---- trials
    def run_stage(self, stage: str | None, limit: int) -> None:
        """Runs what is left of the trials for all categories, or for one."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        categories = list(self.splits) if stage is None else [stage]
        proposer = Proposer(self.config)
        max_epochs = self.config.max_epochs
        done = [r for r in records.read_records(self.root) if r.stage == stage and r.status in records.DONE]
        for record in sorted(done, key=lambda record: record.number):
            proposer.tell(record.number, record.point, record.score, steps_of(record, categories, max_epochs))
        missing = proposer.total - len(done)
        if missing <= 0:
            return
        # beside the driver, so that it lives and ends with it
        where = NodeAffinitySchedulingStrategy(node_id=self.here, soft=False)
        actor = ray.remote(num_cpus=0, scheduling_strategy=where)(Judge)
        self.judge = actor.options(name=f"judge-{stage or 'all'}", namespace=self.experiment).remote(
            self.config, categories, max_epochs
        )
        for record in sorted(done, key=lambda record: record.ended_at):
            self.judge.replay.remote(record.number, record.curves())
            if record.status == "cut":
                self.judge.withdraw.remote(record.number)
        job = StageJob(
            sweep=self.config,
            reference=self.shared.reference(),
            stage=stage,
            splits={category: self.splits[category] for category in categories},
            root=self.root,
            use_gpu=self.use_gpu,
            images=self.shared.images,
            features=self.shared.features,
            judge=self.judge,
        )
        self.log(f"{missing} trial(s) on {', '.join(categories)}, {len(done)} done")
        self._tune(job, proposer, missing, limit)
        ray.kill(self.judge)
        self.judge = None

    def _tune(self, job: StageJob, proposer: Proposer, missing: int, limit: int) -> None:
        def stop() -> bool:
            if self.stopping.is_set():
                self.judge.stop.remote(STOPPED)  # trials end at their next score, or are ended soon after
            return self.stopping.is_set()

        # Ray Train's workers have a placement group of their own; `limit` keeps room for them
        own_workers = self.base.cluster.num_workers > 1 or self.streams
        grid = run_tune(
            job,
            make_searcher(proposer, missing, self.log),
            make_stopper(stop),
            num_trials=missing,
            limit=limit,
            name=self.experiment if job.stage is None else f"{self.experiment}-{job.stage}",
            folder=self.scratch,
            asked=None if own_workers else resources_per_worker(self.base.cluster, self.use_gpu),
            labels=self.base.cluster.labels,
            max_failures=self.base.cluster.max_failures,
            callbacks=[trial_callback(self.told)] if self.told.recorder else [],
        )
        if self.stopping.is_set():
            return
        there = {record.name for record in records.read_records(self.root)}
        for result in grid:
            if result.error is None:
                continue
            config = result.config or {}
            record = Record(
                config["number"], job.stage, config["point"], "failed", None, reason=reason_of(result.error)
            )
            if record.name not in there:  # its process was lost more often than max_failures allows
                records.write_record(self.root, dataclasses.replace(record, ended_at=time.time()))
                self.log(f"trial {record.name}: FAILED: {record.reason}")
