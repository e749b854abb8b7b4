"""Module for leave-one-out calibration: scores each normal image as if the physical part in the image were new [ours].

The bank contains the stored embeddings of normal images; an image number is a position in the bank. A density, for instance a
memory of these embeddings, measures the distance of an image to the normal images. Leaving an image out of the density is not
enough: the profile of good images (usual distances) and a learnt projection have seen the image too, and would make its score
lower than the score of a new image. With 20 images and a target of 0.05, the realised false alarm rate was 0.2. So the distances
of the image are left out of the profile too. If there are few images, each image is also scored with a projection that was
learnt without the image's cross-validation fold.

Images that show the same part (`NormalStatistics.relations`) are left out of density, profile and projection together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from focus_ray.density.bank import convert_to_bank_rows
from focus_ray.density.base import (
    LeaveOneOutScorer,
    NormalStatistics,
    build_leave_one_out_scorer,
    choose_evenly_spaced,
    compute_leave_one_out_distances_per_projection,
)
from focus_ray.density.moments import Moments
from focus_ray.density.settings import DensityConfig
from focus_ray.density.tiles import split_into_tile_maps
from focus_ray.detect.calibration import CalibrationBuilder
from focus_ray.detect.detector import Detector, ScoredImages, compute_scored_pixels
from focus_ray.detect.profile import MAX_IMAGES, compute_leave_one_out_distances, compute_profile_from_distances
from focus_ray.distributed import compute_worker_range
from focus_ray.fitting.passes import merge_calibration_builders, select_scored_pixels
from focus_ray.fitting.projection import NUM_FOLDS, DiscriminantProjection
from focus_ray.fitting.settings import Config
from focus_ray.progress import track_progress

LeaveOneOutResult = tuple[Tensor, ScoredImages, Tensor | None]
"""Numbers (B,) of images in the bank; their scores; and the pixels (B, H, W), bool, that are scored, or None for all pixels."""

_IMAGES_AT_ONCE = 8


@torch.inference_mode()
def collect_leave_one_out_scores(
    detector: Detector,
    statistics: NormalStatistics,
    config: Config,
    projection: DiscriminantProjection | None = None,
    log: Callable[[str], None] = lambda message: None,
    images: Sequence[int] | None = None,
) -> CalibrationBuilder:
    """Scores images of the bank with a detector from which the scored image and its related images are left out.

    Each worker scores a share of the images. The scores of all workers are joined.

    Args:
        statistics: the statistics from which the detector was built. They need a bank, even if the density does not.
        projection: the projection that was learnt from the same images; None if no projection was learnt.
        log: called with each message.
        images: positions in the bank of the images to score; None scores all. It must be None for a projection with folds.

    Returns: a builder with the scores and anomaly maps, the same on every worker.

    Raises:
        ValueError: too few images would remain for the density.
        DataError: the score of an image is NaN, because no location of the image is scored.
    """
    calibration = config.calibration
    builder = CalibrationBuilder("leave_one_out", calibration.target_fpr, calibration.target_pixel_fpr)
    assert statistics.bank is not None
    if projection is not None and _can_score_by_folds(projection, len(statistics.bank)):
        assert images is None
        results = _score_with_fold_projections(detector, statistics, projection, config.density)
    else:
        scorer = build_leave_one_out_scorer(config.density, statistics, detector.density)
        results = _score_with_one_projection(detector, scorer, statistics, images)
    count = len(statistics.bank if images is None else images)
    for numbers, scored, shown in track_progress(results, "calibration", len(_get_own_share(count)), log):
        groups = None if statistics.relations is None else statistics.relations.groups[numbers].numpy()
        builder.add(scored.score.cpu().numpy(), select_scored_pixels(scored, shown), groups)
    return merge_calibration_builders(builder)


def _can_score_by_folds(projection: DiscriminantProjection, num_images: int) -> bool:
    """Returns whether the projection has folds and was learnt from as many images as the bank has."""
    embeddings = projection.embeddings
    return projection.fold_projections is not None and embeddings is not None and len(embeddings) == num_images


def _score_with_one_projection(
    detector: Detector, scorer: LeaveOneOutScorer, statistics: NormalStatistics, images: Sequence[int] | None = None
) -> Iterator[LeaveOneOutResult]:
    """Generator: yields the scores of this worker's share of the bank's images, with the detector's own projection.

    Args:
        scorer: leave-one-out scorer of the detector's density.
        images: positions in the bank of the images to score; None scores all.
    """
    bank = statistics.bank
    assert bank is not None
    device = detector.density.device
    # distances of the profile's images: taken from the fit of the profile if it was fitted in this process
    profile_images, profile_distances = torch.empty(0, dtype=torch.long), detector.profile_distances
    if detector.profile is not None:
        profile_images = torch.tensor(sorted(choose_evenly_spaced(len(bank), MAX_IMAGES)))
    if profile_distances is None:
        profile_distances = compute_leave_one_out_distances(
            scorer, statistics, bank, detector.coverage_mask, profile_images, device
        )
    profile_rows = {int(number): row for row, number in enumerate(profile_images)}
    numbers = torch.arange(len(bank)) if images is None else torch.tensor(images, dtype=torch.long)
    for part in numbers[_get_own_share(len(numbers))].split(_IMAGES_AT_ONCE):  # together, so that the bank is read once
        new = torch.tensor([int(number) for number in part if int(number) not in profile_rows], dtype=torch.long)
        new_distances = compute_leave_one_out_distances(scorer, statistics, bank, detector.coverage_mask, new, device)
        distances = {int(number): new_distances[row : row + 1] for row, number in enumerate(new)}
        for number in part.split(1):
            row = profile_rows.get(int(number))
            distance = distances[int(number)] if row is None else profile_distances[row : row + 1]
            other_distances = profile_distances[_find_unrelated_positions(statistics, number, profile_images)]
            yield _score_left_out_image(other_distances, detector, distance, statistics, number)


def _score_with_fold_projections(
    detector: Detector, statistics: NormalStatistics, projection: DiscriminantProjection, config: DensityConfig
) -> Iterator[LeaveOneOutResult]:
    """Generator: yields the scores of this worker's share of the bank's images.

    Each image is scored with a projection that was learnt without the image's fold.
    """
    bank = statistics.bank
    assert bank is not None
    assert projection.fold_of is not None
    all_images, device = torch.arange(len(bank)), detector.density.device
    projected = (_compute_projected_statistics(statistics, projection, fold, device) for fold in range(NUM_FOLDS))

    def score(scorer: LeaveOneOutScorer, rows: Tensor) -> Tensor:
        """Returns the leave-one-out distances of all images of the bank; rows: the bank's channels that the scorer compares."""
        return compute_leave_one_out_distances(scorer, statistics, rows, detector.coverage_mask, all_images, device)

    for fold, distances in enumerate(
        compute_leave_one_out_distances_per_projection(config, detector.density, projected, score)
    ):
        for image in _get_own_share(len(bank)).split(1):
            number = int(image)
            if int(projection.fold_of[number]) == fold:
                other_distances = distances[_find_unrelated_positions(statistics, image, all_images)]
                distance = distances[number : number + 1]
                yield _score_left_out_image(other_distances, detector, distance, statistics, image)


def _compute_projected_statistics(
    statistics: NormalStatistics, projection: DiscriminantProjection, fold: int, device: torch.device
) -> NormalStatistics:
    """Computes new statistics of all images with the projection that was learnt without the images of one fold."""
    assert projection.fold_projections is not None
    assert projection.embeddings is not None
    assert statistics.bank is not None
    all_moments = statistics.moments
    moments = Moments(all_moments.height, all_moments.width, all_moments.channels, device)
    rows = []
    for part in projection.embeddings.split(_IMAGES_AT_ONCE):
        embedding = torch.einsum("kc,nchw->nkhw", projection.fold_projections[fold], part.to(device, torch.float32))
        moments.add_embeddings(split_into_tile_maps(embedding, *statistics.grid))
        rows.append(convert_to_bank_rows(embedding))
    coreset_bank = statistics.bank[:, :, moments.channels :]
    return dataclasses.replace(statistics, moments=moments, bank=torch.cat([torch.cat(rows), coreset_bank], dim=2))


def _find_unrelated_positions(statistics: NormalStatistics, image: Tensor, numbers: Tensor) -> Tensor:
    """Returns the positions in `numbers` of all images except one image and its related images.

    Args:
        image: (1,), position in the bank of the image to leave out.
        numbers: (n,), positions in the bank of several images.

    Returns: (m,) int64, ascending positions in `numbers`.
    """
    excluded = statistics.find_images_to_exclude(image).view(-1)
    return (~torch.isin(numbers, excluded)).nonzero()[:, 0]


def _score_left_out_image(
    other_distances: Tensor, detector: Detector, distance: Tensor, statistics: NormalStatistics, image: Tensor
) -> LeaveOneOutResult:
    """Computes score and anomaly map of one image from the image's leave-one-out distances.

    If the detector has a profile of good images (`detect.profile`), the score is relative to the profile of the other images.
    Otherwise, the score is the maximum of the anomaly map.

    Args:
        other_distances: (n, H, W), leave-one-out distances of the other images, from which the profile is computed. If n is 0,
            the detector's profile is used instead.
        distance: (1, H, W), leave-one-out distances of the image.
        image: (1,), position of the image in the bank.
    """
    theta = None if statistics.thetas is None else statistics.thetas[image].to(distance.device)
    shown = None
    if statistics.shown is not None:
        shown = compute_scored_pixels(
            statistics.shown[image].to(distance.device).view_as(distance), theta, detector.tiles
        )
    profile = None
    if detector.profile is not None and len(other_distances):
        profile = compute_profile_from_distances(other_distances, detector.map_generator, statistics.shown)
    return image, detector.score_distances(distance, theta, profile, shown), shown


def _get_own_share(count: int) -> Tensor:
    """Returns this worker's share of the integers 0 to count - 1."""
    part = compute_worker_range(count)
    return torch.arange(part.start, part.stop)
