"""Trains one model for each category on Ray: workers of a category use DDP, and several categories run at the same time."""

from __future__ import annotations

import functools
import json
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from focus_ray.bundle.metric import average_projections
from focus_ray.cluster.capacity import ClusterCapacity, count_decode_threads, make_worker_options
from focus_ray.cluster.connect import connect_to_ray, runs_without_ray
from focus_ray.cluster.failures import describe_root_cause
from focus_ray.cluster.messages import Message, MessageQueue, make_actor_options_for_this_node
from focus_ray.cluster.ownership import (
    FolderOwner,
    check_folder_owned,
    check_images_unchanged,
    find_next_generation,
    write_image_fingerprints,
)
from focus_ray.cluster.pool import FailedPiece, WorkerPool
from focus_ray.cluster.preflight import check_storage_on_nodes
from focus_ray.cluster.settings import MAX_FAILURES
from focus_ray.data.read import list_categories
from focus_ray.data.schema import COMMIT_NAME
from focus_ray.device import choose_device
from focus_ray.errors import DataError, TrainingError
from focus_ray.fitting.fit import check_fit_prerequisites
from focus_ray.fitting.regions import check_regions
from focus_ray.fitting.settings import Config, convert_earlier_settings, parse_config
from focus_ray.fitting.shards import streams_training_images
from focus_ray.fitting.split import SplitRule, compute_split_rule
from focus_ray.fyd.batch_schedule import BatchSchedule
from focus_ray.names import Log, make_unique_name
from focus_ray.settings.sections import ConfigSection, config_to_yaml, dump_settings, parse_yaml_mapping
from focus_ray.storage.files import (
    check_folder_access,
    file_exists,
    join_path,
    list_folder_entries,
    make_absolute_path,
    read_bytes,
    write_bytes,
    write_bytes_if_absent,
)
from focus_ray.tracking.base import flatten_dict
from focus_ray.tracking.recorder import BackgroundRecorder
from focus_ray.tracking.runs import CLAIM_FILE, TrainingRecorder
from focus_ray.training.category import (
    fit_category,
    get_bundle_uri,
    get_checkpoint_folder,
    get_plant_checkpoint_folder,
    get_plant_network_uri,
    list_checkpoints,
    train_network_of_plant,
)
from focus_ray.training.report import write_training_report
from focus_ray.training.streams import read_blocks_with_ray_data
from focus_ray.training.trainer import J, TrainerJob, run_on_train_workers

RUN_CONFIG = "config.yaml"
# settings that do not change the result of a category, or only the order of streamed images
_SETTINGS_WITHOUT_EFFECT = ("cluster.", "trackers", "data.memory_budget_mb", "data.categories")
MAX_TRAINER_RESTARTS = 2  # of the process that waits for a trainer; Ray Train restarts the workers of a trainer
SHARED_METRIC = "metric.safetensors"


@dataclass(frozen=True)
class RunJob(TrainerJob):
    """A task of a run, in one process or with a trainer of Ray Train.

    Attributes:
        root: folder of the run, for checkpoints and results.
        generation: generation of the folder that the driver owns, see `FolderOwner`.
        send: function that sends a message to the driver: a line of text, or (category, metrics of an interval).
        needs_trainer: True: Ray Train starts workers that do the work. False: the process that receives the job does all work.
        num_threads: threads that decode images in a worker; None: see `fit_category`.
    """

    root: str
    generation: int
    send: Callable[[Message], None]
    needs_trainer: bool
    num_threads: int | None


@dataclass(frozen=True)
class CategoryJob(RunJob):
    """The training of one category. split: the rule that selects the category's images for fitting and for calibration."""

    split: SplitRule

    @property
    def category(self) -> str:
        """Name of the category to train."""
        return self.split.category


@dataclass(frozen=True)
class PlantJob(RunJob):
    """The training of one network for all categories. splits: the rule of each category that selects its images."""

    splits: Sequence[SplitRule]


def train(config: Config, *, resume: bool = False, log: Log = lambda message: None) -> dict[str, str]:
    """Trains every category of the configuration, and writes the bundles <storage>/<name>/bundles/<category> and a report page.

    With train.scope=plant, first trains one network for all categories, and writes <storage>/<name>/network/network.safetensors.
    A category that is added later and trained with `resume` uses this network.

    If each of several categories learns its own distance metric (a projection of embeddings), also writes the average of these
    metrics, for the setting density.metric of a new category.

    Args:
        resume: continue a run of the same name, if there is one: finished categories are kept, others start at their last
            checkpoint. May wait up to `LEASE_S` for a sign of life of the earlier driver.

    Returns: category -> path or URI of its bundle.

    Raises:
        TrainingError: the folder of the run has a run already and `resume` is False, `resume` is True without a name or with
            changed settings, another driver uses the folder or takes it over, or Ray cannot be used.
        TrainingError: categories failed. The message names each failed category with its reason. The bundles of the other
            categories are complete.
        DataError: the data set cannot be used or has changed since the run began, or the storage cannot be used.
        ConfigError, WeightsError, MissingPackageError: a setting, pretrained weights or an experiment tracker cannot be used.
        BundleError: the bundle of a finished category is damaged.
    """
    config = make_paths_absolute(config)
    if config.name == "auto":
        if resume:
            raise TrainingError("--resume needs the name of the run to continue: name=...")
        config = config.model_copy(update={"name": make_unique_name(config.cluster.team or "run")})
        log(f"name: {config.name}")
    check_fit_prerequisites(config)
    available = list_categories(config.data.uri)
    categories = list(config.data.categories or available)
    unknown = sorted(set(categories) - set(available))
    if unknown:
        raise DataError(f"{config.data.uri} has no category {', '.join(unknown)}; it has {', '.join(available)}")
    check_regions(config, available)
    root = join_path(config.storage, config.name)
    splits = {category: compute_split_rule(config, category) for category in categories}
    check_enough_images(config, splits)
    fingerprints = {category: split.fingerprint for category, split in splits.items()}
    generation = _check_run_folder_usable(config, root, resume, fingerprints, log)
    bundles = {category: get_bundle_uri(root, category) for category in categories}
    remaining = [
        category
        for category in categories
        if not (resume and file_exists(join_path(bundles[category], "manifest.json")))
    ]
    for category in sorted(set(categories) - set(remaining)):
        log(f"{category}: already trained, {bundles[category]}")
    if remaining:
        failed = _train_categories(config, splits, remaining, root, generation, resume, log)
        if failed:
            raise TrainingError(
                f"{len(failed)} of {len(categories)} categories failed; "
                + "; ".join(f"{category}: {reason}" for category, reason in sorted(failed.items()))
                + ". Fix the cause and run again with --resume"
            )
    density = config.density
    learns_metrics = density.reduction == "discriminant" and density.metric is None and density.keep_moments
    if len(bundles) > 1 and learns_metrics:
        shared = join_path(root, SHARED_METRIC)
        average_projections(list(bundles.values()), shared)
        log(f"metric of all {len(bundles)} categories, for a new one's density.metric: {shared}")
    log(f"report: {write_training_report(bundles, root)}")
    return bundles


def check_enough_images(config: Config, splits: Mapping[str, SplitRule]) -> None:
    """Checks that each category has enough training images for all workers. Raises: DataError: it names the category."""
    for category, split in splits.items():
        try:
            BatchSchedule.plan([split.num_fit], config.cluster.num_workers, config.train.batch_size, config.train.seed)
        except DataError as error:
            raise DataError(f"category {category!r}: {error}") from None


def _connect_and_check_cluster(config: Config, root: str, splits: Mapping[str, SplitRule], log: Log) -> ClusterCapacity:
    """Connects to the Ray cluster or starts Ray, checks resources and storage, and returns how many categories can run at once.

    Args:
        root: folder of the run, which every node must be able to write to.
        splits: category -> rule that selects its images.

    Raises:
        TrainingError: Ray cannot be used, or the cluster has no room for the workers of one category.
        DataError: a node cannot read the data set or cannot use the folder of the run.
    """
    is_private = connect_to_ray(namespace=config.cluster.ray_namespace)
    streams = config.train.steps > 0 and streams_training_images(config, splits.values())
    limit = min(len(splits), config.cluster.max_concurrent_categories or len(splits))
    capacity = ClusterCapacity(config.cluster, is_private, log, streams=streams, limit=limit)
    check_storage_on_nodes(
        [join_path(config.data.uri, f"category={category}", COMMIT_NAME) for category in splits],
        [root],
        config.cluster.labels,
        log,
    )
    return capacity


def _train_categories(
    config: Config,
    all_splits: Mapping[str, SplitRule],
    categories: Sequence[str],
    root: str,
    generation: int,
    resume: bool,
    log: Log,
) -> dict[str, str]:
    """Trains categories in this process or on the cluster, and writes their metrics to the experiment trackers.

    Creates the files of the run's folder: owner, claim, fingerprints, configuration and heartbeat.

    Args:
        all_splits: category -> rule that selects its images, for every category of the run.
        categories: categories to train.
        root: folder of the run.
        generation: generation of the folder that this process takes.
        resume: see `train`.

    Returns: category -> reason, for each category that failed.

    Raises:
        TrainingError: another driver owns the folder or takes it over, or the cluster cannot be used.
        DataError: the folder of the run or the data set cannot be used.
        ConfigError, MissingPackageError: a tracker cannot be used.
    """
    recorder = BackgroundRecorder(config.trackers, config.storage, log)
    splits = {category: all_splits[category] for category in categories}
    capacity = None
    if runs_without_ray(config.cluster):
        check_folder_access(root)
    else:
        capacity = _connect_and_check_cluster(config, root, splits, log)
    fingerprints = {category: split.fingerprint for category, split in all_splits.items()}
    owner = FolderOwner(root, generation, TrainingError)
    try:
        _claim_run_folder(root, resume, fingerprints)
        write_bytes(join_path(root, RUN_CONFIG), config_to_yaml(config).encode())
        training_recorder = TrainingRecorder(recorder, config.model_dump(mode="json"), root, fingerprints)
    except BaseException:
        owner.close("failed")
        raise

    def handle_message(message: Message) -> None:
        if isinstance(message, str):
            log(message)
        else:
            training_recorder.log_interval(*message)

    failed: dict[str, str] = {}
    state = "failed"
    try:
        if config.train.trains_plant and not file_exists(get_plant_network_uri(root)):
            _train_plant(config, list(all_splits.values()), owner, capacity, handle_message)
        if capacity is None:
            use_gpu = bool(config.cluster.use_gpu) and choose_device() == "cuda"
            outcomes = _train_in_this_process(
                [
                    CategoryJob(config, use_gpu, root, generation, handle_message, False, None, split)
                    for split in splits.values()
                ]
            )
        else:
            outcomes = _train_on_cluster(config, splits, owner, capacity, handle_message)
        for category, outcome in outcomes:
            owner.check_owned(ask_storage=isinstance(outcome, FailedPiece))  # a worker may have noticed the loss first
            place = get_bundle_uri(root, category)
            if isinstance(outcome, FailedPiece):
                failed[category] = outcome.reason
                log(f"{category}: FAILED: {outcome.reason}")
                training_recorder.record_failed_category(category, outcome.reason)
            else:
                log(f"{category}: done in {outcome:.0f} s, {place}")
                training_recorder.record_finished_category(category, place)
        state = "failed" if failed else "finished"
    finally:
        if not owner.is_taken_over:  # otherwise the new owner continues the runs of the trackers
            training_recorder.close(failed=state == "failed")
        owner.close(state)
    return failed


def _train_plant(
    config: Config,
    splits: Sequence[SplitRule],
    owner: FolderOwner,
    capacity: ClusterCapacity | None,
    show: Callable[[Message], None],
) -> None:
    """Trains one network for all categories, in this process or with a trainer of Ray Train on the cluster.

    Args:
        splits: the rules of all categories of the run.
        owner: ownership of the run's folder by this process.
        capacity: resources of the cluster; None: train in this process.
        show: receives messages.

    Raises: TrainingError: the training failed, or see `_train_on_cluster`.
    """
    if capacity is None:
        use_gpu = bool(config.cluster.use_gpu) and choose_device() == "cuda"
        job = PlantJob(config, use_gpu, owner.root, owner.generation, show, False, None, splits)
        _train_plant_in_this_process(job, torch.device("cuda" if use_gpu else "cpu"))
        return
    messages, use_gpu = MessageQueue(), capacity.use_gpu
    num_threads = count_decode_threads(config.cluster, use_gpu)
    jobs = iter([PlantJob(config, use_gpu, owner.root, owner.generation, messages.put, True, num_threads, splits)])
    for _, outcome in _run_jobs(_train_plant_with_trainer, jobs, config, owner, capacity, messages, show, True):
        if isinstance(outcome, FailedPiece):
            raise TrainingError(
                f"the network of all categories could not be trained: {outcome.reason}. Fix the cause and run again with --resume"
            )


def _train_plant_with_trainer(job: PlantJob) -> None:
    """Trains one network for all categories with a trainer of Ray Train."""
    run_on_train_workers(_train_plant_in_this_process, job, join_path(job.root, "scratch"), "network")


def _train_plant_in_this_process(job: PlantJob, device: torch.device) -> None:
    """Calls `train_network_of_plant` with the settings of a job, in this process, which may be one of several workers."""
    train_network_of_plant(
        job.config,
        job.splits,
        job.root,
        job.send,
        device=device,
        num_threads=job.num_threads,
        block_reader=functools.partial(read_blocks_with_ray_data, job.config) if job.needs_trainer else None,
        check_owned=lambda: check_folder_owned(job.root, job.generation, TrainingError),
    )


def _train_in_this_process(jobs: Sequence[CategoryJob]) -> Iterator[tuple[str, float | FailedPiece]]:
    """Generator: trains one category after the other in this process, and yields (category, seconds or `FailedPiece`)."""
    for number, job in enumerate(jobs, start=1):
        job.send(f"{job.category}: training in this process, category {number} of {len(jobs)}")
        outcome: float | FailedPiece
        try:
            outcome = _train_category(job)
        except Exception as error:  # a failed category must not stop the next ones; it is reported at the end
            outcome = FailedPiece(describe_root_cause(error))
        yield job.category, outcome


def _train_on_cluster(
    config: Config,
    splits: Mapping[str, SplitRule],
    owner: FolderOwner,
    capacity: ClusterCapacity,
    show: Callable[[Message], None],
) -> Iterator[tuple[str, float | FailedPiece]]:
    """Generator: trains categories on the cluster, and yields (category, seconds or `FailedPiece`) whenever a category ends.

    Args:
        splits: category -> rule that selects its images, for each category to train.
        owner: ownership of the run's folder by this process.
        capacity: gives the number of categories that are trained at the same time.
        show: receives the messages of the workers, and lines of this process.

    Raises: TrainingError: too many starts of workers failed, the run waited too long for resources, or another driver has taken
        over the folder.
    """
    messages = MessageQueue()
    use_gpu = capacity.use_gpu
    needs_trainer = not fits_without_ray_train(config)
    num_threads = count_decode_threads(config.cluster, use_gpu)
    jobs = iter(
        [
            CategoryJob(config, use_gpu, owner.root, owner.generation, messages.put, needs_trainer, num_threads, split)
            for split in splits.values()
        ]
    )
    show(f"{len(splits)} categories, {config.cluster.num_workers} worker(s) each")
    for job, outcome in _run_jobs(_train_category, jobs, config, owner, capacity, messages, show, needs_trainer):
        yield job.category, outcome


def _run_jobs(
    function: Callable[[J], Any],
    jobs: Iterator[J],
    config: Config,
    owner: FolderOwner,
    capacity: ClusterCapacity,
    messages: MessageQueue,
    show: Callable[[Message], None],
    needs_trainer: bool,
) -> Iterator[tuple[J, Any]]:
    """Generator: runs a function on jobs on the cluster, and yields each job with its result or `FailedPiece`.

    Args:
        messages: queue to which the jobs send their messages.
        needs_trainer: True: the function starts a trainer of Ray Train, and waits for it.
        owner, capacity, show: see `_train_on_cluster`.

    Raises: see `_train_on_cluster`.
    """

    def show_new_messages() -> None:
        owner.check_owned()
        for message in messages.take_all():
            show(message)

    pool = WorkerPool[J](
        capacity,
        # a process that waits for a trainer runs on the node of the driver, so that the loss of another node ends no training
        make_actor_options_for_this_node() if needs_trainer else make_worker_options(config.cluster, capacity.use_gpu),
        MAX_TRAINER_RESTARTS if needs_trainer else MAX_FAILURES,
        show,
        show_new_messages,
        runs_trainers=needs_trainer,
    )
    for job, outcome in pool.run_pieces(function, lambda: next(jobs, None)):
        show_new_messages()  # shows the lines of a job before its end
        yield job, outcome


def fits_without_ray_train(config: Config) -> bool:
    """Returns whether a category needs no trainer of Ray Train: it has one worker, and it does not train its own network."""
    return not config.train.trains_each_category and config.cluster.num_workers == 1


def _train_category(job: CategoryJob) -> float:
    """Trains one category, in this process or with a trainer of Ray Train, and returns the duration in seconds."""
    start = time.monotonic()
    if job.needs_trainer:
        run_on_train_workers(_fit_in_this_process, job, join_path(job.root, "scratch"), job.category)
    else:
        _fit_in_this_process(job, torch.device("cuda" if job.use_gpu else "cpu"))
    return time.monotonic() - start


def _fit_in_this_process(job: CategoryJob, device: torch.device) -> None:
    """Calls `fit_category` with the settings of a job, in this process, which may be one of several workers."""
    fit_category(
        job.config,
        job.split,
        job.root,
        job.send,
        on_interval_metrics=lambda figures: job.send((job.category, figures)),
        device=device,
        num_threads=job.num_threads,
        block_reader=functools.partial(read_blocks_with_ray_data, job.config) if job.needs_trainer else None,
        check_owned=lambda: check_folder_owned(job.root, job.generation, TrainingError),
    )


def make_paths_absolute(config: Config) -> Config:
    """Returns a copy of the configuration with absolute local paths, because workers run in other folders."""
    tree = config.model_dump(mode="json")
    locations = [(tree, "storage"), (tree["data"], "uri"), (tree["density"], "metric")]
    locations += [(tracker, "uri") for tracker in tree["trackers"].values()]
    locations += [
        (tree["data"]["regions"], name) for name, entry in config.data.regions.items() if isinstance(entry, str)
    ]
    if config.model.weights not in ("default", "random"):
        locations.append((tree["model"], "weights"))
    for section, key in locations:
        if section[key] is not None:
            section[key] = make_absolute_path(section[key])
    return parse_config(tree, is_fitted=True)  # the settings are checked already


def _claim_run_folder(root: str, resume: bool, fingerprints: Mapping[str, str]) -> None:
    """Reserves a run's folder for this run: creates the claim file, and writes the fingerprints of the categories.

    If the claim file exists and `resume` is True, does nothing.

    Args:
        root: folder of the run.
        fingerprints: category -> hash that identifies its images.

    Raises:
        TrainingError: the claim file exists, and `resume` is False: another run of this name started at the same time.
        DataError: a file cannot be written.
    """
    claim = json.dumps({"token": uuid.uuid4().hex, "host": socket.gethostname()}).encode()
    if write_bytes_if_absent(join_path(root, CLAIM_FILE), claim):
        write_image_fingerprints(root, fingerprints)
    elif not resume:
        raise TrainingError(
            f"{root} is used by a run that started at the same time: give another name (name=auto makes a unique name)"
        )


def _check_run_folder_usable(config: Config, root: str, resume: bool, fingerprints: Mapping[str, str], log: Log) -> int:
    """Checks that this run may use its folder, and returns the generation of the folder that this run can take.

    The run may use the folder if it is new, or if `resume` is True and the earlier run has ended and fits.

    An earlier run fits if its settings and its images are the same, or if no category has results yet. The function also writes
    the fingerprints of categories that have no results yet.

    Args:
        root: folder of the run.
        fingerprints: category -> hash that identifies its images.
        log: receives a line if the function waits for the driver of the earlier run.

    Raises:
        TrainingError: the folder has a run and `resume` is False, another driver uses the folder, or the earlier run has results
            with other settings.
        DataError: the images of a category with results have changed since the run began.
        ConfigError: the stored configuration cannot be used by this version of focus_ray.
    """
    path = join_path(root, RUN_CONFIG)
    if not resume:
        if not file_exists(path):
            return 1
        raise TrainingError(
            f"{root} already holds a run: give another name (name=...), or continue this run with --resume"
        )
    generation = find_next_generation(root, TrainingError, log)
    if not file_exists(path):
        return generation
    started = _list_started_categories(root)  # other categories have no results yet
    if _is_plant_training_interrupted(root):
        check_images_unchanged(root, fingerprints)  # the order of the batches depends on all categories
        started |= set(fingerprints)
    check_images_unchanged(root, fingerprints, fixed_categories=started)
    stored_settings = convert_earlier_settings(parse_yaml_mapping(read_bytes(path).decode(), path))
    earlier = parse_config(stored_settings, source=path)
    changed = [
        text
        for key, text in describe_changed_settings(earlier, config).items()
        if not key.startswith(_SETTINGS_WITHOUT_EFFECT)
    ]
    if changed and (started or file_exists(get_plant_network_uri(root))):
        raise TrainingError(
            f"{root}: categories that are finished, or have checkpoints, were made with other settings: "
            + "; ".join(changed)
            + ". Continue with the same settings, or start a new run under another name"
        )
    return generation


def _list_started_categories(root: str) -> set[str]:
    """Returns the categories that have a bundle folder, even if the bundle is incomplete, or a checkpoint."""
    started = {*list_folder_entries(join_path(root, "bundles"))}
    for category in list_folder_entries(join_path(root, "train")):
        if list_checkpoints(get_checkpoint_folder(root, category)):
            started.add(category)
    return started


def _is_plant_training_interrupted(root: str) -> bool:
    """Returns whether the training of one network for all categories has checkpoints, but no result."""
    has_checkpoint = bool(list_checkpoints(get_plant_checkpoint_folder(root)))
    return has_checkpoint and not file_exists(get_plant_network_uri(root))


def describe_changed_settings(earlier: ConfigSection, current: ConfigSection) -> dict[str, str]:
    """Returns key -> text such as 'train.steps was 5, is 10' for each setting that differs, sorted by key."""
    earlier_values, values = (dict(flatten_dict(dump_settings(settings))) for settings in (earlier, current))
    return {
        key: f"{key} was {earlier_values.get(key)}, is {values.get(key)}"
        for key in sorted({*earlier_values, *values})
        if earlier_values.get(key) != values.get(key)
    }
