"""One trial of a sweep: a network fitted a category at a time and judged on images that are the same for all trials.

What no trial changes (decoded images, and features where nothing before the density differs or trains) can be handed in;
the scores are the same as without. Runs alone or on every worker of an initialised torch.distributed group. No Ray.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from focus_ray.backbone import SPECS, STRIDES
from focus_ray.config import Config
from focus_ray.dataset import read_index
from focus_ray.density import Statistics, sample_positions
from focus_ray.errors import DataError
from focus_ray.fit import MemoryShard, Run, Shard, build_detector
from focus_ray.images import decode_batch, decode_mask
from focus_ray.inspector import summarise
from focus_ray.loop import collect_scores, embedding_statistics, gather_objects, world_size
from focus_ray.model import LAYERS, ChannelReduction, FocusNet, common_frame
from focus_ray.scoring import Scored, slices, to_images
from focus_ray.search import Objective
from focus_ray.selection import DEFECTS_PER_IMAGE, validation_figures, validation_images
from focus_ray.training import decoded_rows, iter_test_records, plan_category

JUDGE_BATCH = 32
_FIGURES = {"image_auroc": "image_auroc", "pixel_auroc": "pixel_auroc", "aupro": "aupro_0.3"}


class Cut(Exception):
    """Ends a trial that is told to stop; its argument says why."""


@dataclass(frozen=True)
class Judged:
    """What trials are judged on: images (N, S, S, 3) uint8, masks (N, S, S) bool, labels (N,), and whether a mask is
    known (N,): an anomalous image without one counts in image metrics alone."""

    images: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    labels: NDArray[np.int64]
    known: NDArray[np.bool_]


@dataclass(frozen=True)
class CategoryImages:
    """The decoded images of a category: fit and validation (N, S, S, 3) uint8, and those that trials are judged on."""

    fit: NDArray[np.uint8]
    validation: NDArray[np.uint8]
    judged: Judged


@dataclass(frozen=True)
class Features:
    """What comes out of a network that no trial trains.

    fit, judged: levels of layers 1 to 3, (N, H, W, C) float32.  theta: (N, 2, 3) of the judged images, or None.
    aligner: state of the fitted image aligner, or None.  alignment: what its fit found.  uid: no other features' own.
    """

    fit: tuple[NDArray[np.float32], ...]
    judged: tuple[NDArray[np.float32], ...]
    theta: NDArray[np.float32] | None
    aligner: dict[str, NDArray[Any]] | None
    alignment: dict[str, Any] | None
    uid: str


@dataclass
class Judgement:
    """What a trial comes to on one category.

    score: None where it was cut before its end.  curve: (epoch, score), the last one the score itself.
    epochs: trained, the one it was cut in included.
    """

    category: str
    score: float | None = None
    figures: dict[str, float | None] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    epochs: int = 0
    seconds: float = 0.0
    cut: str | None = None
    alignment: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    shared: str = "nothing"


def judging_plan(config: Config, category: str, objective: Objective) -> dict[str, Any]:
    """`plan_category`, with images held out to be judged on where the objective needs them. Raises: DataError."""
    if objective == "validation":
        selection = config.selection.model_copy(update={"enabled": True})
        config = config.model_copy(update={"selection": selection})
    return plan_category(config, category)


def load_images(
    config: Config, category: str, plan: dict[str, Any], objective: Objective, size_px: int
) -> CategoryImages:
    """Reads and decodes a category, and makes the images that trials are judged on.

    Args:
        config: the base of the sweep: its size is the one at which synthetic defects are drawn.
        size_px: the trial's; the judged images are scaled to it.

    Raises: DataError: images cannot be read, or there is nothing to judge on.
    """

    def decode(rows: list[int], at: int) -> NDArray[np.uint8]:
        return np.concatenate([np.empty((0, at, at, 3), np.uint8), *decoded_rows(config.data.uri, category, rows, at)])

    reference_px = config.model.image_size_px
    if objective == "validation":
        normals = decode(plan["validation_rows"], reference_px)
        images, masks = validation_images(normals, seed=config.train.seed * 1009)
        judged = Judged(
            images, masks, np.asarray(masks.any(axis=(1, 2)), dtype=np.int64), np.ones(len(images), dtype=bool)
        )
        judged = _at_size(judged, size_px)
    else:
        judged = _test_images(config.data.uri, category, size_px)
    return CategoryImages(decode(plan["fit_rows"], size_px), decode(plan["validation_rows"], size_px), judged)


def num_bytes_of_images(config: Config, category: str, plan: dict[str, Any], objective: Objective, size_px: int) -> int:
    """What `load_images` will take."""
    rows = len(plan["fit_rows"]) + len(plan["validation_rows"])
    return (rows * 3 + num_judged(config, category, plan, objective) * 4) * size_px**2


def num_bytes_of_features(config: Config, category: str, plan: dict[str, Any], objective: Objective) -> int:
    """What `embed_images` will give."""
    size = config.model.image_size_px
    channels = SPECS[config.model.backbone].channels
    each = sum(count * (size // stride) ** 2 for count, stride in zip(channels, STRIDES, strict=True)) * 4
    return (len(plan["fit_rows"]) + num_judged(config, category, plan, objective)) * each


def num_judged(config: Config, category: str, plan: dict[str, Any], objective: Objective) -> int:
    if objective == "validation":
        return len(plan["validation_rows"]) * (1 + DEFECTS_PER_IMAGE)
    return int(read_index(config.data.uri, category, split="test").num_rows)


def features_key(config: Config, category: str) -> str | None:
    """Names the features that a trial's settings lead to; None where they are the trial's own."""
    if config.train.epochs or (config.selection.enabled and config.model.image_alignment.group != "none"):
        return None  # trained; or aligned only if the trial's density gains by it
    parts = {
        "category": category,
        "model": config.model.model_dump(mode="json"),
        "seed": config.train.seed,
        "batch_size": config.train.batch_size_per_worker,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def check_settings(config: Config) -> None:
    """What `Config` cannot know without the network. Raises: ValueError: more channels asked for than there are."""
    ChannelReduction(SPECS[config.model.backbone].channels, config.density, config.train.seed)


@torch.no_grad()
def embed_images(config: Config, images: CategoryImages, device: torch.device) -> Features:
    """Fits the image aligner and takes all images through the untrained network. Raises: as `fit.fit`."""
    run = Run(config, _shard(config, images), len(images.fit), device)
    run.align()
    run.net.eval()

    def levels_of(batches: Iterator[Tensor]) -> tuple[list[list[NDArray[np.float32]]], list[NDArray[np.float32]]]:
        parts: list[list[NDArray[np.float32]]] = [[] for _ in LAYERS]
        thetas = []
        for images in (part for batch in batches for part in slices(to_images(batch, device))):
            levels, theta = common_frame(run.net(images))
            for part, level in zip(parts, levels, strict=True):  # as they lie in memory: channels last
                part.append(level.permute(0, 2, 3, 1).float().cpu().contiguous().numpy())
            if theta is not None:
                thetas.append(theta.float().cpu().numpy())
        return parts, thetas

    fitted, _ = levels_of(iter(torch.from_numpy(images.fit).split(config.train.batch_size_per_worker)))
    judged, thetas = levels_of(iter(torch.from_numpy(images.judged.images).split(JUDGE_BATCH)))
    aligner = run.net.image_aligner
    return Features(
        tuple(np.concatenate(part) for part in fitted),
        tuple(np.concatenate(part) for part in judged),
        np.concatenate(thetas) if thetas else None,
        None if aligner is None else {name: value.cpu().numpy() for name, value in aligner.state_dict().items()},
        run.alignment,
        uuid.uuid4().hex,
    )


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
    result = Judgement(category)
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
            run = Run(
                config, shard or _shard(config, images, rank), num_images or len(images.fit), device, rank=rank, log=log
            )
            _judge_fitted(run, images.judged, objective, wrap, result, take)
    except Cut as cut:
        result.cut = str(cut)
    except (FloatingPointError, torch.linalg.LinAlgError) as error:  # values so large that no spectrum is found
        result.cut = f"diverged: {error}"
    result.seconds = time.perf_counter() - start
    return result


def _judge_fitted(
    run: Run,
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
        scored = collect_scores((detector(torch.from_numpy(batch)) for batch in batches), judged.masks.shape[1])
        scores, maps = (np.concatenate(parts) for parts in zip(*gather_objects(scored), strict=True))
        return _figures(judged, scores, maps, objective)

    def on_epoch(epoch: int, figures: dict[str, float], snapshot: Callable[[], dict[str, Any]]) -> None:
        result.epochs = epoch + 1
        if epoch + 1 < config.train.epochs:
            take(epoch + 1, judge(), False)

    try:
        run.learn(wrap, None, on_epoch)
        take(config.train.epochs, judge(), True)  # of the network that was kept, where the settings choose an epoch
    finally:
        result.alignment, result.warnings = run.alignment, run.warnings


@torch.no_grad()
def _judge_features(
    config: Config, images: CategoryImages, features: Features, objective: Objective, device: torch.device
) -> dict[str, float | None]:
    """Reduces, fits the density and scores: all that is left where the features are there."""
    net = _untrained_net(config, features, device)
    statistics, reduction, embeddings = _reduced(config, features, device)
    detector = build_detector(config, net, reduction, statistics)
    theta = None if features.theta is None else torch.from_numpy(np.array(features.theta)).to(device)

    def scored() -> Iterator[Scored]:
        at = 0
        for embedding in embeddings:
            yield detector.score_embedding(embedding, None if theta is None else theta[at : at + len(embedding)])
            at += len(embedding)

    return _figures(images.judged, *collect_scores(scored(), config.model.image_size_px), objective)


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
        net = FocusNet(config.model)
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
        reduction = ChannelReduction(SPECS[config.model.backbone].channels, density, config.train.seed).to(device)

        def embeddings(levels: Sequence[NDArray[np.float32]], batch_size: int) -> Iterator[Tensor]:
            for at in range(0, len(levels[0]), batch_size):
                batch = [np.array(level[at : at + batch_size]) for level in levels]  # a store's memory is read-only
                parts = tuple(torch.from_numpy(level).to(device).permute(0, 3, 1, 2) for level in batch)
                yield reduction(parts)

        kept = sample_positions(len(features.fit[0]), density.max_images) if density.kind == "nearest" else None
        size = config.model.image_size_px // density.map_stride_px
        batches = embeddings(features.fit, config.train.batch_size_per_worker)
        statistics = embedding_statistics(batches, size, reduction.num_channels, device, kept)
        return statistics, reduction, list(embeddings(features.judged, JUDGE_BATCH))

    leads_to = {
        key: getattr(density, key)
        for key in ("layers", "map_stride_px", "smooth_layers", "reduction", "num_channels", "max_images", "kind")
    }
    return _reductions.get(f"{features.uid} {leads_to} {device}", make)  # type: ignore[no-any-return]


def _figures(
    judged: Judged, scores: NDArray[np.float32], maps: NDArray[np.float32], objective: Objective
) -> dict[str, float | None]:
    """`score`, by which trials are ranked, and what it is made of. Raises: DataError: it cannot be measured."""
    if not (np.isfinite(scores).all() and np.isfinite(maps).all()):
        raise FloatingPointError("the anomaly maps are not finite: lower the learning rates")
    if objective == "validation":
        return {**validation_figures(judged.masks, scores, maps)}
    masks = [mask if known else None for mask, known in zip(judged.masks, judged.known, strict=True)]
    kinds = ["anomalous" if label else "good" for label in judged.labels]
    found = summarise(judged.labels.tolist(), kinds, scores.tolist(), list(maps), masks, 0.0, 0.0)
    score = found[_FIGURES[objective]]
    if score is None:
        raise DataError(
            f"objective={objective} cannot be measured: the test images lack good ones, bad ones or masks; "
            "use objective=validation"
        )
    return {"score": score, **{key: found[key] for key in ("image_auroc", "pixel_auroc", "aupro_0.3")}}


def _shard(config: Config, images: CategoryImages, rank: int = 0) -> MemoryShard:
    """A worker's share of the images."""
    world = world_size()

    def share(array: NDArray[np.uint8]) -> Tensor:
        with warnings.catch_warnings():  # a store's memory is read-only, and batches are only read
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(array[len(array) * rank // world : len(array) * (rank + 1) // world])

    return MemoryShard(
        share(images.fit),
        batch_size=config.train.batch_size_per_worker,
        validation=share(images.validation),
    )


def _at_size(judged: Judged, size_px: int) -> Judged:
    """Scaled down, so that sizes are judged on the same defects; a place is defective where any of its pixels was."""
    if judged.images.shape[1] == size_px:
        return judged
    images = torch.from_numpy(judged.images).permute(0, 3, 1, 2).float()
    scaled = F.interpolate(images, size=(size_px, size_px), mode="bilinear", antialias=True, align_corners=False)
    masks = F.adaptive_max_pool2d(torch.from_numpy(judged.masks).float()[:, None], size_px)[:, 0] > 0
    small = scaled.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return Judged(small.numpy(), masks.numpy(), judged.labels, judged.known)


def _test_images(uri: str, category: str, size_px: int) -> Judged:
    """The labelled test images. Raises: DataError: there are none."""
    images, masks, labels, known = [], [], [], []
    for record in iter_test_records(uri, category):
        images.append(decode_batch([record["image"]], size_px)[0])
        labels.append(int(record["label"]))
        known.append(record["mask"] is not None or not record["label"])
        empty = np.zeros((size_px, size_px), dtype=bool)
        masks.append(empty if record["mask"] is None else decode_mask(record["mask"], size_px, size_px))
    if not images:
        raise DataError(f"category {category!r} of {uri} has no test images: use objective=validation")
    return Judged(np.stack(images), np.stack(masks), np.array(labels), np.array(known))
