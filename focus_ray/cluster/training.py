"""Training on Ray: one model a category, DDP over its workers, categories side by side as the cluster allows."""

from __future__ import annotations

import functools
import json
import logging
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from focus_ray.bundle.make import STATE_FILE, bundle_uri, make_bundle, set_reproducible, train_locally
from focus_ray.bundle.metric import share_metric
from focus_ray.cluster.connect import connect, resources_per_worker, runs_here, uses_gpu
from focus_ray.cluster.messages import Messages, epoch_callback
from focus_ray.cluster.ownership import Heartbeat, check_resumable, write_fingerprints
from focus_ray.cluster.pool import Failed, WorkerPool, options_per_worker
from focus_ray.cluster.preflight import concurrent_runs, probe_nodes
from focus_ray.cluster.streams import stream_training_images, worker_stream
from focus_ray.config import Config, config_to_yaml, mapping_of, parse_config
from focus_ray.data.read import list_categories
from focus_ray.data.regions import check_regions
from focus_ray.data.schema import COMMIT_NAME
from focus_ray.data.shards import BatchSchedule, fits_memory
from focus_ray.data.split import Split, split_category
from focus_ray.errors import DataError, TrainingError
from focus_ray.fitting.fit import check_prerequisites
from focus_ray.fitting.state import Figures, TrainState
from focus_ray.names import unique_name
from focus_ray.reporting.training import write_training_report
from focus_ray.storage import (
    check_access,
    create_bytes,
    exists,
    is_s3,
    join,
    list_names,
    make_absolute,
    open_filesystem,
    read_bytes,
    retry_while_busy,
    write_bytes,
)
from focus_ray.tracking.base import flatten_dict
from focus_ray.tracking.recorder import Recorder
from focus_ray.tracking.runs import CLAIM, TrainingRecorder

RUN_CONFIG = "config.yaml"
# settings that change how a run goes, not what comes of a category
_FREE = ("cluster.", "trackers", "data.memory_budget_mb", "data.categories", "train.checkpoint_every_epochs")
MAX_TRAINER_RESTARTS = 2  # of the process that waits for a trainer; Ray Train itself repeats what its workers lost
SHARED_METRIC = "metric.safetensors"


@dataclass(frozen=True)
class TrainerJob:
    """What a trainer of one category is told; crosses to its workers as it is."""

    config: Config
    split: Split
    use_gpu: bool

    @property
    def category(self) -> str:
        return self.split.category


@dataclass(frozen=True)
class CategoryJob(TrainerJob):
    """root: of the run, below which checkpoints and the bundle go.  messages: takes what workers tell."""

    root: str
    messages: Messages

    def tell(self, text: str) -> None:
        self.messages.put(f"{self.category}: {text}")


J = TypeVar("J", bound=TrainerJob)


def train(config: Config, *, resume: bool = False, log: Callable[[str], None] = lambda message: None) -> dict[str, str]:
    """Trains every category of the config; writes <storage>/<name>/bundles/<category>.

    Args:
        resume: go on with a run of the same name: finished categories stay, others start at their last checkpoint.

    Returns: category -> the bundle's place.

    Raises: TrainingError: the run's folder exists and `resume` is not asked for, or categories failed, each named with
        its reason; the bundles of the others are there. DataError: the data set cannot be used.
    """
    config = resolve_paths(config)
    if config.name == "auto":
        if resume:
            raise TrainingError("--resume needs the name of the run to go on with: name=...")
        config = config.model_copy(update={"name": unique_name(config.cluster.team or "run")})
        log(f"name: {config.name}")
    check_prerequisites(config)
    there = list_categories(config.data.uri)
    categories = list(config.data.categories or there)
    unknown = sorted(set(categories) - set(there))
    if unknown:
        raise DataError(f"{config.data.uri} has no category {', '.join(unknown)}; it has {', '.join(there)}")
    check_regions(config, there)
    root = join(config.storage, config.name)
    splits = {category: split_category(config, category) for category in categories}
    for category, split in splits.items():
        try:
            BatchSchedule.agree(split.num_fit, config.cluster.num_workers, config.train.batch_size_per_worker)
        except DataError as error:
            raise DataError(f"category {category!r}: {error}") from None
    fingerprints = {category: split.fingerprint for category, split in splits.items()}
    _check_claim(config, root, resume, fingerprints)
    bundles = {category: bundle_uri(root, category) for category in categories}
    todo = [c for c in categories if not (resume and exists(join(bundles[c], "manifest.json")))]
    for category in sorted(set(categories) - set(todo)):
        log(f"{category}: already there, {bundles[category]}")
    if todo:
        recorder = Recorder(config.trackers, config.storage, log)
        here = runs_here(config.cluster)
        limit = 1
        if here:
            check_access(root)
        else:
            limit = _join_cluster(config, root, {c: splits[c] for c in todo}, log)
        _claim(root, resume, fingerprints)
        write_bytes(join(root, RUN_CONFIG), config_to_yaml(config).encode())
        told = TrainingRecorder(recorder, config, root, fingerprints, has_group=len(categories) > 1)
        alive = Heartbeat(root)
        state = "failed"
        try:
            mine = [splits[c] for c in todo]
            run = train_locally if here else functools.partial(_train_on_cluster, limit=limit)
            failed = run(config, mine, root, log, recorder=told)
            state = "failed" if failed else "finished"
        finally:
            told.close(failed=state == "failed")
            alive.close(state)
        if failed:
            raise TrainingError(
                f"{len(failed)} of {len(categories)} categories failed; "
                + "; ".join(f"{category}: {reason}" for category, reason in sorted(failed.items()))
                + ". Mend the cause and run again with --resume"
            )
    if len(bundles) > 1 and learns_metric(config):
        shared = join(root, SHARED_METRIC)
        share_metric(list(bundles.values()), shared)
        log(f"metric of all {len(bundles)} categories, for a new one's density.metric: {shared}")
    log(f"report: {write_training_report(bundles, root)}")
    return bundles


def _join_cluster(config: Config, root: str, splits: Mapping[str, Split], log: Callable[[str], None]) -> int:
    """Returns: how many categories fit side by side. Raises: TrainingError, DataError: what preflight and probes find."""
    team = config.cluster.team
    private = connect(namespace=config.cluster.namespace or (f"focus-ray-{team}" if team else None))
    streams = config.train.epochs > 0 and any(not fits_memory(config, split) for split in splits.values())
    limit = concurrent_runs(
        config.cluster,
        private,
        streams,
        log,
        limit=config.cluster.max_concurrent_categories,
        growing=fits_without_trainer(config),
    )
    probe_nodes([join(config.data.uri, f"category={category}", COMMIT_NAME) for category in splits], [root])
    return limit


def learns_metric(config: Config) -> bool:
    """Whether each category learns a metric of its own, and its bundle keeps what others can share."""
    density = config.density
    return density.reduction == "discriminant" and density.metric is None and density.keep_moments


def _train_on_cluster(
    config: Config,
    splits: Sequence[Split],
    root: str,
    log: Callable[[str], None],
    recorder: TrainingRecorder,
    limit: int,
) -> dict[str, str]:
    """Trains the categories, `limit` at a time, and returns category -> reason for those that failed."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    messages = Messages()
    use_gpu = uses_gpu(config.cluster)
    jobs = iter([CategoryJob(config, split, use_gpu, root, messages) for split in splits])
    if fits_without_trainer(config):
        run_job, options = _fit_category, options_per_worker(config.cluster, use_gpu)
        max_retries = config.cluster.max_failures
    else:
        # a trainer waits beside the driver, so that the loss of another node ends no training; Ray Train repeats its workers
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        run_job, options = _run_trainer, {"num_cpus": 0, "scheduling_strategy": here}
        max_retries = MAX_TRAINER_RESTARTS
    num_at_once = min(limit, len(splits))
    log(f"{len(splits)} categories, {num_at_once} at a time, {config.cluster.num_workers} worker(s) each")
    failed: dict[str, str] = {}

    def listen() -> None:
        messages.show(log, recorder.log_epoch)

    with WorkerPool[CategoryJob](
        num_at_once, options, max_retries, log, listen, retry_errors=fits_without_trainer(config)
    ) as pool:
        for job, outcome in pool.run(run_job, lambda: next(jobs, None)):
            listen()  # the lines of a category come before its end
            category, place = job.category, bundle_uri(job.root, job.category)
            if isinstance(outcome, Failed):
                failed[category] = outcome.reason
                log(f"{category}: FAILED: {outcome.reason}")
                recorder.fail_category(category, outcome.reason)
            else:
                log(f"{category}: done in {outcome:.0f} s, {place}")
                recorder.finish_category(category, place)
    return failed


def fits_without_trainer(config: Config) -> bool:
    """Returns whether one worker fits a category without gradients, so that no trainer of Ray Train is needed."""
    return config.train.epochs == 0 and config.cluster.num_workers == 1


def _fit_category(job: CategoryJob) -> float:
    """Fits one category in this worker and returns the seconds it took."""
    start = time.monotonic()
    set_reproducible()
    device = torch.device("cuda" if job.use_gpu else "cpu")
    make_bundle(job.config, job.split, job.root, device, num_threads=decoders(job.config), log=job.tell)
    return time.monotonic() - start


def decoders(config: Config) -> int:
    """Returns the number of threads that decode images in a worker: one for each of its CPUs."""
    return max(1, int(config.cluster.cpus_per_worker))


def _run_trainer(job: CategoryJob) -> float:
    """Trains one category with Ray Train and returns the seconds it took."""
    start = time.monotonic()
    callbacks = [epoch_callback(job.messages, job.category)] if job.config.trackers else []
    make_trainer(_worker, job, join(job.root, "train"), job.category, callbacks).fit()
    return time.monotonic() - start


def make_trainer(worker: Callable[[J], Any], job: J, place: str, name: str, callbacks: Sequence[Any] = ()) -> Any:
    """A TorchTrainer of one category as its configuration asks.

    Args:
        worker: what every worker runs, given the job.  place: where the trainer keeps checkpoints, below `name`.
        callbacks: of Ray Train.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    from focus_ray.cluster import failure_policy, ray_private

    failure_policy.install()
    ray_private.tell_trainers_their_cluster()
    config = job.config
    workers = config.cluster.num_workers
    datasets = {}
    if config.train.epochs and not fits_memory(config, job.split):
        datasets["train"] = stream_training_images(config, job.split)
    filesystem, path = open_filesystem(place)
    return TorchTrainer(
        _run_worker,
        train_loop_config={"worker": worker, "job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers if config.cluster.min_workers is None else (config.cluster.min_workers, workers),
            use_gpu=job.use_gpu,
            resources_per_worker=resources_per_worker(config.cluster, job.use_gpu),
            label_selector=dict(config.cluster.labels) or None,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem if is_s3(place) else None,
            failure_config=ray.train.FailureConfig(
                max_failures=config.cluster.max_failures, controller_failure_limit=config.cluster.max_failures
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            callbacks=list(callbacks) or None,
        ),
        datasets=datasets,
        dataset_config=ray.train.DataConfig(datasets_to_split=["train"]),
    )


def _run_worker(given: dict[str, Any]) -> Any:
    """What Ray Train calls on every worker: it gives a mapping only."""

    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it reports every report
    set_reproducible()
    return given["worker"](given["job"])


def _worker(job: CategoryJob) -> None:
    """What every Ray Train worker runs."""
    import ray.train
    import ray.train.torch

    config = job.config
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()

    def on_epoch(epoch: int, figures: Figures, snapshot: Callable[[], TrainState]) -> None:
        due = (epoch + 1) % config.train.checkpoint_every_epochs == 0 or epoch + 1 == config.train.epochs
        if not due:
            return ray.train.report(figures)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if rank == 0:
                torch.save(snapshot().to_dict(), Path(folder) / STATE_FILE)
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(figures, checkpoint=checkpoint)

    count = make_bundle(
        config,
        job.split,
        job.root,
        device,
        rank=rank,
        num_workers=num_workers,
        stream=worker_stream,
        num_threads=decoders(config),
        wrap=data_parallel(num_workers, device),
        state=retry_while_busy(lambda: _last_state(ray.train.get_checkpoint(), device)),
        on_epoch=on_epoch,
        log=job.tell,
    )
    ray.train.report({"num_images": count})


def data_parallel(num_workers: int, device: torch.device) -> Callable[[torch.nn.Module], Any] | None:
    """What makes a module data-parallel; None for one worker."""
    if num_workers == 1:
        return None

    def wrap(module: torch.nn.Module) -> Any:
        devices = [device] if device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(module, device_ids=devices)

    return wrap


def _last_state(checkpoint: Any, device: torch.device) -> TrainState | None:
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return TrainState.from_dict(torch.load(Path(folder) / STATE_FILE, map_location=device, weights_only=True))


def resolve_paths(config: Config) -> Config:
    """Local paths made absolute: workers run in other folders."""
    weights, metric = config.model.weights, config.density.metric
    regions = {name: make_absolute(one) if isinstance(one, str) else one for name, one in config.data.regions.items()}
    if weights not in ("default", "random"):
        weights = make_absolute(weights)
    return config.model_copy(
        update={
            "storage": make_absolute(config.storage),
            "data": config.data.model_copy(update={"uri": make_absolute(config.data.uri), "regions": regions}),
            "model": config.model.model_copy(update={"weights": weights}),
            "density": config.density.model_copy(update={"metric": metric and make_absolute(metric)}),
            "trackers": {
                kind: one.model_copy(update={"uri": one.uri and make_absolute(one.uri)})
                for kind, one in config.trackers.items()
            },
        }
    )


def _claim(root: str, resume: bool, fingerprints: Mapping[str, str]) -> None:
    """Makes the folder this run's. Raises: TrainingError: another run of the name, started at the same time, was first."""
    mine = json.dumps({"token": uuid.uuid4().hex, "host": socket.gethostname()}).encode()
    if create_bytes(join(root, CLAIM), mine):
        write_fingerprints(root, fingerprints)
    elif not resume:
        raise TrainingError(
            f"{root} was taken by a run started at the same time: give another name (name=auto makes one)"
        )


def _check_claim(config: Config, root: str, resume: bool, fingerprints: Mapping[str, str]) -> None:
    """Raises: TrainingError: the folder is another run's, one that a driver is at, or, to resume, one of another
    configuration.  DataError: the images have changed since it began."""
    place = join(root, RUN_CONFIG)
    if not exists(place):
        return
    if not resume:
        raise TrainingError(f"{root} holds a run already: give another name (name=...), or --resume to go on with it")
    begun = _begun(root)  # of other categories nothing has come yet
    check_resumable(root, fingerprints, TrainingError, binding=begun)
    former = read_bytes(place).decode()
    changed = differing_keys(parse_config(mapping_of(former, place), source=place), config)
    if changed and begun:
        raise TrainingError(
            f"{root}: categories that are finished, or have checkpoints, were made with other settings: "
            + "; ".join(changed)
            + ". Go on with those, or start anew under another name"
        )


def _begun(root: str) -> set[str]:
    """Categories that are finished or have a checkpoint."""
    places = {name: list_names(join(root, "train", name)) for name in list_names(join(root, "train"))}
    begun = {name for name, inside in places.items() if any(one.startswith("checkpoint") for one in inside)}
    return begun | {*list_names(join(root, "bundles"))}


def differing_keys(former: Config, config: Config) -> list[str]:
    """Settings that change a result and are not the same, each with both values."""
    was, now = (dict(flatten_dict(one.model_dump(mode="json"))) for one in (former, config))
    return [
        f"{key} was {was.get(key)}, is {now.get(key)}"
        for key in sorted({*was, *now})
        if was.get(key) != now.get(key)
        and (not key.startswith(_FREE) or (key == "cluster.num_workers" and config.train.epochs > 0))
    ]
