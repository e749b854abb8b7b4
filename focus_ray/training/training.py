"""Trains one model for each category on Ray: workers of a category use DDP, and several categories run at the same time."""

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

from focus_ray.bundle.metric import share_metric
from focus_ray.cluster.connect import connect, resources_per_worker, runs_here, uses_gpu
from focus_ray.cluster.messages import Messages, epoch_callback
from focus_ray.cluster.ownership import Heartbeat, check_resumable, write_fingerprints
from focus_ray.cluster.pool import Failed, WorkerPool, options_per_worker
from focus_ray.cluster.preflight import count_concurrent_runs, probe_nodes
from focus_ray.data.read import list_categories
from focus_ray.data.schema import COMMIT_NAME
from focus_ray.errors import DataError, TrainingError
from focus_ray.fitting.fit import check_prerequisites
from focus_ray.fitting.regions import check_regions
from focus_ray.fitting.settings import Config, parse_config
from focus_ray.fitting.shards import BatchSchedule, fits_memory
from focus_ray.fitting.split import Split, split_category
from focus_ray.fitting.state import Figures, TrainState
from focus_ray.names import unique_name
from focus_ray.settings.sections import config_to_yaml, mapping_of
from focus_ray.storage.files import (
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
from focus_ray.training.local import STATE_FILE, bundle_uri, make_bundle, set_reproducible, train_locally
from focus_ray.training.report import write_training_report
from focus_ray.training.streams import stream_training_images, worker_stream

RUN_CONFIG = "config.yaml"
# settings that do not change the result of a category
_SETTINGS_WITHOUT_EFFECT = ("cluster.", "trackers", "data.memory_budget_mb", "data.categories")
MAX_TRAINER_RESTARTS = 2  # of the process that waits for a trainer; Ray Train restarts the workers of a trainer
SHARED_METRIC = "metric.safetensors"


@dataclass(frozen=True)
class TrainerJob:
    """The work of a trainer of one category. It is sent to the workers."""

    config: Config
    split: Split
    use_gpu: bool

    @property
    def category(self) -> str:
        """Name of the category."""
        return self.split.category


@dataclass(frozen=True)
class CategoryJob(TrainerJob):
    """A job of a run. root: folder of the run, for checkpoints and the bundle.  messages: queue for lines of the workers."""

    root: str
    messages: Messages

    def send_line(self, text: str) -> None:
        """Sends a line to the driver."""
        self.messages.put(f"{self.category}: {text}")


J = TypeVar("J", bound=TrainerJob)


def train(config: Config, *, resume: bool = False, log: Callable[[str], None] = lambda message: None) -> dict[str, str]:
    """Trains every category of the configuration and writes <storage>/<name>/bundles/<category>.

    Args:
        resume: continue a run of the same name: finished categories are kept, others start at their last checkpoint.

    Returns: category -> path of its bundle.

    Raises:
        TrainingError: the folder of the run exists and `resume` is False, or categories failed. The message names each failed
            category with its reason. The bundles of the other categories are complete.
        DataError: the data set cannot be used.
    """
    config = resolve_paths(config)
    if config.name == "auto":
        if resume:
            raise TrainingError("--resume needs the name of the run to continue: name=...")
        config = config.model_copy(update={"name": unique_name(config.cluster.team or "run")})
        log(f"name: {config.name}")
    check_prerequisites(config)
    available = list_categories(config.data.uri)
    categories = list(config.data.categories or available)
    unknown = sorted(set(categories) - set(available))
    if unknown:
        raise DataError(f"{config.data.uri} has no category {', '.join(unknown)}; it has {', '.join(available)}")
    check_regions(config, available)
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
    remaining = [
        category for category in categories if not (resume and exists(join(bundles[category], "manifest.json")))
    ]
    for category in sorted(set(categories) - set(remaining)):
        log(f"{category}: already trained, {bundles[category]}")
    if remaining:
        recorder = Recorder(config.trackers, config.storage, log)
        is_local = runs_here(config.cluster)
        limit = 1
        if is_local:
            check_access(root)
        else:
            limit = _join_cluster(config, root, {category: splits[category] for category in remaining}, log)
        _claim(root, resume, fingerprints)
        write_bytes(join(root, RUN_CONFIG), config_to_yaml(config).encode())
        training_recorder = TrainingRecorder(recorder, config, root, fingerprints, has_group=len(categories) > 1)
        heartbeat = Heartbeat(root)
        state = "failed"
        try:
            remaining_splits = [splits[category] for category in remaining]
            run = functools.partial(train_locally, recorder=training_recorder)
            if not is_local:
                run = functools.partial(_train_on_cluster, training_recorder=training_recorder, limit=limit)
            failed = run(config, remaining_splits, root, log)
            state = "failed" if failed else "finished"
        finally:
            training_recorder.close(failed=state == "failed")
            heartbeat.close(state)
        if failed:
            raise TrainingError(
                f"{len(failed)} of {len(categories)} categories failed; "
                + "; ".join(f"{category}: {reason}" for category, reason in sorted(failed.items()))
                + ". Fix the cause and run again with --resume"
            )
    if len(bundles) > 1 and learns_metric(config):
        shared = join(root, SHARED_METRIC)
        share_metric(list(bundles.values()), shared)
        log(f"metric of all {len(bundles)} categories, for a new one's density.metric: {shared}")
    log(f"report: {write_training_report(bundles, root)}")
    return bundles


def _join_cluster(config: Config, root: str, splits: Mapping[str, Split], log: Callable[[str], None]) -> int:
    """Joins the cluster, checks its resources and its storage, and returns how many categories can run at the same time.

    Raises: TrainingError, DataError: a check failed.
    """
    team = config.cluster.team
    is_private = connect(namespace=f"focus-ray-{team}" if team else None)
    streams = config.train.epochs > 0 and any(not fits_memory(config, split) for split in splits.values())
    limit = count_concurrent_runs(
        config.cluster,
        is_private,
        streams,
        log,
        limit=config.cluster.max_concurrent_categories,
        growing=fits_without_trainer(config),
    )
    probe_nodes([join(config.data.uri, f"category={category}", COMMIT_NAME) for category in splits], [root])
    return limit


def learns_metric(config: Config) -> bool:
    """Returns whether each category learns a discriminant projection that its bundle can share with others."""
    density = config.density
    return density.reduction == "discriminant" and density.metric is None and density.keep_moments


def _train_on_cluster(
    config: Config,
    splits: Sequence[Split],
    root: str,
    log: Callable[[str], None],
    training_recorder: TrainingRecorder,
    limit: int,
) -> dict[str, str]:
    """Trains the categories, `limit` at a time, and returns category -> reason for those that failed."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    messages = Messages()
    use_gpu = uses_gpu(config.cluster)
    jobs = iter([CategoryJob(config, split, use_gpu, root, messages) for split in splits])
    needs_trainer = not fits_without_trainer(config)
    if not needs_trainer:
        run_job, options = _fit_category, options_per_worker(config.cluster, use_gpu)
        max_retries = config.cluster.max_failures
    else:
        # A trainer waits on the node of the driver, so that the loss of another node ends no training. Ray Train restarts
        # the workers of a trainer.
        on_this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        run_job, options = _run_trainer, {"num_cpus": 0, "scheduling_strategy": on_this_node}
        max_retries = MAX_TRAINER_RESTARTS
    num_at_once = min(limit, len(splits))
    log(f"{len(splits)} categories, {num_at_once} at a time, {config.cluster.num_workers} worker(s) each")
    failed: dict[str, str] = {}

    def listen() -> None:
        messages.show(log, training_recorder.log_epoch)

    with WorkerPool[CategoryJob](
        num_at_once, options, max_retries, log, listen, retry_errors=not needs_trainer
    ) as pool:
        for job, outcome in pool.run(run_job, lambda: next(jobs, None)):
            listen()  # shows the lines of a category before its end
            category, place = job.category, bundle_uri(job.root, job.category)
            if isinstance(outcome, Failed):
                failed[category] = outcome.reason
                log(f"{category}: FAILED: {outcome.reason}")
                training_recorder.fail_category(category, outcome.reason)
            else:
                log(f"{category}: done in {outcome:.0f} s, {place}")
                training_recorder.finish_category(category, place)
    return failed


def fits_without_trainer(config: Config) -> bool:
    """Returns whether one worker fits a category without gradients, so that no trainer of Ray Train is needed."""
    return config.train.epochs == 0 and config.cluster.num_workers == 1


def _fit_category(job: CategoryJob) -> float:
    """Fits one category in this worker and returns the seconds it took."""
    start = time.monotonic()
    set_reproducible()
    device = torch.device("cuda" if job.use_gpu else "cpu")
    make_bundle(job.config, job.split, job.root, device, num_threads=num_decoder_threads(job.config), log=job.send_line)
    return time.monotonic() - start


def num_decoder_threads(config: Config) -> int:
    """Returns the number of threads that decode images in a worker: one for each of its CPUs."""
    return max(1, int(config.cluster.cpus_per_worker))


def _run_trainer(job: CategoryJob) -> float:
    """Trains one category with Ray Train and returns the seconds it took."""
    start = time.monotonic()
    callbacks = [epoch_callback(job.messages, job.category)] if job.config.trackers else []
    make_trainer(_train_worker, job, join(job.root, "train"), job.category, callbacks).fit()
    return time.monotonic() - start


def make_trainer(worker: Callable[[J], Any], job: J, place: str, name: str, callbacks: Sequence[Any] = ()) -> Any:
    """Returns the TorchTrainer of one category.

    Args:
        worker: function that every worker calls with the job.
        place: folder of checkpoints, which the trainer stores below `name`.
        callbacks: callbacks of Ray Train.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    from focus_ray.cluster import failure_policy, ray_private

    failure_policy.install()
    ray_private.pass_address_to_trainers()
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


def _run_worker(loop_config: dict[str, Any]) -> Any:
    """Runs the job on a worker. Ray Train can pass a mapping only."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # otherwise it logs every report
    set_reproducible()
    return loop_config["worker"](loop_config["job"])


def _train_worker(job: CategoryJob) -> None:
    """Trains and reports the metrics of each epoch on a Ray Train worker."""
    import ray.train
    import ray.train.torch

    config = job.config
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()

    def on_epoch(epoch: int, figures: Figures, snapshot: Callable[[], TrainState]) -> None:
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
        num_threads=num_decoder_threads(config),
        state=retry_while_busy(lambda: _last_state(ray.train.get_checkpoint(), device)),
        on_epoch=on_epoch,
        log=job.send_line,
    )
    ray.train.report({"num_images": count})


def _last_state(checkpoint: Any, device: torch.device) -> TrainState | None:
    """Reads the training state of a checkpoint; None without a checkpoint."""
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return TrainState.from_dict(torch.load(Path(folder) / STATE_FILE, map_location=device, weights_only=True))


def resolve_paths(config: Config) -> Config:
    """Makes local paths of the configuration absolute, because workers run in other folders."""
    weights, metric = config.model.weights, config.density.metric
    regions = {
        name: make_absolute(entry) if isinstance(entry, str) else entry for name, entry in config.data.regions.items()
    }
    if weights not in ("default", "random"):
        weights = make_absolute(weights)
    return config.model_copy(
        update={
            "storage": make_absolute(config.storage),
            "data": config.data.model_copy(update={"uri": make_absolute(config.data.uri), "regions": regions}),
            "model": config.model.model_copy(update={"weights": weights}),
            "density": config.density.model_copy(update={"metric": metric and make_absolute(metric)}),
            "trackers": {
                kind: entry.model_copy(update={"uri": entry.uri and make_absolute(entry.uri)})
                for kind, entry in config.trackers.items()
            },
        }
    )


def _claim(root: str, resume: bool, fingerprints: Mapping[str, str]) -> None:
    """Claims the folder for this run. Raises: TrainingError: another run of this name, started at the same time, was first."""
    claim = json.dumps({"token": uuid.uuid4().hex, "host": socket.gethostname()}).encode()
    if create_bytes(join(root, CLAIM), claim):
        write_fingerprints(root, fingerprints)
    elif not resume:
        raise TrainingError(
            f"{root} is used by a run that started at the same time: give another name (name=auto makes a unique name)"
        )


def _check_claim(config: Config, root: str, resume: bool, fingerprints: Mapping[str, str]) -> None:
    """Checks that this run may use the folder.

    Raises:
        TrainingError: the folder belongs to another run, a driver uses it, or the run to resume has another configuration.
        DataError: the images have changed since the run began.
    """
    path = join(root, RUN_CONFIG)
    if not exists(path):
        return
    if not resume:
        raise TrainingError(
            f"{root} already holds a run: give another name (name=...), or continue this run with --resume"
        )
    started = _started_categories(root)  # other categories have no results yet
    check_resumable(root, fingerprints, TrainingError, binding=started)
    stored_yaml = read_bytes(path).decode()
    changed = differing_keys(parse_config(mapping_of(stored_yaml, path), source=path), config)
    if changed and started:
        raise TrainingError(
            f"{root}: categories that are finished, or have checkpoints, were made with other settings: "
            + "; ".join(changed)
            + ". Continue with the same settings, or start a new run under another name"
        )


def _started_categories(root: str) -> set[str]:
    """Returns the categories that are finished or have a checkpoint."""
    checkpoint_names = {name: list_names(join(root, "train", name)) for name in list_names(join(root, "train"))}
    started = {
        name
        for name, names in checkpoint_names.items()
        if any(name_inside.startswith("checkpoint") for name_inside in names)
    }
    return started | {*list_names(join(root, "bundles"))}


def differing_keys(former: Config, config: Config) -> list[str]:
    """Returns a text with both values for each setting that changes a result and differs."""
    former_values, values = (dict(flatten_dict(settings.model_dump(mode="json"))) for settings in (former, config))
    return [
        f"{key} was {former_values.get(key)}, is {values.get(key)}"
        for key in sorted({*former_values, *values})
        if former_values.get(key) != values.get(key)
        and (not key.startswith(_SETTINGS_WITHOUT_EFFECT) or (key == "cluster.num_workers" and config.train.epochs > 0))
    ]
