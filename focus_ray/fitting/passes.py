"""Module for computations that each take one pass over images: alignment, statistics, validation, calibration."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from focus_ray.density.bank import convert_to_bank_rows
from focus_ray.density.base import NormalStatistics
from focus_ray.density.moments import Moments
from focus_ray.density.reduction import ChannelReduction
from focus_ray.density.tiles import TileGrid, split_into_tile_maps
from focus_ray.detect.calibration import CalibrationBuilder, Method
from focus_ray.detect.detector import (
    Detector,
    ScoredImages,
    compute_scored_locations,
    embed_images,
    extract_scored_pixel_mask,
)
from focus_ray.detect.settings import CalibrationConfig
from focus_ray.distributed import all_gather_objects, all_gather_rows, compute_on_rank0_and_broadcast, get_world_size
from focus_ray.features.alignment.congealing import AlignmentReport, CongealingAligner
from focus_ray.features.network import FocusNet, convert_to_float_images
from focus_ray.fitting.projection import CachedEmbeddings
from focus_ray.fitting.selection import compute_validation_metrics


@torch.no_grad()  # not inference_mode: statistics are joined in place later
def compute_image_statistics(
    net: FocusNet,
    reduction: ChannelReduction,
    batches: Iterable[Tensor],
    device: torch.device,
    bank_images: Container[int] | None = None,
    first_image: int = 0,
    cache: CachedEmbeddings | None = None,
) -> NormalStatistics:
    """Computes the statistics of the images of all workers; the result is the same on every worker.

    Moments (count, mean and scatter) are added up batch by batch. Only the embeddings of the bank's images stay in RAM.

    Args:
        batches: this worker's images.
        bank_images: numbers, over all workers, of the images whose embeddings are stored in the bank; None: no bank.
        first_image: number, over all workers, of this worker's first image.
        cache: embeddings of some of this worker's images, computed with the same network; they are not computed again.

    Raises: ValueError: an embedding has values that are not finite.
    """
    net.eval()
    pad_batches = reduction.num_coreset_channels > 0
    tiles = TileGrid(*net.config.tile_layout)

    def embed_batch(batch: Tensor, position: int) -> tuple[Tensor, Tensor | None]:
        """Returns embedding and theta of a batch whose first image has the number `position`, from the cache where possible."""
        cached_rows = {} if cache is None else cache.row
        cached = [number for number in range(len(batch)) if position + number in cached_rows]
        if cache is None or not cached:
            return embed_images(net, reduction, convert_to_float_images(batch, device), pad_batches)
        embedding, theta = cache.project_embeddings([position + number for number in cached], reduction.projection)
        new = [number for number in range(len(batch)) if position + number not in cached_rows]
        if new:
            new_embedding, new_theta = embed_images(
                net, reduction, convert_to_float_images(batch[new], device), pad_batches
            )
            order = torch.tensor(cached + new).argsort().to(device)  # back to the order of the batch
            embedding = torch.cat([embedding, new_embedding])[order]
            theta = None if theta is None or new_theta is None else torch.cat([theta, new_theta])[order]
        return embedding, theta

    def embed_batches() -> Iterator[EmbeddedBatch]:
        """Generator: yields the embeddings, alignments and scored locations of each batch."""
        position = first_image
        for batch in batches:
            embedding, theta = embed_batch(batch, position)
            position += len(batch)
            shown = extract_scored_pixel_mask(batch, device)
            if shown is not None:
                shown = compute_scored_locations(shown, theta, tiles, embedding.shape[2:]).flatten(1)
            yield EmbeddedBatch(embedding, theta, shown)

    size = net.config.image_size_px // net.config.location_side_px(reduction.config.map_layer)
    grid = net.config.density_tile_grid
    # moments cover one tile if tiles share their locations, otherwise the whole image
    map_size = (size, size) if grid == tiles[:2] else (tiles.rows * size, tiles.columns * size)
    return compute_embedding_statistics(embed_batches(), reduction, map_size, device, bank_images, first_image, grid)


class EmbeddedBatch(NamedTuple):
    """Embeddings of B images.

    embedding: (B, C + K, H, W).
    theta: (B, 2, 3), alignment of each image; None without image alignment.
    shown: (B, L) bool, locations that are scored; None: all locations.
    """

    embedding: Tensor
    theta: Tensor | None
    shown: Tensor | None = None


@torch.no_grad()
def compute_embedding_statistics(
    batches: Iterable[EmbeddedBatch],
    reduction: ChannelReduction,
    map_size: tuple[int, int],
    device: torch.device,
    bank_images: Container[int] | None = None,
    first_image: int = 0,
    grid: tuple[int, int] = (1, 1),
) -> NormalStatistics:
    """Computes the statistics of the embeddings of all workers' images; the result is the same on every worker.

    Args:
        batches: this worker's embeddings.
        reduction: the reduction that computed the embeddings; it defines how many channels are for the coreset.
        map_size: (rows, columns) of locations of the moments.
        bank_images: numbers, over all workers, of the images whose embeddings are stored in the bank; None: no bank.
        first_image: number, over all workers, of this worker's first image.
        grid: (rows, columns) of tiles of an image that share these locations.

    Raises: ValueError: an embedding has a wrong shape or a value that is not finite.
    """
    num_channels = reduction.num_channels
    num_locations = map_size[0] * map_size[1] * grid[0] * grid[1]
    moments = Moments(*map_size, num_channels, device)
    bank_parts = [torch.empty(0, num_locations, num_channels + reduction.num_coreset_channels, dtype=torch.float16)]
    theta_parts = [torch.empty(0, 2, 3)]
    shown_parts = [torch.empty(0, num_locations, dtype=torch.uint8)]
    position = first_image
    for embedding, theta, shown in batches:
        moments.add_embeddings(split_into_tile_maps(embedding[:, :num_channels], *grid))
        chosen = [number for number in range(len(embedding)) if position + number in (bank_images or ())]
        bank_parts.append(convert_to_bank_rows(embedding[chosen]))
        if theta is not None:
            theta_parts.append(theta[chosen].float().cpu())
        if shown is not None:
            shown_parts.append(shown[chosen].byte().cpu())
        position += len(embedding)
    _sum_moments_over_workers(moments)
    if bank_images is None:
        return NormalStatistics(moments, grid=grid)
    bank, thetas, shown = (all_gather_rows(torch.cat(parts)) for parts in (bank_parts, theta_parts, shown_parts))
    return NormalStatistics(
        moments, bank, thetas if len(thetas) else None, shown=shown > 0 if len(shown) else None, grid=grid
    )


def _sum_moments_over_workers(moments: Moments) -> None:
    """Replaces this worker's moments, in place, by the moments of the images of all workers."""
    if get_world_size() == 1:
        return
    count = torch.tensor([moments.count], dtype=torch.float64, device=moments.mean.device)
    total_sum = moments.mean.double() * moments.count
    dist.all_reduce(count)
    dist.all_reduce(total_sum)
    mean = (total_sum / count).to(moments.mean.dtype)
    # scatter about the common mean = own scatter + count * outer product of the difference of the means
    difference = moments.mean - mean
    moments.scatter.baddbmm_(difference[:, :, None], difference[:, None, :], alpha=float(moments.count))
    dist.all_reduce(moments.scatter)
    moments.mean = mean
    moments.count = int(count.item())


@torch.inference_mode()
def fit_aligner(net: FocusNet, batches: Iterable[Tensor], device: torch.device, seed: int) -> AlignmentReport | None:
    """Fits the network's congealing aligner, in place, to the images of all workers, with the same result on every worker.

    Args: batches: this worker's images.

    Returns: the report; None if the network has no congealing aligner.

    Raises: ValueError: fewer than four images, or images are not square.
    """
    aligner = net.image_aligner
    if not isinstance(aligner, CongealingAligner):
        return None
    size = aligner.FINE_PX
    prepared = [aligner.standardise_images(convert_to_float_images(batch, device)).cpu() for batch in batches]
    rows = all_gather_rows(torch.cat([torch.empty(0, size, size), *prepared]))

    def fit() -> tuple[AlignmentReport, dict[str, Tensor]]:
        """Fits the aligner, in place, and returns the report and the state dict of the aligner, on the CPU."""
        report = aligner.fit(rows.to(device), seed)
        return report, {name: value.cpu() for name, value in aligner.state_dict().items()}

    report, state = compute_on_rank0_and_broadcast(fit)
    aligner.load_state_dict(state)
    return report


@torch.inference_mode()
def collect_calibration_scores(
    detector: Detector,
    batches: Iterable[Tensor],
    config: CalibrationConfig,
    method: Method,
    groups: NDArray[np.int64] | None = None,
) -> CalibrationBuilder:
    """Scores normal images that the detector's density has not seen, and joins the scores of all workers.

    Args:
        batches: this worker's images, uint8 (B, H, W, 3 or 4).
        method: calibration method, which is only stored in the result.
        groups: (N,), group number of each image of this worker's batches, in order; None: every image shows a different part.

    Returns: a builder with the scores and anomaly maps of all workers, the same on every worker.

    Raises: DataError: a score or a map is not finite, for instance because no pixel of an image is scored.
    """
    builder = CalibrationBuilder(method, config.target_fpr, config.target_pixel_fpr)
    for batch in batches:
        scored = detector(batch)
        batch_groups = None if groups is None else groups[builder.num_images : builder.num_images + len(batch)]
        builder.add(
            scored.score.cpu().numpy(),
            select_scored_pixels(scored, extract_scored_pixel_mask(batch, "cpu")),
            batch_groups,
        )
    return merge_calibration_builders(builder)


def select_scored_pixels(scored: ScoredImages, shown: Tensor | None) -> NDArray[np.float32] | list[NDArray[np.float32]]:
    """Returns the scored pixels of anomaly maps in the form that `CalibrationBuilder.add` needs.

    Args: shown: (B, H, W) bool, pixels that are scored; None: all pixels.

    Returns: whole maps (B, H, W); with `shown`, a list with the scored pixels (1, n) of each image.
    """
    maps: NDArray[np.float32] = scored.anomaly_map.cpu().numpy()
    if shown is None:
        return maps
    return [anomaly_map[is_shown][None] for anomaly_map, is_shown in zip(maps, shown.cpu().numpy(), strict=True)]


def merge_calibration_builders(builder: CalibrationBuilder) -> CalibrationBuilder:
    """Merges the calibration builders of all workers, with the same result on every worker."""
    return functools.reduce(CalibrationBuilder.merge, all_gather_objects(builder))


@torch.inference_mode()
def validate_detector(
    detector: Detector, images: NDArray[np.uint8], masks: NDArray[np.bool_], batch_size: int = 32
) -> dict[str, float]:
    """Computes the validation metrics of a detector over the images of all workers, with the same result on every worker.

    Args:
        images: (N, H, W, 3 or 4) uint8, this worker's images from `selection.make_validation_images`.
        masks: (N, H, W) bool, True at pixels of synthetic defects.
        batch_size: images per batch.

    Returns: name of a metric -> value, see `selection.compute_validation_metrics`.

    Raises: DataError: a metric cannot be computed, because there is no defect or every image has one.
    """
    batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
    scores, maps = concatenate_scores((detector(torch.from_numpy(batch)) for batch in batches), masks.shape[1:])
    return compute_validation_metrics(
        *(np.concatenate(parts) for parts in zip(*all_gather_objects((masks, scores, maps)), strict=True))
    )


def concatenate_scores(
    scored: Iterable[ScoredImages], size_px: tuple[int, ...]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Concatenates the scores (N,) and anomaly maps (N, *size_px) of several batches.

    Args:
        scored: results of a detector.
        size_px: (height, width) of the maps, for the case that there is no batch.
    """
    scores = [np.empty(0, np.float32)]
    maps = [np.empty((0, *size_px), np.float32)]
    for batch in scored:
        scores.append(batch.score.float().cpu().numpy())
        maps.append(batch.anomaly_map.float().cpu().numpy())
    return np.concatenate(scores), np.concatenate(maps)
