"""Module for the detector, which computes anomaly maps and scores of images.

A detector has a network, a channel reduction and a density (a model of normal embeddings). The aligned frame is the coordinate
system of an image after image alignment; without alignment it is the image itself. A location is a cell of the feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from focus_ray.density.base import Density
from focus_ray.density.reduction import ChannelReduction
from focus_ray.density.tiles import TileGrid
from focus_ray.detect.anomaly_map import AnomalyMapGenerator
from focus_ray.detect.profile import ImageScoreProfile, compute_image_scores, zero_unscored_locations
from focus_ray.detect.settings import ScoringConfig
from focus_ray.features.alignment.theta import invert_theta, warp_images
from focus_ray.features.network import (
    AlignedFeatures,
    FocusNet,
    compute_training_coverage_mask,
    convert_to_float_images,
    warp_features_to_common_frame,
)

# Images per forward pass on a CPU: ResNet-18 at 224 px takes 5.8 ms per image in batches of 4 to 8, 7.1 ms in batches of 16, and
# 7.8 ms in batches of 32 (two cores of an EPYC with 32 MiB of cache).
SMOOTHING_SIGMA_PX = 4.0  # of the Gaussian that smooths the map, in pixels of the network's input [kin]
_CPU_IMAGES = 8
_GPU_PADDED_IMAGES = 32  # images per forward pass on a GPU if batches are padded to a fixed size
_GPU_IMAGES = 256  # largest batch on a GPU: bounds the memory of a batch of many tiles


class ScoredImages(NamedTuple):
    """Scores and anomaly maps of B images. If no location of an image can be inspected, the score is nan and the map is 0.

    score: (B,), maximum or highest percent of the map [kin], or score relative to the profile of good images.
    anomaly_map: (B, H, W), anomaly of each pixel of the input images.
    descriptors: (B, P, K), coarse features of the images, see `compute_descriptors`; None unless they were requested.
    """

    score: Tensor
    anomaly_map: Tensor
    descriptors: Tensor | None = None


class Detector:
    """Computes scores and anomaly maps of images, without files, thresholds or Ray.

    Attributes:
        profile: usual distances of good images, for image scores (`detect.profile`); None: the score is the maximum of the map.
        profile_distances: (n, H, W), leave-one-out distances from which the profile was fitted; None without a profile, for a
            profile of a single image, and for a detector from a bundle.
        coverage_mask: (H, W) bool, locations that enough training images showed; None: all locations.
        map_generator: computes anomaly maps from distances.
    """

    def __init__(
        self,
        net: FocusNet,
        reduction: ChannelReduction,
        density: Density,
        scoring: ScoringConfig,
        profile: ImageScoreProfile | None = None,
    ) -> None:
        self.profile = profile
        self.profile_distances: Tensor | None = None
        self.net, self.reduction, self.density, self.scoring = net.eval(), reduction.eval(), density, scoring
        self.coverage_mask = compute_training_coverage_mask(net, density.height, density.width)
        self.tiles = TileGrid(*net.config.tile_layout)
        locations_per_side = density.height // self.tiles.rows
        self.map_generator = AnomalyMapGenerator.build_for_tiles(
            self.tiles, locations_per_side, SMOOTHING_SIGMA_PX, density.device
        )

    @torch.inference_mode()
    def __call__(self, images: Tensor, describe: bool = False) -> ScoredImages:
        """Scores a batch of images that have been resized to the input size.

        Args:
            images: uint8 (B, H, W, 3 or 4), where a fourth channel is above 0 at pixels that are scored; or float (B, 3, H, W)
                in 0..1. Without a fourth channel, all pixels are scored.
            describe: also return descriptors.
        """
        device = self.density.device
        embedding, theta = embed_images(self.net, self.reduction, convert_to_float_images(images, device))
        scored = self.score_embeddings(embedding, theta, extract_scored_pixel_mask(images, device))
        if not describe:
            return scored
        return scored._replace(descriptors=compute_descriptors(select_descriptor_channels(embedding, self.reduction)))

    @torch.inference_mode()
    def score_embeddings(self, embedding: Tensor, theta: Tensor | None, shown: Tensor | None = None) -> ScoredImages:
        """Scores the embeddings of B images.

        Args:
            embedding: (B, C + K, H, W), in the aligned frame, from `embed_images`.
            theta: (B, 2, 3), alignment of each image; None without image alignment.
            shown: (B, H, W) bool, pixels of the input images that are scored, from `extract_scored_pixel_mask`; None: all pixels.
        """
        distance = self.density.score(embedding)
        inspected = torch.ones_like(distance)
        if shown is not None:
            inspected = compute_scored_locations(shown, theta, self.tiles, distance.shape[1:]).to(distance.dtype)
        scored = self.score_distances(distance * inspected, theta, shown=shown)
        inspected = zero_unscored_locations(inspected, theta, self.coverage_mask)
        return scored._replace(score=set_nan_if_uninspected(scored.score, inspected))

    @torch.inference_mode()
    def score_distances(
        self,
        distance: Tensor,
        theta: Tensor | None,
        profile: ImageScoreProfile | None = None,
        shown: Tensor | None = None,
    ) -> ScoredImages:
        """Computes scores and anomaly maps from the distances (B, H, W) of a density in the aligned frame.

        Args:
            theta: (B, 2, 3), alignment of each image; None without image alignment.
            profile: used for image scores instead of the detector's profile; None: the detector's profile.
            shown: (B, H, W) bool; the map is set to 0 where it is False. It does not change the score: the caller has already
                set the distances there to 0. None: all pixels.
        """
        profile = profile or self.profile
        # pixels outside the image are invented by padding, and the density has not learnt locations that training rarely showed
        distance = zero_unscored_locations(distance, theta, self.coverage_mask)
        aligned_map = self.map_generator(distance)
        score = compute_image_scores(profile, self.scoring, distance, aligned_map, self.map_generator)
        if theta is not None:
            aligned_map = warp_images(aligned_map[:, None], invert_theta(theta), "zeros")[:, 0]
        return ScoredImages(score, aligned_map if shown is None else aligned_map * shown)


def set_nan_if_uninspected(score: Tensor, inspected: Tensor) -> Tensor:
    """Returns scores (B,) in which images without any inspected location have nan, so that they do not count as normal.

    Args: inspected: (B, H, W), 1 at inspected locations, otherwise 0.
    """
    return torch.where(inspected.flatten(1).amax(dim=1) > 0, score, float("nan"))


def can_share_backbone_pass(first: Detector, second: Detector) -> bool:
    """Returns whether one forward pass of the backbone can compute the features of both detectors.

    This needs the same backbone object, the same compiled function, the same input size, and no alignment between the layers.
    """
    nets = first.net, second.net
    return (
        nets[0].backbone is nets[1].backbone
        and nets[0].compiled is nets[1].compiled
        and not any(len(net.feature_aligners) for net in nets)
        and nets[0].config.image_size_px == nets[1].config.image_size_px
    )


@torch.inference_mode()
def score_with_shared_backbone(parts: Sequence[tuple[Detector, Tensor]]) -> list[ScoredImages]:
    """Scores images of several categories in one pass through their common backbone.

    Each detector aligns its images before the pass, and scores the features after the pass. Each detector alone gives the same
    results, up to rounding.

    Args:
        parts: (detector, images) of each category; see `Detector.__call__` for the images. The detectors pairwise satisfy
            `can_share_backbone_pass`.

    Returns: the result of each detector, in the same order, without descriptors.
    """
    if len(parts) == 1:
        return [parts[0][0](parts[0][1])]
    assert all(can_share_backbone_pass(parts[0][0], detector) for detector, _ in parts)
    aligned = [
        detector.net.align_images(detector.tiles.cut_images(convert_to_float_images(images, detector.density.device)))
        for detector, images in parts
    ]
    net = parts[0][0].net
    all_tiles = torch.cat([image for image, _ in aligned])
    passes = [net.compute_features(part) for part in split_batch_for_inference(all_tiles)]
    levels = [torch.cat(level) for level in zip(*(part_levels for part_levels, _ in passes), strict=True)]
    _, no_thetas = passes[0]  # there are no feature aligners
    levels_by_part = zip(*(level.split([len(image) for image, _ in aligned]) for level in levels), strict=True)
    scores = []
    for (detector, images), part_levels, (image, theta) in zip(parts, levels_by_part, aligned, strict=True):
        common_levels, theta = warp_features_to_common_frame(AlignedFeatures(part_levels, no_thetas, image, theta))
        embedding = detector.tiles.join_tile_maps(detector.reduction(common_levels))
        scores.append(
            detector.score_embeddings(embedding, theta, extract_scored_pixel_mask(images, detector.density.device))
        )
    return scores


def extract_scored_pixel_mask(batch: Tensor, device: torch.device | str) -> Tensor | None:
    """Returns which pixels of a batch are scored: the pixels whose fourth channel is above 0 (`data.framing`).

    Args: batch: uint8 (B, H, W, 3 or 4), or float (B, 3, H, W).

    Returns: (B, H, W) bool. None if the batch is float or has no fourth channel; all pixels are then scored.
    """
    if batch.dtype != torch.uint8 or batch.shape[3] < 4:
        return None
    return batch[..., 3].to(device) > 0


def compute_scored_pixels(locations: Tensor, theta: Tensor | None, tiles: TileGrid) -> Tensor:
    """Computes which pixels of the input images are scored from the locations that are scored.

    This is an approximate inverse of `compute_scored_locations`. It is needed for images of the bank (the stored embeddings of
    normal images), for which only the scored locations are stored.

    Args:
        locations: (B, h, w) bool, locations of the aligned frame that are scored.
        theta: (B, 2, 3), alignment of each image; None without image alignment.
        tiles: grid of tiles of an image.

    Returns: (B, H, W) bool.
    """
    map_generator = AnomalyMapGenerator.build_for_tiles(tiles, locations.shape[1] // tiles.rows, 0.0, locations.device)
    pixels = map_generator(locations.float())
    return (pixels if theta is None else warp_images(pixels[:, None], invert_theta(theta), "zeros")[:, 0]) >= 0.5


def compute_scored_locations(shown: Tensor, theta: Tensor | None, tiles: TileGrid, size: Sequence[int]) -> Tensor:
    """Computes which locations of the aligned frame are scored: those with at least half of their pixels scored.

    Args:
        shown: (B, H, W) bool, pixels of the input images that are scored.
        theta: (B, 2, 3), alignment of each image; None without image alignment.
        tiles: grid of tiles of an image.
        size: (rows, columns) of locations of all tiles together.

    Returns: (B, *size) bool.
    """
    pixels = shown[:, None].float()
    if theta is not None:
        pixels = warp_images(pixels, theta, "zeros")
    shares = F.adaptive_avg_pool2d(tiles.cut_images(pixels), (size[0] // tiles.rows, size[1] // tiles.columns))
    return tiles.join_tile_maps(shares)[:, 0] >= 0.5


def embed_images(
    net: FocusNet, reduction: ChannelReduction, images: Tensor, pad_batches: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Computes embeddings of whole images in the aligned frame, for inference.

    Args:
        images: (B, 3, H, W) in 0..1.
        pad_batches: see `embed_tiles`.

    Returns: embedding (B, C + K, H/stride, W/stride), with the maps of tiles side by side; theta (B, 2, 3), or None without
        image alignment.
    """
    tiles = TileGrid(*net.config.tile_layout)
    embedding, theta = embed_tiles(net, reduction, tiles.cut_images(images), pad_batches)
    return tiles.join_tile_maps(embedding), theta


def embed_tiles(
    net: FocusNet, reduction: ChannelReduction, images: Tensor, pad_batches: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Computes embeddings of single tiles, or of images without tiles, in the aligned frame, for inference.

    Args:
        images: (B, 3, S, S) in 0..1, of the network's input size S.
        pad_batches: True: pad every batch to a fixed size. Rounding depends on the batch size, and choices such as a nearest
            neighbour or a coreset depend on rounding. With a fixed size, the choices do not depend on the number of workers.

    Returns: embedding (B, C + K, S/stride, S/stride); theta (B, 2, 3), or None without image alignment.
    """
    embeddings: list[Tensor] = []
    thetas: list[Tensor] = []
    batch_size = _CPU_IMAGES if images.device.type == "cpu" else _GPU_PADDED_IMAGES
    for part in images.split(batch_size) if pad_batches else split_batch_for_inference(images):
        count = len(part)
        if pad_batches and count < batch_size:
            part = torch.cat([part, part[:1].expand(batch_size - count, *part.shape[1:])])
        levels, theta = warp_features_to_common_frame(net(part))
        embeddings.append(reduction(levels)[:count])
        if theta is not None:
            thetas.append(theta[:count])
    return _concatenate_tensors(embeddings), _concatenate_tensors(thetas) if thetas else None


GRID = 8  # cells of a descriptor along each side; a shift by a few pixels hardly changes the average over a cell


def compute_descriptors(embedding: Tensor) -> Tensor:
    """Computes descriptors of images from embeddings (N, C, H, W): averages over the cells of a coarse grid.

    Returns: (N, GRID * GRID, C) float32.
    """
    return F.adaptive_avg_pool2d(embedding.float(), GRID).flatten(2).transpose(1, 2).contiguous()


def select_descriptor_channels(embedding: Tensor, reduction: ChannelReduction) -> Tensor:
    """Returns the channels of an embedding (N, C + K, H, W) from which descriptors are computed.

    Returns: (N, K, H, W), the channels for the coreset, which do not depend on a learnt projection. If the density has no
        coreset (K is 0), all channels (N, C, H, W).
    """
    return embedding[:, reduction.num_channels :] if reduction.num_coreset_channels else embedding


def split_batch_for_inference(images: Tensor) -> tuple[Tensor, ...]:
    """Splits a batch for inference: small parts on a CPU, so that activations stay in the CPU cache; large parts on a GPU."""
    return images.split(_CPU_IMAGES if images.device.type == "cpu" else _GPU_IMAGES)


def _concatenate_tensors(parts: list[Tensor]) -> Tensor:
    """Concatenates tensors; returns a single tensor without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
