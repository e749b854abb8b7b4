"""What trials are judged on and what none of them changes: images, and features of a network that none trains."""

from __future__ import annotations

import hashlib
import json
import uuid
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from focus_ray.config import Config
from focus_ray.data.images import decode_batch, decode_mask
from focus_ray.data.read import decoded_rows, iter_test_records, read_index
from focus_ray.data.shards import MemoryShard
from focus_ray.data.split import Plan, Split, split_category
from focus_ray.errors import DataError
from focus_ray.evaluation.selection import DEFECTS_PER_IMAGE, validation_images
from focus_ray.fitting.distributed import world_size
from focus_ray.fitting.fit import CategoryFit
from focus_ray.fitting.scoring import split_for_inference, to_images
from focus_ray.kinds import BACKBONES
from focus_ray.model.alignment.congealing import AlignmentReport
from focus_ray.model.network import LAYERS, warp_to_common_frame
from focus_ray.model.reduction import ChannelReduction
from focus_ray.seeds import derived_seed
from focus_ray.sweep.settings import Objective

JUDGE_BATCH = 32


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
    """The decoded images of a category: fit and validation (N, S, S, 3) uint8, and those that trials are judged on.

    fit_groups, fit_order: (N,) group number and natural order of each fit image, as of `Plan`; None: each is its own group.
    """

    fit: NDArray[np.uint8]
    validation: NDArray[np.uint8]
    judged: Judged
    fit_groups: NDArray[np.int64] | None = None
    fit_order: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Features:
    """What comes out of a network that no trial trains.

    fit, judged: levels of layers 1 to 3, (N, H, W, C) float32.  fit_theta, theta: (N, 2, 3) of each, or None.
    aligner: state of the fitted image aligner, or None.  alignment: what its fit found.  uid: no other features' own.
    """

    fit: tuple[NDArray[np.float32], ...]
    judged: tuple[NDArray[np.float32], ...]
    fit_theta: NDArray[np.float32] | None
    theta: NDArray[np.float32] | None
    aligner: dict[str, NDArray[Any]] | None
    alignment: AlignmentReport | None
    uid: str


def judging_split(config: Config, category: str, objective: Objective) -> Split:
    """`split_category`, with images held out to be judged on where the objective needs them. Raises: DataError."""
    if objective == "validation":
        selection = config.selection.model_copy(update={"enabled": True})
        config = config.model_copy(update={"selection": selection})
    return split_category(config, category)


def load_images(config: Config, category: str, plan: Plan, objective: Objective, size_px: int) -> CategoryImages:
    """Reads and decodes a category, and makes the images that trials are judged on.

    Args:
        config: the base of the sweep: its size is the one at which synthetic defects are drawn.
        size_px: the trial's; the judged images are scaled to it.

    Raises: DataError: images cannot be read, or there is nothing to judge on.
    """

    def decode(rows: Sequence[int] | NDArray[np.int64], at: int) -> NDArray[np.uint8]:
        return np.concatenate(
            [
                np.empty((0, at, at, 3), np.uint8),
                *decoded_rows(config.data.uri, category, rows, at, version=plan.version),
            ]
        )

    reference_px = config.model.image_size_px
    if objective == "validation":
        normals = decode(plan.validation_rows, reference_px)
        images, masks = validation_images(normals, seed=derived_seed(config.train.seed, "synthetic defects", 0))
        judged = Judged(
            images, masks, np.asarray(masks.any(axis=(1, 2)), dtype=np.int64), np.ones(len(images), dtype=bool)
        )
        judged = _at_size(judged, size_px)
    else:
        judged = _test_images(config.data.uri, category, size_px)
    return CategoryImages(
        decode(plan.fit_rows, size_px),
        decode(plan.validation_rows, size_px),
        judged,
        plan.fit_groups,
        plan.fit_order,
    )


def num_bytes_of_images(config: Config, split: Split, objective: Objective, size_px: int) -> int:
    """What `load_images` will take."""
    rows = split.num_fit + split.num_validation
    return (rows * 3 + num_judged(config, split, objective) * 4) * size_px**2


def num_bytes_of_features(config: Config, split: Split, objective: Objective) -> int:
    """What `embed_images` will give."""
    size = config.model.image_size_px
    channels = BACKBONES[config.model.backbone].channels
    each = (
        sum(
            count * (size // stride) ** 2 for count, stride in zip(channels, config.model.geometry.strides, strict=True)
        )
        * 4
    )
    return (split.num_fit + num_judged(config, split, objective)) * each


def num_judged(config: Config, split: Split, objective: Objective) -> int:
    if objective == "validation":
        return split.num_validation * (1 + DEFECTS_PER_IMAGE)
    return int(read_index(config.data.uri, split.category, split="test").num_rows)


def features_key(config: Config, category: str) -> str | None:
    """Names the features that a trial's settings lead to; None where they are the trial's own."""
    if config.density.reduction == "discriminant":
        return None  # what it learns from, synthetic defects, goes through the network too
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
    """What `Config` cannot know without the network, and what a sweep cannot do.

    Raises: ValueError: more channels asked for than there are; or settings under which images are not squares scored whole.
    """
    beyond = {"model.tiling": config.model.tiling, "data.regions": config.data.regions}
    names = [name for name, value in beyond.items() if value]
    names += ["model.resize=pad"] if config.model.resize == "pad" else []
    if names:
        raise ValueError(f"a sweep does not know {', '.join(names)}: search without, then train with it")
    ChannelReduction(BACKBONES[config.model.backbone].channels, config.density, config.train.seed)


@torch.no_grad()
def embed_images(config: Config, images: CategoryImages, device: torch.device) -> Features:
    """Fits the image aligner and takes all images through the untrained network. Raises: as `fit.fit`."""
    run = CategoryFit(config, shard_of_images(config, images), len(images.fit), device)
    run.align()
    run.net.eval()

    def levels_of(batches: Iterator[Tensor]) -> tuple[list[list[NDArray[np.float32]]], list[NDArray[np.float32]]]:
        parts: list[list[NDArray[np.float32]]] = [[] for _ in LAYERS]
        thetas = []
        for images in (part for batch in batches for part in split_for_inference(to_images(batch, device))):
            levels, theta = warp_to_common_frame(run.net(images))
            for part, level in zip(parts, levels, strict=True):  # as they lie in memory: channels last
                part.append(level.permute(0, 2, 3, 1).float().cpu().contiguous().numpy())
            if theta is not None:
                thetas.append(theta.float().cpu().numpy())
        return parts, thetas

    fitted, fit_thetas = levels_of(iter(torch.from_numpy(images.fit).split(config.train.batch_size_per_worker)))
    judged, thetas = levels_of(iter(torch.from_numpy(images.judged.images).split(JUDGE_BATCH)))
    aligner = run.net.image_aligner
    return Features(
        tuple(np.concatenate(part) for part in fitted),
        tuple(np.concatenate(part) for part in judged),
        np.concatenate(fit_thetas) if fit_thetas else None,
        np.concatenate(thetas) if thetas else None,
        None if aligner is None else {name: value.cpu().numpy() for name, value in aligner.state_dict().items()},
        run.notes.alignment,
        uuid.uuid4().hex,
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


def shard_of_images(config: Config, images: CategoryImages, rank: int = 0) -> MemoryShard:
    """A worker's share of the images."""
    world = world_size()

    def bounds(count: int) -> slice:
        return slice(count * rank // world, count * (rank + 1) // world)

    def share(array: NDArray[np.uint8]) -> Tensor:
        with warnings.catch_warnings():  # a store's memory is read-only, and batches are only read
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(array[bounds(len(array))])

    own = np.arange(len(images.fit))
    groups = own if images.fit_groups is None else images.fit_groups
    order = own if images.fit_order is None else images.fit_order
    return MemoryShard(
        share(images.fit),
        batch_size=config.train.batch_size_per_worker,
        validation=share(images.validation),
        groups=groups[bounds(len(own))],
        order=order[bounds(len(own))],
    )
