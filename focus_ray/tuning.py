"""A sweep on Ray Tune: trials as the cluster allows, shared work made once, records in storage, nothing left behind.

Tune starts trials and replaces those whose machine is lost. What has lost is ended by the trial itself, which asks the
judge after every score: a trial that Tune stops from outside can leave its Train placement group behind (Ray 2.60).
What was tried is in our own records (`records`), not in Tune's experiment state: a sweep is taken up again from any
machine that reaches its storage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
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

import torch

from focus_ray import cluster, records
from focus_ray.config import Config, parse_config, unique_name
from focus_ray.dataset import COMMIT_NAME, list_categories
from focus_ray.errors import ConfigError, DataError, SweepError
from focus_ray.fit import Steps
from focus_ray.race import Judge
from focus_ray.records import Record, SignOfLife
from focus_ray.search import Point, Proposer, SweepConfig, grid_points, parse_sweep
from focus_ray.storage import join, remove_folder
from focus_ray.training import StreamShard, absolute, data_parallel, fits_memory, make_trainer, reason_of, slice_of
from focus_ray.trial import (
    CategoryImages,
    Features,
    Judgement,
    check_settings,
    embed_images,
    features_key,
    forget,
    judge_category,
    judging_plan,
    load_images,
    num_bytes_of_features,
    num_bytes_of_images,
)

Log = Callable[[str], None]
STOPPED = "the sweep was stopped"
SHARED_TIMEOUT_S = 120.0  # a trial waits so long for shared work that was lost and is made again, then makes its own
_CLEANUP_S = 2  # a trial that is stopped may go on so long before its process is ended


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
    plans = _plans(config, base)
    _check_points(config, base, plans)
    fingerprints = {category: plan["fingerprint"] for category, plan in plans.items()}
    log(f"sweep: {root}")
    return _carry_out(config, base, root, plans, log, lambda: records.claim(root, config, fingerprints))


def resume(place: str, log: Log = lambda message: None) -> Outcome:
    """Goes on with a sweep: trials that were finished or cut stay, others, the failed ones too, are run.

    Raises: SweepError: no sweep there, or it is still running. DataError: its images have changed.
    """
    root = place if "://" in place else str(Path(place).expanduser().absolute())
    config = records.read_sweep(root)
    state = records.read_state(root)
    if state["state"] == "running":
        raise SweepError(f"{root}: still running, as process {state['pid']} on {state['host']}")
    base = config.base_config()
    plans = _plans(config, base)
    records.check_data(root, {category: plan["fingerprint"] for category, plan in plans.items()})
    log(f"sweep: {root}, {len(records.read_records(root))} trials are there")
    return _carry_out(config, base, root, plans, log, lambda: None)


# ---- before anything starts


def _plans(config: SweepConfig, base: Config) -> dict[str, dict[str, Any]]:
    """The categories in the order in which they are judged, and which images each trial learns from."""
    there = list_categories(base.data.uri)
    categories = list(base.data.categories or there)
    unknown = sorted({*categories, *(config.race.order or ())} - set(there))
    if unknown:
        raise DataError(f"{base.data.uri} has no category {', '.join(unknown)}; it has {', '.join(there)}")
    first = [category for category in config.race.order or () if category in categories]
    ordered = [*first, *(category for category in categories if category not in first)]
    return {category: judging_plan(base, category, config.objective) for category in ordered}


def _check_points(config: SweepConfig, base: Config, plans: Mapping[str, dict[str, Any]]) -> None:
    """What only data and network can tell. Raises: ConfigError, DataError."""
    if config.searcher == "optuna":
        points: Sequence[Point] = [{key: value} for key, domain in config.space.items() for value in domain.samples()]
    else:
        points = Proposer(config).known
    for point in points:
        try:
            check_settings(config.base_config(point))
        except ValueError as error:
            where = ", ".join(f"{key}={value!r}" for key, value in point.items())
            raise ConfigError(f"space: at {where}: {error}") from None
    for category, plan in plans.items():
        try:
            Steps.agree(len(plan["fit_rows"]), base.cluster.num_workers, base.train.batch_size_per_worker)
        except DataError as error:
            raise DataError(f"category {category!r}: {error}") from None


def _max_epochs(config: SweepConfig, base: Config) -> int:
    domain = config.space.get("train.epochs")
    return base.train.epochs if domain is None else int(max(domain.samples()))


# ---- the driver


def _carry_out(
    config: SweepConfig, base: Config, root: str, plans: dict[str, dict[str, Any]], log: Log, claim: Callable[[], None]
) -> Outcome:
    """claim: makes the folder this sweep's, once the cluster is known to be able to run it."""
    from focus_ray.sweep_report import write_report

    private = cluster.connect()
    import ray

    try:
        trains = _max_epochs(config, base) > 0
        streams = trains and any(not fits_memory(base, plan) for plan in plans.values())
        limit = cluster.concurrent_runs(
            base.cluster,
            private,
            streams,
            log,
            share=config.cluster_share,
            limit=config.max_concurrent_trials,
            prefix="base.",
        )
        cluster.probe_nodes([join(base.data.uri, f"category={c}", COMMIT_NAME) for c in plans], [root])
        claim()
        state = _run(_Driver(config, base, root, plans, streams, log), limit)
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
            driver.share()
            for stage in [None] if driver.config.scope == "all_categories" else list(driver.plans):
                if not driver.stopping.is_set():
                    driver.run_stage(stage, limit)
        state = "stopped" if driver.stopping.is_set() else "finished"
    finally:
        try:
            driver.close()
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
        plans: dict[str, dict[str, Any]],
        streams: bool,
        log: Log,
    ) -> None:
        import ray

        self.config, self.base, self.root, self.plans, self.log = config, base, root, plans, log
        self.streams = streams
        self.stopping = threading.Event()
        self.use_gpu = cluster.uses_gpu(base.cluster)
        self.images: dict[tuple[str, int], Any] = {}  # (category, size) -> reference to CategoryImages
        self.features: dict[str, Any] = {}  # key -> reference to Features
        self.judge: Any = None
        self.experiment = f"{config.name}-{uuid.uuid4().hex[:6]}"  # Tune's own files, gone at the end
        self.scratch = tempfile.mkdtemp(prefix="focus-ray-sweep-")
        self.here = ray.get_runtime_context().get_node_id()
        self.groups_before = _placement_groups()

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

        self.images.clear()
        self.features.clear()
        if self.judge is not None:
            ray.kill(self.judge)
        shutil.rmtree(self.scratch, ignore_errors=True)
        # Tune leaves a folder a trial in every node's session folder, which outlives the job (Ray 2.60)
        _remove_working_folders(self.experiment)
        sweepers = []
        for node in ray.nodes():
            if node["Alive"] and node["NodeID"] != self.here:
                where = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
                task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=where)(_remove_working_folders)
                sweepers.append(task.remote(self.experiment))
        if sweepers:
            ray.wait(sweepers, num_returns=len(sweepers), timeout=10.0)
        # a Train controller that is ended by force leaves its workers' placement group behind (Ray 2.60)
        for name in _placement_groups() - self.groups_before:
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(name)))
        remove_folder(join(self.root, "scratch"))

    # ---- shared work
    def share(self) -> None:
        """Makes what no trial changes, once, on the whole cluster, before trials fill it."""
        import ray

        if not self.config.share_work:
            self.log("shared work: none (share_work=false)")
            return
        budget = self._budget()
        ends: dict[Any, Any] = {}  # of each piece of work: a small result that is there once it is
        sizes = self._values("model.image_size_px")
        planned = {(category, size) for category in self.plans for size in sizes}
        for category, size in sorted(planned):
            config = self._sized(size)
            if not fits_memory(config, self.plans[category]):
                self.log(f"shared work: {category} is over data.memory_budget_mb: every trial streams it")
                continue
            needed = num_bytes_of_images(config, category, self.plans[category], self.config.objective, size)
            if needed > budget:
                self.log(_too_large(f"decoded images of {category} at {size} px", needed, budget))
                continue
            budget -= needed
            task = ray.remote(num_returns=2, **self._asked(gpu=False))(_load_task)
            plan = self.plans[category]
            self.images[category, size], ends[category, size] = task.remote(
                self._reference().model_dump(mode="json"), category, plan, self.config.objective, size
            )
            self.log(f"shared work: decoding {category} at {size} px, {needed / 2**20:.0f} MiB")
        for key, (config, category) in self._shareable().items():
            size = config.model.image_size_px
            if (category, size) not in self.images:
                continue
            needed = num_bytes_of_features(config, category, self.plans[category], self.config.objective)
            if needed > budget:
                self.log(_too_large(f"features of {category}", needed, budget))
                continue
            budget -= needed
            embed = ray.remote(num_returns=2, **self._asked(self.use_gpu))(_embed_task)
            self.features[key], ends[key] = embed.remote(config.model_dump(mode="json"), self.images[category, size])
            self.log(f"shared work: features of {category}, {needed / 2**20:.0f} MiB")
        self._await(ends)

    def _asked(self, gpu: bool) -> dict[str, Any]:
        """What a task that does a worker's work asks of Ray."""
        worker = cluster.resources_per_worker(self.base.cluster, gpu)
        return {
            "num_cpus": worker["CPU"],
            "num_gpus": worker.get("GPU", 0.0),
            "memory": worker.get("memory"),
            "label_selector": dict(self.base.cluster.labels) or None,
        }

    def _budget(self) -> float:
        import ray

        if self.config.shared_budget_mb is not None:
            return self.config.shared_budget_mb * 2**20
        return float(ray.cluster_resources().get("object_store_memory", 0.0)) / 2

    def _values(self, key: str) -> list[Any]:
        """All values that a key takes over the trials; of a range, those of its samples."""
        domain = self.config.space.get(key)
        if domain is not None:
            return list(domain.samples())
        value: Any = self.base
        for part in key.split("."):
            value = getattr(value, part)
        return [value]

    def _sized(self, size: int) -> Config:
        return self.base.model_copy(update={"model": self.base.model.model_copy(update={"image_size_px": size})})

    def _reference(self) -> Config:
        """The base at the largest size of all trials: synthetic defects are drawn there, the same for every size."""
        return self._sized(max(self._values("model.image_size_px")))

    def _shareable(self) -> dict[str, tuple[Config, str]]:
        """Keys of the features that several trials will ask for, with a configuration that leads to each."""
        ahead = {key: domain for key, domain in self.config.space.items() if _comes_before_features(key)}
        if any(domain.choice is None for domain in ahead.values()):
            self.log("shared work: no features, since trials draw from a range before them")
            return {}
        points: list[Point] = [{}]
        if ahead:
            points = grid_points(self.config.model_copy(update={"space": ahead}))
        if len(points) * 2 > self.config.planned_trials:
            self.log(
                f"shared work: no features, since {len(points)} kinds would serve {self.config.planned_trials} trials"
            )
            return {}
        found: dict[str, tuple[Config, str]] = {}
        for point in points:
            config = self.config.base_config(point)
            for category in self.plans:
                key = features_key(config, category)
                if key is not None:
                    found[key] = (config, category)
        return found

    def _await(self, ends: Mapping[Any, Any]) -> None:
        """Waits until all is made. Raises: DataError: there are no images. Without features trials make their own."""
        import ray

        waiting = {end: key for key, end in ends.items()}
        while waiting and not self.stopping.is_set():
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=0.5)
            for end in done:
                key = waiting.pop(end)
                try:
                    ray.get(end)
                except Exception as error:
                    if key not in self.features:
                        raise DataError(f"{key[0]}: cannot make the images to judge on: {reason_of(error)}") from None
                    self.log(f"shared work: features failed ({reason_of(error)}): every trial makes its own")
                    del self.features[key]
        for end in waiting:
            ray.cancel(end, force=True)

    # ---- trials
    def run_stage(self, stage: str | None, limit: int) -> None:
        """Runs what is left of the trials for all categories, or for one."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        categories = list(self.plans) if stage is None else [stage]
        proposer = Proposer(self.config)
        max_epochs = _max_epochs(self.config, self.base)
        done = [r for r in records.read_records(self.root) if r.stage == stage and r.status in records.DONE]
        for record in sorted(done, key=lambda record: record.number):
            proposer.tell(record.number, record.point, record.score, _steps(record, categories, max_epochs))
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
        payload = {
            "sweep": self.config.model_dump(mode="json"),
            "reference": self._reference().model_dump(mode="json"),
            "stage": stage,
            "plans": {category: self.plans[category] for category in categories},
            "root": self.root,
            "use_gpu": self.use_gpu,
            "images": self.images,
            "features": self.features,
            "judge": self.judge,
        }
        self.log(f"{missing} trial(s) on {', '.join(categories)}, {len(done)} done")
        self._tune(stage, payload, proposer, missing, limit)
        ray.kill(self.judge)
        self.judge = None

    def _tune(self, stage: str | None, payload: dict[str, Any], proposer: Proposer, missing: int, limit: int) -> None:
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

        searcher = _make_searcher(proposer, missing, self.log)
        # Ray Train's workers have a placement group of their own; `limit` keeps room for them
        if self.base.cluster.num_workers > 1 or self.streams:
            asked = {"memory": float(2**20)}  # Tune refuses an empty bundle (2.60)
        else:
            asked = cluster.resources_per_worker(self.base.cluster, self.use_gpu)
        labels = [dict(self.base.cluster.labels)] if self.base.cluster.labels else None
        where = tune.PlacementGroupFactory([asked], bundle_label_selector=labels)
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_trial, payload=payload), where),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=missing,
                max_concurrent_trials=limit,
                reuse_actors=True,
                trial_name_creator=lambda trial: f"trial-{trial.config.get('number', 0):05d}-{trial.trial_id}",
                trial_dirname_creator=lambda trial: f"trial-{trial.config.get('number', 0):05d}-{trial.trial_id}",
            ),
            run_config=tune.RunConfig(
                name=self.experiment if stage is None else f"{self.experiment}-{stage}",
                storage_path=self.scratch,
                stop=_make_stopper(self),
                failure_config=tune.FailureConfig(max_failures=self.base.cluster.max_failures),
                verbose=0,
            ),
        )
        grid = tuner.fit()
        if self.stopping.is_set():
            return
        there = {record.name for record in records.read_records(self.root)}
        for result in grid:
            if result.error is None:
                continue
            config = result.config or {}
            record = Record(config["number"], stage, config["point"], "failed", None, reason=reason_of(result.error))
            if record.name not in there:  # its process was lost more often than max_failures allows
                records.write_record(self.root, dataclasses.replace(record, ended_at=time.time()))
                self.log(f"trial {record.name}: FAILED: {record.reason}")


def _placement_groups() -> set[str]:
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


def _make_stopper(driver: _Driver) -> Any:
    """Ends Tune's run when the sweep is to stop."""
    from ray import tune

    class SweepStopper(tune.Stopper):
        def __init__(self, driver: _Driver | None) -> None:
            self.driver = driver

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            if self.driver is None or not self.driver.stopping.is_set():
                return False
            self.driver.judge.stop.remote(STOPPED)  # trials end at their next score, or are ended soon after
            return True

        def __getstate__(self) -> dict[str, Any]:  # Tune keeps a copy to restore a run from, which is never done
            return {"driver": None}

    return SweepStopper(driver)


def _make_searcher(proposer: Proposer, missing: int, log: Log) -> Any:
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


# ---- in the cluster


def _remove_working_folders(experiment: str) -> None:
    """On the node that runs it."""
    import ray

    node = ray._private.worker._global_node
    for folder in (Path(node.get_session_dir_path()) / "artifacts").glob(f"*/{experiment}*"):
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another experiment's may be there
            folder.parent.rmdir()


def _load_task(
    config: dict[str, Any], category: str, plan: dict[str, Any], objective: Any, size_px: int
) -> tuple[CategoryImages, None]:
    """The second value tells the driver that the first is there, or what failed, without moving it."""
    return load_images(parse_config(config), category, plan, objective, size_px), None


def _embed_task(config: dict[str, Any], images: CategoryImages) -> tuple[Features, None]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return embed_images(parse_config(config), images, device), None


def _trial(config: dict[str, Any], payload: dict[str, Any]) -> None:
    """What Tune runs: one point, category by category. Its record is in the storage before Tune hears of it."""
    import ray
    from ray import tune

    number, point, stage = config["number"], config["point"], payload["stage"]
    start = time.perf_counter()
    ray.get(payload["judge"].begin.remote(number))
    found: dict[str, Judgement] = {}
    failure = None
    try:
        sweep_config = parse_sweep(payload["sweep"])
        settings = sweep_config.base_config(point)
        if not sweep_config.share_work:
            forget()
        for category, plan in payload["plans"].items():
            found[category] = _judge_in_trial(payload, sweep_config, settings, category, plan, number)
            if found[category].cut is not None:
                break
    except Exception as error:  # of this point alone: it is recorded, and the other trials go on
        failure = reason_of(error)
    cut = next((judgement.cut for judgement in found.values() if judgement.cut is not None), None)
    if cut == STOPPED:
        return
    if failure is not None or cut is not None:
        ray.get(payload["judge"].withdraw.remote(number))
    scores = [judgement.score for judgement in found.values() if judgement.score is not None]
    record = Record(
        number,
        stage,
        point,
        "failed" if failure is not None else "cut" if cut is not None else "finished",
        records.mean_score(scores) if failure is None and cut is None else None,
        {category: dataclasses.asdict(judgement) for category, judgement in found.items()},
        failure if failure is not None else cut,
        sum(judgement.epochs for judgement in found.values()),
        time.perf_counter() - start,
        time.time(),
    )
    records.write_record(payload["root"], record)
    steps = _steps(
        record, list(payload["plans"]), 1 if failure else _max_epochs(sweep_config, sweep_config.base_config())
    )
    score = math.nan if record.score is None else record.score
    # as text: Tune hands searchers flattened results
    tune.report({"score": score, "told": json.dumps({"record": dataclasses.asdict(record), "steps": steps})})


def _judge_in_trial(
    payload: dict[str, Any],
    sweep_config: SweepConfig,
    settings: Config,
    category: str,
    plan: dict[str, Any],
    number: int,
) -> Judgement:
    """One category, in this process or by workers of Ray Train."""
    work = {
        "sweep": payload["sweep"],
        "reference": payload["reference"],
        "config": settings.model_dump(mode="json"),
        "category": category,
        "plan": plan,
        "number": number,
        "judge": payload["judge"],
        "use_gpu": payload["use_gpu"],
        "images": payload["images"].get((category, settings.model.image_size_px)),
        "features": payload["features"].get(features_key(settings, category)),
    }
    streams = settings.train.epochs > 0 and not fits_memory(settings, plan)
    if settings.cluster.num_workers == 1 and not streams:
        device = torch.device("cuda" if payload["use_gpu"] else "cpu")
        return _judge_work(work, sweep_config, settings, device)
    scratch = join(payload["root"], "scratch")
    name = f"{number:05d}-{category}-{uuid.uuid4().hex[:6]}"
    try:
        result = make_trainer(_train_worker, work, scratch, name).fit()
    finally:
        remove_folder(join(scratch, name))
    return Judgement(**result.return_value)


def _train_worker(work: dict[str, Any]) -> dict[str, Any]:
    """What every Ray Train worker of a trial runs."""
    import ray.train
    import ray.train.torch

    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it reports every report
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    settings = parse_config(work["config"])
    wrap = data_parallel(num_workers, device)
    judgement = _judge_work(work, parse_sweep(work["sweep"]), settings, device, rank, num_workers, wrap)
    return dataclasses.asdict(judgement)  # metrics that come without a checkpoint are not kept (Ray 2.60)


def _judge_work(
    work: dict[str, Any],
    sweep_config: SweepConfig,
    settings: Config,
    device: torch.device,
    rank: int = 0,
    num_workers: int = 1,
    wrap: Callable[[torch.nn.Module], Any] | None = None,
) -> Judgement:
    import ray

    category, plan, judge = work["category"], work["plan"], work["judge"]
    size_px = settings.model.image_size_px
    images: CategoryImages | None = _shared(work["images"])
    features: Features | None = _shared(work["features"]) if num_workers == 1 and images is not None else None
    shard = None
    if images is None:
        loaded = plan
        if settings.train.epochs and not fits_memory(settings, plan):
            share = {
                key: slice_of(plan[key], rank, num_workers)
                for key in ("fit_rows", "folds", "validation_rows", "holdout_rows")
            }
            shard = StreamShard(settings, category, share)
            loaded = {**plan, "fit_rows": []}
        images = load_images(parse_config(work["reference"]), category, loaded, sweep_config.objective, size_px)

    def on_score(epoch: int, score: float, final: bool) -> str | None:
        return ray.get(judge.report.remote(work["number"], category, epoch, score, final))  # type: ignore[no-any-return]

    judgement = judge_category(
        settings,
        category,
        images,
        sweep_config.objective,
        device,
        num_images=len(plan["fit_rows"]),
        features=features,
        rank=rank,
        wrap=wrap,
        on_score=on_score,
        shard=shard,
    )
    judgement.shared = "features" if features is not None else "images" if work["images"] is not None else "nothing"
    return judgement


def _shared(reference: Any) -> Any:
    """What was made for all trials; None where it was not, or was lost and does not come back in time."""
    import ray

    if reference is None:
        return None
    try:
        return ray.get(reference, timeout=SHARED_TIMEOUT_S)
    except (ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError, ray.exceptions.RayTaskError):
        return None


def _steps(record: Record, categories: Sequence[str], max_epochs: int) -> list[tuple[int, float]]:
    """(step, mean score) as a trial went on, for a searcher that learns from trials that were cut."""
    ends: list[float] = []
    steps = []
    for index, category in enumerate(categories):
        curve = record.curves().get(category, [])
        for epoch, score in curve:
            steps.append((index * max(1, max_epochs) + max(1, epoch), records.mean_score([*ends, score])))
        if curve:
            ends.append(curve[-1][1])
    return list(dict(steps).items())


def _comes_before_features(key: str) -> bool:
    return key.startswith("model.") or key in ("train.seed", "train.batch_size_per_worker", "train.epochs")


def _too_large(what: str, needed: float, budget: float) -> str:
    return (
        f"shared work: {what} take {needed / 2**20:.0f} MiB, {max(budget, 0.0) / 2**20:.0f} MiB are left of the budget "
        "(shared_budget_mb): every trial makes its own"
    )
