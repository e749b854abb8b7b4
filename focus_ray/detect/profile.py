"""Module for the profile of good images: usual distances at each location, and usual highest values of their maps [ours].

The bank contains the stored embeddings of normal images; an image number is a position in the bank. A leave-one-out distance is
the distance of a normal image to a density (a model of normal embeddings) from which this image is left out.

The maximum of a map is usually at the locations where good parts vary most: a serial number, a reflection, an edge. So for the
image score, and only for it, the distance of a location is weighted by the usual distance there. The usual distance is the
largest leave-one-out distance of the bank's images at this location. Anomaly maps are not weighted, because unweighted maps
localise defects better.

A defect may be a point, or cover much of the part. So the score uses the mean of the highest values over several shares of the
map, from its maximum to its highest fifth. Each mean is divided by its typical value for good images, and the results are
averaged: a typical good image has score 1. An image in tiles has one map of all tiles, because taking the highest values of each
tile separately ranked worse (docs/use/large-images.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from focus_ray.density.base import LeaveOneOutScorer, NormalStatistics, choose_evenly_spaced
from focus_ray.detect.anomaly_map import AnomalyMapGenerator
from focus_ray.detect.settings import ScoringConfig
from focus_ray.features.alignment.theta import compute_valid_mask

MAX_IMAGES = 64  # images of the bank from which the profile is computed
SHARES = (0.0, 0.01, 0.05, 0.2)  # shares of the map's pixels with the highest values; 0 is the maximum alone
# Mean distances that are added to the distance of each location: with few good images, a location's own value is unreliable.
FLOOR = 2.0
SAMPLE_PX = 4  # the highest values are searched in every fourth row and column of the smoothed map
_IMAGES_AT_ONCE = 8


class ImageScoreProfile(NamedTuple):
    """The profile of good images, which converts distances to image scores.

    weight: (H, W) float32, factor for the distance of each location.
    typical: (len(SHARES),) float32, means of the highest values of typical good images, see `average_highest_map_values`.
    """

    weight: Tensor
    typical: Tensor

    def compute_image_scores(self, distance: Tensor, map_generator: AnomalyMapGenerator) -> Tensor:
        """Computes image scores (B,) from distances (B, H, W); a typical good image has a score of 1."""
        return (average_highest_map_values(distance * self.weight, map_generator) / self.typical).mean(dim=1)


def compute_image_scores(
    profile: ImageScoreProfile | None,
    scoring: ScoringConfig,
    distance: Tensor,
    anomaly_map: Tensor,
    map_generator: AnomalyMapGenerator,
) -> Tensor:
    """Computes image scores (B,), with the profile or, without a profile, from the highest values of the anomaly map.

    Args:
        scoring: without a profile, scoring.image_score chooses the mean of the highest percent or the maximum of the map.
        distance: (B, H, W), distances of the density.
        anomaly_map: result of `map_generator` for `distance`.
    """
    if profile is not None:
        return profile.compute_image_scores(distance, map_generator)
    if scoring.image_score == "highest_percent":
        return average_highest_map_values(distance, map_generator)[:, SHARES.index(0.01)]
    return anomaly_map.flatten(1).amax(dim=1)


def average_highest_map_values(distance: Tensor, map_generator: AnomalyMapGenerator) -> Tensor:
    """Computes means of the highest values of anomaly maps, one mean for each entry of `SHARES`.

    An entry is the share of the pixels that the mean includes; with 0, the mean is the maximum of the map.

    Args:
        distance: (B, H, W).
        map_generator: computes the anomaly maps from the distances; only every `SAMPLE_PX`-th row and column is used.

    Returns: (B, len(SHARES)).
    """
    sampled = map_generator.subsample_pixels(SAMPLE_PX)(distance).flatten(1)
    counts = [max(1, int(share * sampled.shape[1])) for share in SHARES]
    top = sampled.topk(max(counts), dim=1).values
    return torch.stack([top[:, :count].mean(dim=1) for count in counts], dim=1)


@torch.no_grad()
def fit_profile(
    density: LeaveOneOutScorer,
    statistics: NormalStatistics,
    coverage_mask: Tensor | None,
    map_generator: AnomalyMapGenerator,
) -> tuple[ImageScoreProfile, Tensor | None]:
    """Fits the profile of good images to the leave-one-out distances of at most `MAX_IMAGES` images of the bank.

    Args:
        density: leave-one-out scorer of the density.
        statistics: the statistics from which the density was built, with a bank.
        coverage_mask: (H, W) bool, locations that are scored; None: all locations.
        map_generator: computes the smoothed maps whose highest values the profile describes.

    Returns: the profile, and the leave-one-out distances (n, H, W) from which the profile was computed. If the bank has a single
        image, there is nothing to compare it with: all values of the profile are 1, and the distances are None.

    Raises: ValueError: fewer than two images would remain for a Gaussian.
    """
    bank, device = statistics.bank, map_generator.rows.device
    assert bank is not None
    if len(bank) < 2:
        weight = torch.ones(density.height, density.width, device=device)
        return ImageScoreProfile(weight, torch.ones(len(SHARES), device=device)), None
    images = torch.tensor(sorted(choose_evenly_spaced(len(bank), MAX_IMAGES)))
    distances = compute_leave_one_out_distances(density, statistics, bank, coverage_mask, images, device)
    return compute_profile_from_distances(distances, map_generator, statistics.shown), distances


@torch.no_grad()
def compute_leave_one_out_distances(
    density: LeaveOneOutScorer,
    statistics: NormalStatistics,
    bank: Tensor,
    coverage_mask: Tensor | None,
    images: Tensor,
    device: torch.device | str,
) -> Tensor:
    """Computes the leave-one-out distances of images of the bank. For each image, the image and its related images are left out.

    Args:
        density: leave-one-out scorer.
        statistics: relations, alignments and scored locations of the bank's images; the bank of the statistics is not used.
        bank: (N, L, C), embeddings of the bank's images, with the channels that the scorer needs.
        coverage_mask: (H, W) bool, locations that are scored; None: all locations.
        images: (n,), positions in the bank of the images to score.
        device: device on which distances are computed.

    Returns: (n, H, W), 0 at locations that are not scored.

    Raises: ValueError: fewer than two images would remain for a Gaussian.
    """
    distances = []
    thetas, shown = statistics.thetas, statistics.shown
    for numbers in images.split(_IMAGES_AT_ONCE) if len(images) else ():
        rows = bank[numbers].to(device, torch.float32)  # (B, L, C)
        excluded = statistics.find_images_to_exclude(numbers)
        distance = density.score(rows.transpose(1, 2).unflatten(2, (density.height, density.width)), excluded)
        if shown is not None:
            distance = distance * shown[numbers].to(device).view_as(distance)
        distances.append(
            zero_unscored_locations(distance, None if thetas is None else thetas[numbers].to(device), coverage_mask)
        )
    return torch.cat(distances) if distances else torch.empty(0, density.height, density.width, device=device)


def zero_unscored_locations(distance: Tensor, theta: Tensor | None, coverage_mask: Tensor | None) -> Tensor:
    """Returns distances that are 0 at locations outside the aligned image and at locations that few training images showed.

    Args:
        distance: (B, H, W).
        theta: (B, 2, 3), alignment of each image. Without image alignment (None), the distances are returned unchanged.
        coverage_mask: (H, W) bool, locations that enough training images showed; None: all locations.
    """
    if theta is None:
        return distance
    inside = compute_valid_mask(theta, distance.shape[1], distance.shape[2])
    return distance * (inside if coverage_mask is None else inside & coverage_mask)


def compute_profile_from_distances(
    distances: Tensor, map_generator: AnomalyMapGenerator, shown: Tensor | None = None
) -> ImageScoreProfile:
    """Computes the profile of good images from their leave-one-out distances.

    Args:
        distances: (n, H, W), n >= 1, of n good images.
        shown: (N, H * W) bool, True at locations of the bank's N images that are scored; None: all locations.
    """
    # usual distance of a location: the largest distance of all images, averaged over 3 x 3 locations
    usual = F.avg_pool2d(distances.amax(dim=0)[None, None], 3, stride=1, padding=1, count_include_pad=False)[0, 0]
    scored = usual if shown is None else usual[shown.any(dim=0).view_as(usual).to(usual.device)]
    mean = scored.mean().clamp_min(1e-12)
    # 1 at a location with the mean distance, smaller where good parts vary more
    weight = (1 + FLOOR) * mean / (usual + FLOOR * mean)
    typical = average_highest_map_values(distances * weight, map_generator).mean(dim=0).clamp_min(1e-12)
    return ImageScoreProfile(weight, typical)
