"""A trial as Ray runs it: shared work fetched, categories judged here or by workers of Ray Train, one record written."""

from __future__ import annotations

import dataclasses
import json
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from focus_ray.cluster.failures import reason_of
from focus_ray.cluster.streams import worker_stream
from focus_ray.cluster.training import TrainerJob, data_parallel, make_trainer
from focus_ray.config import Config
from focus_ray.data.shards import Shard, StreamShard, build_shard, fits_memory
from focus_ray.data.split import NO_ROWS, Split, SplitPlan
from focus_ray.storage import join, remove_folder
from focus_ray.sweep import records
from focus_ray.sweep.records import Record
from focus_ray.sweep.settings import Objective, SweepConfig
from focus_ray.sweep.shared import CategoryImages, Features, embed_images, features_key, load_images
from focus_ray.sweep.trial import Judgement, forget, judge_category

STOPPED = "the sweep was stopped"
SHARED_TIMEOUT_S = 120.0  # a trial waits so long for shared work that was lost and is made again, then makes its own


@dataclass(frozen=True)
class StageJob:
    """What every trial of a stage is told; crosses to them as it is.

    sweep: as the driver validated it.  reference: the base at the largest size of all trials.
    stage: the category that is searched for; None for all.  splits: of the categories, in the order in which they are judged.
    images: (category, size) -> reference to `CategoryImages`.  features: key -> reference to `Features`.
    judge: handle of the actor that hears every score.
    """

    sweep: SweepConfig
    reference: Config
    stage: str | None
    splits: Mapping[str, Split]
    root: str
    use_gpu: bool
    images: Mapping[tuple[str, int], Any]
    features: Mapping[str, Any]
    judge: Any


@dataclass(frozen=True)
class TrialJob(TrainerJob):
    """One category of one trial: config holds the trial's settings.

    images, features: references to what is shared; None where nothing is.
    """

    number: int
    stage: StageJob
    images: Any
    features: Any


def load_task(config: Config, split: Split, objective: Objective, size_px: int) -> tuple[CategoryImages, None]:
    """The second value tells the driver that the first is there, or what failed, without moving it."""
    return load_images(config, split.category, split.plan(config), objective, size_px), None


def embed_task(config: Config, images: CategoryImages) -> tuple[Features, None]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return embed_images(config, images, device), None


def run_trial(config: Mapping[str, Any], job: StageJob) -> None:
    """What Tune runs: one point, category by category. Its record is in the storage before Tune hears of it."""
    import ray
    from ray import tune

    number, point = config["number"], config["point"]
    start = time.perf_counter()
    ray.get(job.judge.begin.remote(number))
    found: dict[str, Judgement] = {}
    failure = None
    try:
        settings = job.sweep.base_config(point)
        if not job.sweep.share_work:
            forget()
        for category, split in job.splits.items():
            images = job.images.get((category, settings.model.image_size_px))
            features = job.features.get(features_key(settings, category) or "")
            found[category] = _judge_in_trial(TrialJob(settings, split, job.use_gpu, number, job, images, features))
            if found[category].cut is not None:
                break
    except Exception as error:  # of this point alone: it is recorded, and the other trials go on
        failure = reason_of(error)
    cut = next((judgement.cut for judgement in found.values() if judgement.cut is not None), None)
    if cut == STOPPED:
        return
    if failure is not None or cut is not None:
        ray.get(job.judge.withdraw.remote(number))
    scores = [judgement.score for judgement in found.values() if judgement.score is not None]
    record = Record(
        number,
        job.stage,
        point,
        "failed" if failure is not None else "cut" if cut is not None else "finished",
        records.mean_score(scores) if failure is None and cut is None else None,
        {category: dataclasses.asdict(judgement) for category, judgement in found.items()},
        failure if failure is not None else cut,
        sum(judgement.epochs for judgement in found.values()),
        time.perf_counter() - start,
        time.time(),
    )
    records.write_record(job.root, record)
    steps = steps_of(record, list(job.splits), 1 if failure else job.sweep.max_epochs)
    score = math.nan if record.score is None else record.score
    # as text: Tune hands searchers flattened results
    tune.report({"score": score, "told": json.dumps({"record": dataclasses.asdict(record), "steps": steps})})


def _judge_in_trial(job: TrialJob) -> Judgement:
    """One category, in this process or by workers of Ray Train."""
    streams = job.config.train.epochs > 0 and not fits_memory(job.config, job.split)
    if job.config.cluster.num_workers == 1 and not streams:
        return _judge_work(job, torch.device("cuda" if job.use_gpu else "cpu"))
    scratch = join(job.stage.root, "scratch")
    name = f"{job.number:05d}-{job.category}-{uuid.uuid4().hex[:6]}"
    try:
        result = make_trainer(_train_worker, job, scratch, name).fit()
    finally:
        remove_folder(join(scratch, name))
    return result.return_value  # type: ignore[no-any-return]  # metrics that come without a checkpoint are not kept (Ray 2.60)


def _train_worker(job: TrialJob) -> Judgement:
    """What every Ray Train worker of a trial runs."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    return _judge_work(job, device, rank, num_workers, data_parallel(num_workers, device))


def _judge_work(
    job: TrialJob,
    device: torch.device,
    rank: int = 0,
    num_workers: int = 1,
    wrap: Callable[[torch.nn.Module], Any] | None = None,
) -> Judgement:
    import ray

    settings, stage = job.config, job.stage
    objective = stage.sweep.objective
    images: CategoryImages | None = _shared(job.images)
    features: Features | None = _shared(job.features) if num_workers == 1 and images is not None else None
    shard: Shard | None = None
    if images is None:
        shard, loaded = own_share(settings, job.category, job.split.plan(settings), rank, num_workers)
        images = load_images(stage.reference, job.category, loaded, objective, settings.model.image_size_px)

    def on_score(epoch: int, score: float, final: bool) -> str | None:
        heard = stage.judge.report.remote(job.number, job.category, epoch, score, final)
        return ray.get(heard)  # type: ignore[no-any-return]

    judgement = judge_category(
        settings,
        job.category,
        images,
        objective,
        device,
        num_images=job.split.num_fit,
        features=features,
        rank=rank,
        wrap=wrap,
        on_score=on_score,
        shard=shard,
    )
    judgement.shared = "features" if features is not None else "images" if job.images is not None else "nothing"
    return judgement


def own_share(
    settings: Config, category: str, plan: SplitPlan, rank: int, num_workers: int
) -> tuple[Shard | None, SplitPlan]:
    """What a worker trains from where images are not shared, and the plan of what is left to be read by everyone.

    A single worker reads its images with the others, and its shard is None; one of several reads its own part alone.
    """
    rest = plan.take_fit(NO_ROWS)
    if settings.train.epochs and not fits_memory(settings, plan):
        return StreamShard(settings, category, plan.share(rank, num_workers), worker_stream), rest
    if num_workers == 1:
        return None, plan
    return build_shard(settings, category, plan.without_holdout(), rank, num_workers), rest


def _shared(reference: Any) -> Any:
    """What was made for all trials; None where it was not, or was lost and does not come back in time."""
    import ray

    if reference is None:
        return None
    try:
        return ray.get(reference, timeout=SHARED_TIMEOUT_S)
    except (ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError, ray.exceptions.RayTaskError):
        return None


def steps_of(record: Record, categories: Sequence[str], max_epochs: int) -> list[tuple[int, float]]:
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
