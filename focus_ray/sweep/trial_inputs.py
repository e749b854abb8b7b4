"""The inputs that are the same for many trials of a sweep: the decoded images, and the features of the untrained network."""

from __future__ import annotations

import hashlib
import uuid
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from focus_ray.data.images import decode_batch, decode_mask
from focus_ray.data.read import NUM_ROWS_PER_READ, decode_rows, read_index, read_test_rows
from focus_ray.density.reduction import ChannelReduction
from focus_ray.detect.detector import split_batch_for_inference
from focus_ray.distributed import compute_worker_range
from focus_ray.errors import DataError
from focus_ray.features.alignment.congealing import AlignmentReport
from focus_ray.features.backbones.registry import BACKBONES
from focus_ray.features.network import convert_to_float_images, warp_features_to_common_frame
from focus_ray.fitting.fit import DetectorFitter
from focus_ray.fitting.selection import DEFECTS_PER_IMAGE, make_validation_images
from focus_ray.fitting.settings import DEFAULT_SELECTION_SHARE, Config, SelectionConfig
from focus_ray.fitting.shards import MemoryShard
from focus_ray.fitting.split import SplitPlan, SplitRule, compute_split_rule
from focus_ray.seeds import derive_seed
from focus_ray.sweep.settings import Objective

SCORING_BATCH_SIZE = 32


@dataclass(frozen=True)
class ScoringImages:
    """The images on which all trials of a sweep are scored.

    Attributes:
        images: (N, S, S, 3) uint8, N images of S x S pixels.
        masks: (N, S, S) bool, True at defective pixels.
        labels: (N,) 0 normal, 1 anomalous.
        has_mask: (N,) bool. An anomalous image without a mask counts in image metrics only.
    """

    images: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    labels: NDArray[np.int64]
    has_mask: NDArray[np.bool_]


@dataclass(frozen=True)
class CategoryImages:
    """The decoded images of a category, for training, for the choice of the training length, and for scoring trials.

    Attributes:
        fit: (N, S, S, 3) uint8, the N training images of S x S pixels.
        validation: (V, S, S, 3) uint8, the V good images that are held out for the choice of the training length.
        scored: Images on which trials are scored.
        fit_groups: (N,) group number of each training image, as in `fitting.split.SplitRows`; None: each image is its own group.
        fit_order: (N,) natural order of the training images, as in `SplitRows`.
    """

    fit: NDArray[np.uint8]
    validation: NDArray[np.uint8]
    scored: ScoringImages
    fit_groups: NDArray[np.int64] | None = None
    fit_order: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class FrozenFeatures:
    """Features (outputs of the layers) of an untrained network, computed once and shared by trials.

    Attributes:
        fit: Features of the training images: one (N, H, W, C) float32 array for each of the layers 1 to 3.
        scored: Features of the images on which trials are scored, in the same layout.
        fit_theta: (N, 2, 3) float32, alignment of each training image; None without image alignment.
        theta: (N, 2, 3) float32, alignment of each image on which trials are scored; None without image alignment.
        aligner: Name of a parameter -> value, of the fitted image aligner; None without image alignment.
        alignment: Report of the aligner's fit; None if there is none.
        uid: Unique id. Features with the same id are equal, also after a copy to another process.
    """

    fit: tuple[NDArray[np.float32], ...] = field(compare=False)
    scored: tuple[NDArray[np.float32], ...] = field(compare=False)
    fit_theta: NDArray[np.float32] | None = field(compare=False)
    theta: NDArray[np.float32] | None = field(compare=False)
    aligner: dict[str, NDArray[Any]] | None = field(compare=False)
    alignment: AlignmentReport | None = field(compare=False)
    uid: str


def split_for_scoring(config: Config, category: str, objective: Objective) -> SplitRule:
    """Divides the images of a category into images for training and for scoring trials.

    If the objective is `validation`, good images are held out for scoring; otherwise trials are scored on test images.

    Raises:
        DataError: There are too few images, or the category does not exist.
    """
    if objective == "validation":
        share = config.selection.fraction or DEFAULT_SELECTION_SHARE
        config = config.model_copy(update={"selection": SelectionConfig(fraction=share)})
    return compute_split_rule(config, category)


def load_category_images(
    config: Config, category: str, plan: SplitPlan, objective: Objective, size_px: int
) -> CategoryImages:
    """Reads and decodes the images of a category, and makes the images on which trials are scored.

    Args:
        config: Base configuration of the sweep. Synthetic defects are drawn at its image size.
        category: Category to read.
        plan: Row numbers of the training and validation images.
        objective: The score that the sweep maximizes.
        size_px: Image size of the trial; the images for scoring are scaled to it.

    Raises:
        DataError: Images cannot be read, or there are no images for scoring.
    """

    def decode_at_size(rows: Sequence[int] | NDArray[np.int64], decode_size_px: int) -> NDArray[np.uint8]:
        """Returns the decoded images of some rows, (N, S, S, 3) uint8, where S is `decode_size_px`."""
        batches = decode_rows(config.data.uri, category, rows, decode_size_px, version=plan.version)
        return np.concatenate([np.empty((0, decode_size_px, decode_size_px, 3), np.uint8), *batches])

    if objective == "validation":
        normals = decode_at_size(plan.validation.rows, config.model.image_size_px)
        images, masks = make_validation_images(normals, seed=derive_seed(config.train.seed, "synthetic defects", 0))
        labels = np.asarray(masks.any(axis=(1, 2)), dtype=np.int64)
        images, masks = _downscale_images_and_masks(images, masks, size_px)
        scored = ScoringImages(images, masks, labels, np.ones(len(images), dtype=bool))
    else:
        scored = _read_test_images(config.data.uri, category, size_px)
    fit, validation = decode_at_size(plan.fit.rows, size_px), decode_at_size(plan.validation.rows, size_px)
    return CategoryImages(fit, validation, scored, plan.fit.groups, plan.fit.order)


def compute_image_bytes(config: Config, split: SplitRule, objective: Objective, size_px: int) -> int:
    """Returns how many bytes of RAM the images of `load_category_images` need, without labels and groups."""
    rows = split.num_fit + split.num_validation
    return (rows * 3 + count_scoring_images(config, split, objective) * 4) * size_px**2


def compute_feature_bytes(config: Config, split: SplitRule, objective: Objective) -> int:
    """Returns how many bytes of RAM the features of `compute_frozen_features` need, without alignments."""
    size = config.model.image_size_px
    spec = BACKBONES[config.model.backbone]
    bytes_per_image = (
        sum(count * (size // stride) ** 2 for count, stride in zip(spec.channels, spec.strides, strict=True)) * 4
    )
    return (split.num_fit + count_scoring_images(config, split, objective)) * bytes_per_image


def count_scoring_images(config: Config, split: SplitRule, objective: Objective) -> int:
    """Returns the number of images on which the trials of a category are scored.

    Raises: DataError: the data set or category does not exist.
    """
    if objective == "validation":
        return split.num_validation * (1 + DEFECTS_PER_IMAGE)
    return int(read_index(config.data.uri, split.category, split="test").num_rows)


def make_features_key(config: Config, category: str) -> str | None:
    """Returns the key of the shared features of a trial. Trials with equal network and category have the same key.

    Returns None if the trial cannot share features, because it trains the network or chooses the alignment itself, or because it
    also needs the features of synthetic defects.
    """
    if config.density.reduction == "discriminant":
        return None  # it also needs the features of synthetic defects
    if config.train.steps or (config.selection.enabled and config.model.image_alignment.group != "none"):
        return None  # the network is trained, or the density of the trial decides on the alignment
    parts = [category, config.model.model_dump_json(), config.train.seed]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def check_trial_settings(config: Config) -> None:
    """Checks that a sweep supports the settings of a trial, and that the network has enough channels for them.

    Raises:
        ValueError: The network has fewer channels than the settings require, or images would not be scored as whole squares.
    """
    unsupported = {"model.tiling": config.model.tiling, "data.regions": config.data.regions}
    names = [name for name, value in unsupported.items() if value]
    names += ["model.resize=pad"] if config.model.resize == "pad" else []
    if names:
        raise ValueError(
            f"a sweep does not support {', '.join(names)}: search without this setting, then train with it"
        )
    ChannelReduction(BACKBONES[config.model.backbone].channels, config.density, config.train.seed)


@torch.no_grad()
def compute_frozen_features(config: Config, images: CategoryImages, device: torch.device) -> FrozenFeatures:
    """Fits the image aligner, runs all images of a category through the untrained network, and returns its features.

    Args:
        config: Configuration of the trials.
        images: Decoded images of the category.
        device: Device to compute on.

    Raises:
        DataError: The images cannot be aligned, for the reasons of `fitting.fit.fit`.
    """
    run = DetectorFitter(config, make_worker_shard(images), len(images.fit), device)
    run.fit_image_aligner()
    run.net.eval()

    def compute_features(
        batches: Iterable[Tensor],
    ) -> tuple[tuple[NDArray[np.float32], ...], NDArray[np.float32] | None]:
        """Returns the feature maps of each layer, and the alignment of each image (None without alignment)."""
        maps, thetas = [], []
        for part in (
            part for batch in batches for part in split_batch_for_inference(convert_to_float_images(batch, device))
        ):
            levels, theta = warp_features_to_common_frame(run.net(part))
            # Stored channels last, the layout in memory.
            maps.append([level.permute(0, 2, 3, 1).float().cpu().contiguous().numpy() for level in levels])
            if theta is not None:
                thetas.append(theta.float().cpu().numpy())
        return tuple(map(np.concatenate, zip(*maps, strict=True))), np.concatenate(thetas) if thetas else None

    fit, fit_theta = compute_features(torch.from_numpy(images.fit).split(NUM_ROWS_PER_READ))
    scored, theta = compute_features(torch.from_numpy(images.scored.images).split(SCORING_BATCH_SIZE))
    aligner = run.net.image_aligner
    state = None if aligner is None else {name: value.cpu().numpy() for name, value in aligner.state_dict().items()}
    return FrozenFeatures(fit, scored, fit_theta, theta, state, run.notes.alignment, uuid.uuid4().hex)


def _downscale_images_and_masks(
    images: NDArray[np.uint8], masks: NDArray[np.bool_], size_px: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Scales images and masks down to another size, so that all image sizes are scored on the same defects.

    A pixel of the smaller mask is defective if any of its original pixels is defective.

    Args:
        images: (N, S, S, 3) uint8.
        masks: (N, S, S) bool.
        size_px: side of the result, at most S.
    """
    if images.shape[1] == size_px:
        return images, masks
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    scaled = F.interpolate(planes, size=(size_px, size_px), mode="bilinear", antialias=True, align_corners=False)
    small = scaled.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    small_masks = F.adaptive_max_pool2d(torch.from_numpy(masks).float()[:, None], size_px)[:, 0] > 0
    return small.numpy(), small_masks.numpy()


def _read_test_images(uri: str, category: str, size_px: int) -> ScoringImages:
    """Reads the labelled test images of a category.

    Raises:
        DataError: The category has no test images, or an image or mask cannot be read.
    """
    records = list(read_test_rows(uri, category))
    if not records:
        raise DataError(f"category {category!r} of {uri} has no test images: set objective=validation")
    empty = np.zeros((size_px, size_px), dtype=bool)
    return ScoringImages(
        decode_batch([record["image"] for record in records], size_px),
        np.stack([decode_mask(r["mask"], size_px, size_px) if r["mask"] is not None else empty for r in records]),
        np.array([int(record["label"]) for record in records]),
        np.array([record["mask"] is not None or not record["label"] for record in records]),
    )


def take_worker_rows(array: NDArray[Any]) -> NDArray[Any]:
    """Returns the contiguous rows of an array that belong to this worker of the torch.distributed group; all without a group."""
    rows = compute_worker_range(len(array))
    return array[rows.start : rows.stop]


def make_worker_shard(images: CategoryImages) -> MemoryShard:
    """Returns the training and validation images of this worker: a contiguous part of each.

    Args:
        images: All images of the category.
    """
    row_numbers = np.arange(len(images.fit))
    with warnings.catch_warnings():  # arrays in Ray's object store are read-only; batches are never written
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return MemoryShard(
            torch.from_numpy(take_worker_rows(images.fit)),
            validation=torch.from_numpy(take_worker_rows(images.validation)),
            groups=take_worker_rows(row_numbers if images.fit_groups is None else images.fit_groups),
            order=take_worker_rows(row_numbers if images.fit_order is None else images.fit_order),
        )
