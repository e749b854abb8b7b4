"""Runs a trial of a sweep in Ray: gets shared images and features, scores each category, and writes the result.

A category is fitted and scored in the process of the trial, or on Ray Train workers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from focus_ray.cluster.capacity import count_decode_threads
from focus_ray.cluster.failures import describe_root_cause
from focus_ray.cluster.ownership import check_folder_owned
from focus_ray.device import choose_device
from focus_ray.distributed import get_rank, get_world_size
from focus_ray.errors import SweepError
from focus_ray.fitting.plant import PlantNetwork, train_plant_network
from focus_ray.fitting.settings import Config
from focus_ray.fitting.shards import Shard, StreamShard, build_shard, fits_in_memory
from focus_ray.fitting.split import NO_ROWS, SplitPlan, SplitRule
from focus_ray.storage.files import join_path
from focus_ray.sweep import records
from focus_ray.sweep.records import TrialRecord
from focus_ray.sweep.settings import Objective, SweepConfig
from focus_ray.sweep.trial import CategoryResult, clear_trial_caches, score_category
from focus_ray.sweep.trial_inputs import (
    CategoryImages,
    FrozenFeatures,
    compute_frozen_features,
    load_category_images,
    make_features_key,
)
from focus_ray.training.streams import read_blocks_with_ray_data
from focus_ray.training.trainer import J, TrainerJob, run_on_train_workers

STOPPED = "the sweep was stopped"
SHARED_TIMEOUT_S = (
    120.0  # if shared inputs are lost, Ray computes them again; a trial waits this time, then computes its own inputs
)


@dataclass(frozen=True)
class SweepStageInputs:
    """The inputs that all trials of a stage get. A stage is one search: for one category, or for all categories together.

    Attributes:
        sweep: Validated configuration of the sweep.
        stage: Category that the trials search for; None for all categories.
        splits: Category -> split of its images, in the order in which trials go through the categories.
        root: Folder of the sweep.
        generation: Generation of the folder that the driver owns, see `FolderOwner`.
        use_gpu: True if trials use a GPU.
        has_train_workers: True: a trial computes on workers of Ray Train. False: in its own process.
        images: (category, image size) -> reference to `CategoryImages`.
        features: `make_features_key` -> reference to `FrozenFeatures`.
        pruner: Handle of the `TrialPruner` actor, which decides when a trial ends early.
    """

    sweep: SweepConfig
    stage: str | None
    splits: Mapping[str, SplitRule]
    root: str
    generation: int
    use_gpu: bool
    has_train_workers: bool
    images: Mapping[tuple[str, int], Any]
    features: Mapping[str, Any]
    pruner: Any


@dataclass(frozen=True)
class PlantTrialJob(TrainerJob):
    """The inputs to train one network for all categories in one trial.

    Attributes:
        splits: The rules that split the images of the categories.
    """

    splits: Sequence[SplitRule]


@dataclass(frozen=True)
class TrialJob(TrainerJob):
    """The inputs to fit and score one category in one trial. `config` contains the settings of the trial.

    Attributes:
        split: The rule that splits the images of the category.
        number: Number of the trial.
        stage: The inputs that all trials of the stage get.
        network: The network of all categories; None if the categories train their own networks, or nothing is trained.
    """

    split: SplitRule
    number: int
    stage: SweepStageInputs
    network: PlantNetwork | None


def load_images_task(
    config: Config, split: SplitRule, objective: Objective, size_px: int
) -> tuple[CategoryImages, None]:
    """Ray task: decodes the images of a category. Returns the images, and None, which shows the end of the task.

    Raises: DataError: see `load_category_images`.
    """
    return load_category_images(config, split.category, split.build_plan(config), objective, size_px), None


def compute_features_task(config: Config, images: CategoryImages) -> tuple[FrozenFeatures, None]:
    """Ray task: computes the features of a category. Returns the features, and None, which shows the end of the task.

    Raises: DataError: see `compute_frozen_features`.
    """
    return compute_frozen_features(config, images, torch.device(choose_device())), None


def run_trial(config: Mapping[str, Any], job: SweepStageInputs) -> None:
    """Runs one trial of a sweep inside Ray Tune: fits and scores each category, and writes and reports the result.

    An error ends only this trial, which gets the status "failed". If the sweep was stopped, nothing is written.

    Args:
        config: "number" and "point" (settings) of the trial, from the searcher.
        job: The inputs of the stage.

    Raises:
        SweepError: Another process has taken the sweep over. No result is written.
        DataError: The result cannot be written.
    """
    import ray
    from ray import tune

    number, point = config["number"], config["point"]
    start_s = time.perf_counter()
    ray.get(job.pruner.begin_trial.remote(number))
    results: dict[str, CategoryResult] = {}
    status, reason, num_steps = "finished", None, 0
    try:
        settings = job.sweep.make_trial_config(point)
        if not job.sweep.share_work:
            clear_trial_caches()
        network = _train_plant_network(settings, job, number) if settings.train.trains_plant else None
        if network is not None:
            num_steps = settings.train.steps
        for category, split in job.splits.items():
            results[category] = _run_trial_job(TrialJob(settings, job.use_gpu, split, number, job, network))
            reason = results[category].cut
            if reason is not None:
                status = "cut"
                break
    except Exception as error:  # only this trial fails; it is recorded, and the other trials go on
        status, reason = "failed", describe_root_cause(error)
    if reason == STOPPED:
        return
    if status != "finished":
        ray.get(job.pruner.exclude_trial.remote(number))
    scores = [result.score for result in results.values() if result.score is not None]
    record = TrialRecord(
        number,
        job.stage,
        point,
        status,
        float(np.mean(scores)) if status == "finished" else None,
        {category: dataclasses.asdict(result) for category, result in results.items()},
        reason,
        num_steps + sum(result.steps for result in results.values()),
        time.perf_counter() - start_s,
        time.time(),
    )
    check_folder_owned(job.root, job.generation, SweepError)
    records.write_trial_record(job.root, record)
    score = math.nan if record.score is None else record.score
    tune.report(
        {"score": score, "record": json.dumps(dataclasses.asdict(record))}
    )  # text: Tune flattens nested results


def _train_plant_network(config: Config, stage: SweepStageInputs, number: int) -> PlantNetwork:
    """Trains one network for all categories with the settings of a trial.

    It runs in this process or on Ray Train workers.

    Args:
        config: Settings of the trial.
        stage: The inputs that all trials of the stage get.
        number: Number of the trial.
    """
    job = PlantTrialJob(config, stage.use_gpu, list(stage.splits.values()))
    network: PlantNetwork = _run_in_process_or_on_workers(_train_plant_network_on_worker, job, stage, number, "network")
    return network


def _train_plant_network_on_worker(job: PlantTrialJob, device: torch.device) -> PlantNetwork:
    """Trains one network for all categories in this process, alone or as a worker of a torch.distributed group."""
    block_reader = functools.partial(read_blocks_with_ray_data, job.config)
    num_threads = count_decode_threads(job.config.cluster, job.use_gpu)
    return train_plant_network(
        job.config, job.splits, get_rank(), device, num_threads=num_threads, block_reader=block_reader
    )


def _run_trial_job(job: TrialJob) -> CategoryResult:
    """Fits (with training, if configured) and scores a trial on one category.

    It runs in this process or on Ray Train workers.
    """
    result: CategoryResult = _run_in_process_or_on_workers(
        _score_on_worker, job, job.stage, job.number, job.split.category
    )
    return result


def _run_in_process_or_on_workers(
    function: Callable[[J, torch.device], Any], job: J, stage: SweepStageInputs, number: int, label: str
) -> Any:
    """Runs a function of a trial in this process or, if the stage has them, on workers of Ray Train. Returns its result.

    Args:
        function: Called with the job and the device, on every worker.
        number: Number of the trial.
        label: What the function computes, for the name of the trainer.
    """
    if not stage.has_train_workers:
        return function(job, torch.device("cuda" if job.use_gpu else "cpu"))
    name = f"{number:05d}-{label}-{uuid.uuid4().hex[:6]}"
    return run_on_train_workers(function, job, join_path(stage.root, "scratch"), name)


def _score_on_worker(job: TrialJob, device: torch.device) -> CategoryResult:
    """Fits and scores one category in this process, alone or as a worker of a torch.distributed group.

    Uses shared images and features if there are any.

    Args:
        job: The category and the trial.
        device: Device to compute on.
    """
    import ray

    settings, stage = job.config, job.stage
    objective = stage.sweep.objective
    size_px, num_workers = settings.model.image_size_px, get_world_size()
    features: FrozenFeatures | None = None
    shard: Shard | None = None
    images: CategoryImages | None = _fetch_shared_input(stage.images.get((job.split.category, size_px)))
    if images is not None and num_workers == 1:
        features = _fetch_shared_input(stage.features.get(make_features_key(settings, job.split.category) or ""))
    shared = "features" if features is not None else "images" if images is not None else "nothing"
    if images is None:
        shard, plan = split_images_for_worker(
            settings, job.split.category, job.split.build_plan(settings), get_rank(), num_workers
        )
        images = load_category_images(stage.sweep.largest_image_config, job.split.category, plan, objective, size_px)

    def on_score(step: int, score: float, final: bool) -> str | None:
        """Sends a score to the `TrialPruner` actor. Returns the reason to end the trial; None if it goes on."""
        decision = stage.pruner.report_score.remote(job.number, job.split.category, step, score, final)
        return ray.get(decision)  # type: ignore[no-any-return]

    result = score_category(
        settings,
        job.split.category,
        images,
        objective,
        device,
        num_images=job.split.num_fit,
        features=features,
        on_score=on_score,
        shard=shard,
        network=job.network,
        block_reader=functools.partial(read_blocks_with_ray_data, settings),
    )
    result.shared = shared
    return result


def split_images_for_worker(
    settings: Config, category: str, plan: SplitPlan, rank: int, num_workers: int
) -> tuple[Shard, SplitPlan]:
    """Returns the training images of one worker, and a plan of the other images, which every worker reads completely.

    The plan contains the validation images and the held-out images, and no training images. Only for trials without shared
    images.

    Args:
        settings: Configuration of the trial.
        category: Category of the images.
        plan: Row numbers of all images.
        rank: Rank of the worker.
        num_workers: Number of workers.
    """
    if settings.train.steps and not fits_in_memory(settings, plan):
        shard: Shard = StreamShard(settings, category, plan, rank, num_workers)
    else:
        shard = build_shard(settings, category, plan.drop_holdout(), rank, num_workers)
    return shard, plan.select_fit_images(NO_ROWS)


def _fetch_shared_input(reference: Any) -> Any:
    """Gets shared images or features from Ray's object store.

    Args:
        reference: `ray.ObjectRef` of the images or features; None if they are not shared.

    Returns: None if there is no reference, if the task that computes the object failed, or if the object was lost and Ray cannot
        compute it again within SHARED_TIMEOUT_S.
    """
    import ray

    if reference is None:
        return None
    try:
        return ray.get(reference, timeout=SHARED_TIMEOUT_S)
    except (ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError, ray.exceptions.RayTaskError):
        return None
