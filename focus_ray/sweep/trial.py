"""One trial of a sweep: a network fitted a category at a time and judged on images that are the same for all trials.

What no trial changes (decoded images, and features where nothing before the density differs or trains) can be handed in;
the scores are the same as without. Runs alone or on every worker of an initialised torch.distributed group. No Ray.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from focus_ray.config import Config
from focus_ray.data.shards import Shard
from focus_ray.density.base import Statistics, choose_bank_images
from focus_ray.errors import DataError
from focus_ray.evaluation.evaluate import summarise
from focus_ray.evaluation.selection import validation_figures
from focus_ray.fitting.distributed import gather_objects, world_size
from focus_ray.fitting.fit import CategoryFit, build_detector
from focus_ray.fitting.passes import EmbeddedBatch, collect_scores, compute_embedding_statistics
from focus_ray.fitting.scoring import ScoredImages
from focus_ray.fitting.state import TrainState
from focus_ray.kinds import BACKBONES, METRICS
from focus_ray.model.alignment.congealing import AlignmentReport
from focus_ray.model.backbones.base import build_meta_backbone
from focus_ray.model.network import FocusNet
from focus_ray.model.reduction import ChannelReduction
from focus_ray.sweep.settings import Objective, metric_of
from focus_ray.sweep.shared import JUDGE_BATCH, CategoryImages, Features, Judged, shard_of_images


class Cut(Exception):
    """Ends a trial that is told to stop; its argument says why."""


@dataclass
class Judgement:
    """What a trial comes to on one category.

    score: None where it was cut before its end.  curve: (epoch, score), the last one the score itself.
    epochs: trained, the one it was cut in included.  num_good, num_bad: images that the score is of.
    """

    category: str
    score: float | None = None
    num_good: int = 0
    num_bad: int = 0
    figures: dict[str, float | None] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    epochs: int = 0
    seconds: float = 0.0
    cut: str | None = None
    alignment: AlignmentReport | None = None
    warnings: list[str] = field(default_factory=list)
    shared: str = "nothing"


def judge_category(
    config: Config,
    category: str,
    images: CategoryImages,
    objective: Objective,
    device: torch.device,
    *,
    num_images: int | None = None,
    features: Features | None = None,
    rank: int = 0,
    wrap: Callable[[torch.nn.Module], Any] | None = None,
    on_score: Callable[[int, float, bool], str | None] = lambda epoch, score, final: None,
    shard: Shard | None = None,
    log: Callable[[str], None] = lambda message: None,
) -> Judgement:
    """Fits one category and judges it after every epoch.

    Args:
        num_images: training images of all workers together, where they are not in `images`.
        features: of `embed_images`, where `features_key` says that they are this trial's.
        on_score: told of every score by rank 0 (epochs trained, score, whether it is the last); gives why to stop, or
            None.
        shard: this worker's share of the images, where it is not cut from `images` (streamed training).

    A loss or a score that is not finite cuts the trial: the settings are to blame.

    Raises: DataError: too few images, or the objective cannot be measured.
    """
    num_bad = int(images.judged.labels.sum())
    result = Judgement(category, num_good=len(images.judged.labels) - num_bad, num_bad=num_bad)
    start = time.perf_counter()

    def take(epoch: int, figures: dict[str, float | None], final: bool) -> None:
        score = figures["score"]
        assert score is not None
        result.curve.append((epoch, score))
        reason = gather_objects(on_score(epoch, score, final) if rank == 0 else None)[0]
        if final:
            result.figures, result.score = figures, score
        if reason is not None:
            raise Cut(reason)

    try:
        if features is not None:
            result.alignment = features.alignment
            take(0, _judge_features(config, images, features, objective, device), True)
        else:
            run = CategoryFit(
                config,
                shard or shard_of_images(config, images, rank),
                num_images or len(images.fit),
                device,
                rank=rank,
                log=log,
            )
            _judge_fitted(run, images.judged, objective, wrap, result, take)
    except Cut as cut:
        result.cut = str(cut)
    except (FloatingPointError, torch.linalg.LinAlgError) as error:  # values so large that no spectrum is found
        result.cut = f"diverged: {error}"
    result.seconds = time.perf_counter() - start
    return result


def _judge_fitted(
    run: CategoryFit,
    judged: Judged,
    objective: Objective,
    wrap: Callable[[torch.nn.Module], Any] | None,
    result: Judgement,
    take: Callable[[int, dict[str, float | None], bool], None],
) -> None:
    """Fits as `fit` does, up to where thresholds would be set, and judges what comes out."""
    config = run.config
    mine = judged.images[slice(*(len(judged.images) * (run.rank + end) // world_size() for end in (0, 1)))]

    def judge() -> dict[str, float | None]:
        detector = build_detector(config, run.net, run.reduction, run.training_statistics())
        batches = (mine[at : at + JUDGE_BATCH] for at in range(0, len(mine), JUDGE_BATCH))
        scored = collect_scores((detector(torch.from_numpy(batch)) for batch in batches), judged.masks.shape[1:])
        scores, maps = (np.concatenate(parts) for parts in zip(*gather_objects(scored), strict=True))
        return _figures(judged, scores, maps, objective)

    def on_epoch(epoch: int, figures: dict[str, float], snapshot: Callable[[], TrainState]) -> None:
        result.epochs = epoch + 1
        if epoch + 1 < config.train.epochs:
            take(epoch + 1, judge(), False)

    try:
        run.align_and_train(wrap, None, on_epoch)
        take(config.train.epochs, judge(), True)  # of the network that was kept, where the settings choose an epoch
    finally:
        result.alignment, result.warnings = run.notes.alignment, run.notes.warnings


@torch.no_grad()
def _judge_features(
    config: Config, images: CategoryImages, features: Features, objective: Objective, device: torch.device
) -> dict[str, float | None]:
    """Reduces, fits the density and scores: all that is left where the features are there."""
    net = _untrained_net(config, features, device)
    statistics, reduction, embeddings = _reduced(config, features, device)
    detector = build_detector(config, net, reduction, statistics)
    theta = None if features.theta is None else torch.from_numpy(np.array(features.theta)).to(device)

    def scored() -> Iterator[ScoredImages]:
        at = 0
        for embedding in embeddings:
            yield detector.score_embedding(embedding, None if theta is None else theta[at : at + len(embedding)])
            at += len(embedding)

    return _figures(images.judged, *collect_scores(scored(), images.judged.masks.shape[1:]), objective)


class _Recent:
    """The last few results of a process: trials that follow one another often differ only in what comes after."""

    def __init__(self, size: int) -> None:
        self.size, self.kept = size, OrderedDict[str, Any]()

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.kept:
            self.kept[key] = make()
        self.kept.move_to_end(key)
        while len(self.kept) > self.size:
            self.kept.popitem(last=False)
        return self.kept[key]

    def clear(self) -> None:
        self.kept.clear()


_nets = _Recent(4)
_reductions = _Recent(2)


def forget() -> None:
    """Drops what this process kept of earlier trials."""
    _nets.clear()
    _reductions.clear()


def _untrained_net(config: Config, features: Features, device: torch.device) -> FocusNet:
    """Carries size and alignment; its backbone is not run."""

    def make() -> FocusNet:
        net = FocusNet(config.model, build_meta_backbone(config.model.backbone).to_empty(device="cpu"), head=False)
        if features.aligner is not None:
            assert net.image_aligner is not None
            state = {name: torch.from_numpy(np.array(value)) for name, value in features.aligner.items()}
            net.image_aligner.load_state_dict(state)
        return net.to(device)

    return _nets.get(f"{features.uid} {device}", make)  # type: ignore[no-any-return]


def _reduced(
    config: Config, features: Features, device: torch.device
) -> tuple[Statistics, ChannelReduction, list[Tensor]]:
    """Statistics of the training images, the reduction, and the reduced embeddings of the judged ones."""
    density = config.density

    def make() -> tuple[Statistics, ChannelReduction, list[Tensor]]:
        reduction = ChannelReduction(BACKBONES[config.model.backbone].channels, density, config.train.seed).to(device)

        def embeddings(levels: Sequence[NDArray[np.float32]], batch_size: int) -> Iterator[Tensor]:
            for at in range(0, len(levels[0]), batch_size):
                batch = [np.array(level[at : at + batch_size]) for level in levels]  # a store's memory is read-only
                parts = tuple(torch.from_numpy(level).to(device).permute(0, 3, 1, 2) for level in batch)
                yield reduction(parts)

        kept = choose_bank_images(density, len(features.fit[0]))
        size = config.model.image_size_px // config.model.place_px(density)
        batch_size = config.train.batch_size_per_worker
        thetas = (
            None if features.fit_theta is None else torch.from_numpy(np.array(features.fit_theta)).split(batch_size)
        )
        batches = map(EmbeddedBatch, embeddings(features.fit, batch_size), thetas or itertools.repeat(None))
        statistics = compute_embedding_statistics(batches, reduction, (size, size), device, kept)
        return statistics, reduction, list(embeddings(features.judged, JUDGE_BATCH))

    keys = ("layers", "map_stride_px", "smooth_layers", "reduction", "num_channels", "max_images", "kind")
    leads_to = {key: getattr(density, key) for key in (*keys, "keeps_coreset", "coreset_channels")}
    return _reductions.get(f"{features.uid} {leads_to} {device}", make)  # type: ignore[no-any-return]


def _figures(
    judged: Judged, scores: NDArray[np.float32], maps: NDArray[np.float32], objective: Objective
) -> dict[str, float | None]:
    """`score`, by which trials are ranked, and what it is made of. Raises: DataError: it cannot be measured."""
    if not (np.isfinite(scores).all() and np.isfinite(maps).all()):
        raise FloatingPointError("the anomaly maps are not finite: lower the learning rates")
    key = metric_of(objective)
    if key is None:
        return {**validation_figures(judged.masks, scores, maps)}
    masks = [mask if known else None for mask, known in zip(judged.masks, judged.known, strict=True)]
    kinds = ["anomalous" if label else "good" for label in judged.labels]
    found = summarise(judged.labels.tolist(), kinds, scores.tolist(), list(maps), masks, 0.0, 0.0)
    score = found[key]
    if score is None:
        raise DataError(
            f"objective={objective} cannot be measured: the test images lack good ones, bad ones or masks; "
            "use objective=validation"
        )
    return {"score": score, **{key: found[key] for key in METRICS}}
