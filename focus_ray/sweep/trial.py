"""Runs one trial of a sweep: fits a model for each category and scores it on images that are the same for all trials.

Images and features of an untrained network that are the same for all trials can be passed in; the scores stay the same. A trial
runs alone or on every worker of an initialized torch.distributed group. Works without Ray.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from focus_ray.data.read import NUM_ROWS_PER_READ
from focus_ray.density.base import NormalStatistics, choose_bank_images
from focus_ray.density.reduction import ChannelReduction
from focus_ray.density.registry import DENSITIES
from focus_ray.detect.detector import ScoredImages
from focus_ray.distributed import all_gather_objects, get_rank
from focus_ray.errors import DataError
from focus_ray.features.alignment.congealing import AlignmentReport
from focus_ray.features.backbones.base import build_meta_backbone
from focus_ray.features.backbones.registry import BACKBONES
from focus_ray.features.network import FocusNet
from focus_ray.features.settings import ModelConfig
from focus_ray.fitting.fit import DetectorFitter, build_detector
from focus_ray.fitting.passes import EmbeddedBatch, compute_embedding_statistics, concatenate_scores
from focus_ray.fitting.plant import PlantNetwork
from focus_ray.fitting.selection import compute_validation_metrics
from focus_ray.fitting.settings import Config
from focus_ray.fitting.shards import BlockReader, Shard
from focus_ray.fitting.state import TrainState
from focus_ray.metrics.evaluate import compute_metrics
from focus_ray.metrics.metrics import ScoredTestImages
from focus_ray.metrics.registry import METRICS
from focus_ray.sweep.settings import Objective, get_objective_metric
from focus_ray.sweep.trial_inputs import (
    SCORING_BATCH_SIZE,
    CategoryImages,
    FrozenFeatures,
    ScoringImages,
    make_worker_shard,
    take_worker_rows,
)


class TrialPruned(Exception):
    """Raised to end a trial early. The argument is the reason, for instance a low score."""


@dataclass
class CategoryResult:
    """The result of a trial of a sweep on one category: its scores, metrics and warnings.

    Attributes:
        category: Name of the category.
        score: Final score; None if the trial was pruned (stopped early) before the final score.
        num_good, num_bad: Number of normal and anomalous images that were scored.
        figures: Metric -> value; the score is one of these values.
        curve: (trained steps, score) of each report. If the category is finished, the last score is the final score.
        steps: Number of trained steps. A trial that is pruned after an interval has trained its steps.
        seconds: Duration.
        cut: Reason why the trial was pruned; None if it was not.
        alignment: Report of the image alignment.
        warnings: Warnings of the training.
        shared: Shared inputs that were used: "nothing", "images" or "features".
    """

    category: str
    score: float | None = None
    num_good: int = 0
    num_bad: int = 0
    figures: dict[str, float | None] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    cut: str | None = None
    alignment: AlignmentReport | None = None
    warnings: list[str] = field(default_factory=list)
    shared: str = "nothing"


def score_category(
    config: Config,
    category: str,
    images: CategoryImages,
    objective: Objective,
    device: torch.device,
    *,
    num_images: int | None = None,
    features: FrozenFeatures | None = None,
    on_score: Callable[[int, float, bool], str | None] = lambda step, score, final: None,
    shard: Shard | None = None,
    network: PlantNetwork | None = None,
    block_reader: BlockReader | None = None,
) -> CategoryResult:
    """Fits a model of one category with the settings of a trial, and scores it on the scoring images after every interval.

    The scoring images are the same for all trials. A loss or a score that is not finite prunes the trial (ends it early),
    because its settings cause this.

    Args:
        config: Configuration of the trial.
        category: Name of the category.
        images: Decoded images of the category.
        objective: The score that the sweep maximizes.
        device: Device to compute on.
        num_images: Number of training images of all workers together; None if `images` contains all.
        features: Result of `compute_frozen_features`, if `make_features_key` of this trial has shared features.
        on_score: Called on rank 0 with (trained steps, score, is_final). It returns a reason to prune the trial, or None.
        shard: This worker's share of the images for streamed training; None takes the share from `images`.
        network: The network that was trained for all categories; None trains a network, if the settings say so.
        block_reader: Reads streamed images for the training; None: this process reads them.

    Returns: the result. If the trial was pruned, `cut` has the reason.

    Raises:
        DataError: There are too few images, images cannot be aligned or read, or the objective cannot be measured.
    """
    num_bad = int(images.scored.labels.sum())
    result = CategoryResult(category, num_good=len(images.scored.labels) - num_bad, num_bad=num_bad)
    start_s = time.perf_counter()

    def report_score(step: int, figures: dict[str, float | None], final: bool) -> None:
        """Adds a score to the result, and asks `on_score` on rank 0 whether the trial goes on.

        Raises: TrialPruned: `on_score` returned a reason. It is raised on all workers.
        """
        score = figures["score"]
        assert score is not None
        result.curve.append((step, score))
        reason = all_gather_objects(on_score(step, score, final) if get_rank() == 0 else None)[0]
        if final:
            result.figures, result.score = figures, score
        if reason is not None:
            raise TrialPruned(reason)

    try:
        if features is not None:
            result.alignment = features.alignment
            report_score(0, _score_features(config, images, features, objective, device), True)
        else:
            own_images = shard or make_worker_shard(images)
            run = DetectorFitter(
                config,
                own_images,
                num_images or len(images.fit),
                device,
                net=None if network is None else network.build(config.model),
                notes=None if network is None else network.notes,
                rank=get_rank(),
                block_reader=block_reader,
            )
            _train_and_score(run, images.scored, objective, result, report_score)
    except TrialPruned as pruned:
        result.cut = str(pruned)
    except (FloatingPointError, torch.linalg.LinAlgError) as error:  # LinAlgError: values too large to decompose
        result.cut = f"diverged: {error}"
    result.seconds = time.perf_counter() - start_s
    return result


def _train_and_score(
    run: DetectorFitter,
    scored: ScoringImages,
    objective: Objective,
    result: CategoryResult,
    report_score: Callable[[int, dict[str, float | None], bool], None],
) -> None:
    """Trains a model and scores it on the scoring images, which are the same for all trials, after every interval.

    It trains as `fitting.fit.fit` does, but sets no thresholds. Without training, it scores the model once.

    Args:
        run: The fit of this worker.
        scored: Images to score on; each worker scores its own part.
        objective: The score that the sweep maximizes.
        result: Receives the number of steps, the alignment report and the warnings.
        report_score: Called with (trained steps, metric -> value, is_final).

    Raises:
        TrialPruned: `report_score` raised it to end the trial early.
        DataError: There are too few images, images cannot be aligned, or the objective cannot be measured.
        FloatingPointError: A loss, a score or a map is not finite.
    """
    config = run.config
    own_images = take_worker_rows(scored.images)

    def score_model() -> dict[str, float | None]:
        """Fits the density (the model of normal embeddings), scores the scoring images and returns metric -> value."""
        detector = build_detector(config, run.net, run.reduction, run.compute_training_statistics())
        batches = (
            own_images[start : start + SCORING_BATCH_SIZE] for start in range(0, len(own_images), SCORING_BATCH_SIZE)
        )
        own_scores = concatenate_scores(
            (detector(torch.from_numpy(batch)) for batch in batches), scored.masks.shape[1:]
        )
        scores, maps = (np.concatenate(parts) for parts in zip(*all_gather_objects(own_scores), strict=True))
        return _compute_trial_metrics(scored, scores, maps, objective)

    def on_interval(step: int, figures: dict[str, float], snapshot: Callable[[], TrainState]) -> None:
        """Scores the model after an interval and reports the score. After the last interval it only counts the steps."""
        result.steps = step
        if step < config.train.steps:
            report_score(step, score_model(), False)

    try:
        run.align_and_train(None, on_interval)
        report_score(config.train.steps, score_model(), True)  # judges the selected network, if the settings select one
    finally:
        result.alignment, result.warnings = run.notes.alignment, run.notes.warnings


@torch.no_grad()
def _score_features(
    config: Config, images: CategoryImages, features: FrozenFeatures, objective: Objective, device: torch.device
) -> dict[str, float | None]:
    """Scores the scoring images (the same for all trials) with shared features of the untrained network. Returns metric -> value.

    Reduces the channels of the features and fits the density (the model of normal embeddings) first.

    Raises:
        DataError: The objective cannot be measured on these images.
        FloatingPointError: A score or a map is not finite.
    """
    net = _build_untrained_network(config.model, features, device)
    statistics, reduction, embeddings = _reduce_features(config, features, device)
    detector = build_detector(config, net, reduction, statistics)
    theta = None if features.theta is None else torch.from_numpy(np.array(features.theta)).to(device)

    def score_batches() -> Iterator[ScoredImages]:
        """Generator: yields the scores and anomaly maps of each batch of the scoring images."""
        start = 0
        for embedding in embeddings:
            yield detector.score_embeddings(embedding, None if theta is None else theta[start : start + len(embedding)])
            start += len(embedding)

    return _compute_trial_metrics(
        images.scored, *concatenate_scores(score_batches(), images.scored.masks.shape[1:]), objective
    )


_reductions: dict[str, tuple[NormalStatistics, ChannelReduction, list[Tensor]]] = {}  # of recent trials
_MAX_REDUCTIONS = 2  # consecutive trials often differ only in settings that are used later


def clear_trial_caches() -> None:
    """Deletes the networks and reduced features of earlier trials from the caches of this process."""
    _build_untrained_network.cache_clear()
    _reductions.clear()


@functools.lru_cache(4)
def _build_untrained_network(config: ModelConfig, features: FrozenFeatures, device: torch.device) -> FocusNet:
    """Returns a network with the image size and the fitted image aligner. Its backbone has no weights and is never run.

    The network is cached.

    Args:
        config: Settings of the network.
        features: Shared features, with the state of the aligner.
        device: Device of the network.
    """
    net = FocusNet(config, build_meta_backbone(config.backbone).to_empty(device="cpu"))
    if features.aligner is not None:
        assert net.image_aligner is not None
        state = {name: torch.from_numpy(np.array(value)) for name, value in features.aligner.items()}
        net.image_aligner.load_state_dict(state)
    return net.to(device)


def _reduce_features(
    config: Config, features: FrozenFeatures, device: torch.device
) -> tuple[NormalStatistics, ChannelReduction, list[Tensor]]:
    """Reduces the channels of the shared features and collects the statistics of the training images. The result is cached.

    Returns:
        Statistics of the training images, the reduction, and the reduced embeddings of the scoring images per batch.
    """
    density = config.density
    keys = ("layers", "map_stride_px", "smooth_layers", "reduction", "num_channels", "max_images", "kind")
    cache_settings = {key: getattr(density, key) for key in keys}
    cache_settings["coreset"] = DENSITIES[density.kind].count_coreset_channels(density)
    cache_key = f"{features.uid} {cache_settings} {device}"
    if cache_key in _reductions:
        return _reductions[cache_key]
    reduction = ChannelReduction(BACKBONES[config.model.backbone].channels, density, config.train.seed).to(device)

    def iterate_reduced_embeddings(levels: Sequence[NDArray[np.float32]], batch_size: int) -> Iterator[Tensor]:
        """Generator: yields the reduced embeddings of each batch."""
        for start in range(0, len(levels[0]), batch_size):
            # Copy: arrays in Ray's object store are read-only.
            batch = [np.array(level[start : start + batch_size]) for level in levels]
            yield reduction(tuple(torch.from_numpy(level).to(device).permute(0, 3, 1, 2) for level in batch))

    kept_positions = choose_bank_images(density, len(features.fit[0]))
    size = config.model.image_size_px // config.model.location_side_px(density.map_layer)
    thetas = (
        None if features.fit_theta is None else torch.from_numpy(np.array(features.fit_theta)).split(NUM_ROWS_PER_READ)
    )
    batches = map(
        EmbeddedBatch, iterate_reduced_embeddings(features.fit, NUM_ROWS_PER_READ), thetas or itertools.repeat(None)
    )
    statistics = compute_embedding_statistics(batches, reduction, (size, size), device, kept_positions)
    while len(_reductions) >= _MAX_REDUCTIONS:
        del _reductions[next(iter(_reductions))]
    _reductions[cache_key] = (
        statistics,
        reduction,
        list(iterate_reduced_embeddings(features.scored, SCORING_BATCH_SIZE)),
    )
    return _reductions[cache_key]


def _compute_trial_metrics(
    scored: ScoringImages, scores: NDArray[np.float32], maps: NDArray[np.float32], objective: Objective
) -> dict[str, float | None]:
    """Computes the metrics of the scoring images: metric -> value. The entry "score" is the value that ranks trials.

    The scoring images are the same for all trials of a sweep.

    Args:
        scored: The scoring images, N.
        scores: (N,) image scores.
        maps: (N, H, W) anomaly maps.
        objective: The score that the sweep maximizes.

    Raises:
        DataError: The objective cannot be measured on these images.
        FloatingPointError: A score or a map is not finite.
    """
    if not (np.isfinite(scores).all() and np.isfinite(maps).all()):
        raise FloatingPointError("the anomaly maps are not finite: lower the learning rates")
    key = get_objective_metric(objective)
    if key is None:
        return {**compute_validation_metrics(scored.masks, scores, maps)}
    masks = [mask if has_mask else None for mask, has_mask in zip(scored.masks, scored.has_mask, strict=True)]
    kinds = ["anomalous" if label else "good" for label in scored.labels]
    measured = ScoredTestImages(scored.labels, scores.astype(np.float64), masks, list(maps), 0.0)
    metrics = compute_metrics(measured, kinds, 0.0)
    score = metrics[key]
    if score is None:
        raise DataError(
            f"objective={objective} cannot be measured: good images, bad images or masks are missing among the test images: "
            "set objective=validation"
        )
    return {"score": score, **{key: metrics[key] for key in METRICS}}
