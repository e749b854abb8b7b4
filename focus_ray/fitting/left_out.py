"""Calibration by the images that a density was made of, each scored as if the part that it shows were new [ours].

Leaving an image's own embeddings out of a memory is exact: it is the memory of the others. Two more things have seen the image,
the profile of good images and a learnt metric, and would let it score lower than a new one does: with 20 images and a target of
0.05 the realised false alarm rate was 0.2. So its own distances are left out of the profile too; and where there are few images,
each is scored under a metric that was learnt without its fold of the images.

Images that show the same part (`Statistics.relations`) are left out together, of the memory, of the profile and of the metric.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from focus_ray.config import Config, DensityConfig
from focus_ray.density.base import LeaveOneOutScorer, Statistics, build_density, leave_one_out_scorer, sample_evenly
from focus_ray.density.checked_memory import CheckedMemory, leave_one_out_gaussian, measure_scale
from focus_ray.density.moments import Moments
from focus_ray.density.nearest import (
    JointMemory,
    NearestMemory,
    measure_typical_distances,
    subsample_coreset,
    to_bank_rows,
    unwrap_memory,
    whiten,
)
from focus_ray.density.tiles import TiledDensity, fold_bank, split_maps
from focus_ray.evaluation.calibration import CalibrationBuilder
from focus_ray.fitting.distributed import own_part
from focus_ray.fitting.metric import FOLDS, Metric
from focus_ray.fitting.passes import joined_by_all, pixels_that_count
from focus_ray.fitting.profile import IMAGES, left_out_distances, profile_of
from focus_ray.fitting.scoring import Detector, Scored, pixels_shown
from focus_ray.progress import track

LeftOut = tuple[Tensor, Scored, Tensor | None]
"""Numbers (B,) of images in the bank, their scores, and (B, H, W) bool, the pixels that count; None: all."""

_AT_ONCE = 8


@torch.inference_mode()
def leave_one_out_pass(
    detector: Detector,
    statistics: Statistics,
    config: Config,
    metric: Metric | None = None,
    log: Callable[[str], None] = lambda message: None,
    chosen: Sequence[int] | None = None,
) -> CalibrationBuilder:
    """Scores images that the detector's density was made of as if they were new, shared out over the workers; the same on all.

    Args:
        statistics: of which the detector was built; of their images those in the bank are scored, which is there for it also
            where the density needs none.
        metric: what was learnt of the same images, if it was.
        chosen: numbers of the images of the bank that are scored; None: all. Not with a metric that has folds.
    """
    calibration = config.calibration
    builder = CalibrationBuilder("leave_one_out", calibration.target_fpr, calibration.target_pixel_fpr)
    assert statistics.bank is not None
    if metric is not None and metric.folds is not None and len(statistics.bank) == _count(metric):
        assert chosen is None
        scored = _by_folds(detector, statistics, metric, config.density)
    else:
        apart = leave_one_out_scorer(config.density, statistics, detector.density)
        scored = _left_out_of_bank(detector, apart, statistics, chosen)
    count = len(statistics.bank if chosen is None else chosen)
    for own, found, shown in track(scored, "calibration", len(_mine(count)), log):
        groups = None if statistics.relations is None else statistics.relations.groups[own].numpy()
        builder.add(found.score.cpu().numpy(), pixels_that_count(found, shown), groups)
    return joined_by_all(builder)


def _count(metric: Metric) -> int:
    return 0 if metric.embeddings is None else len(metric.embeddings)


def _left_out_of_bank(
    detector: Detector, density: LeaveOneOutScorer, statistics: Statistics, chosen: Sequence[int] | None = None
) -> Iterator[LeftOut]:
    """Of this worker's part of the bank, or of the chosen images."""
    bank = statistics.bank
    assert bank is not None
    device = detector.density.device
    profiled, known = torch.empty(0, dtype=torch.long), detector.profiled
    if detector.profile is not None:
        profiled = torch.tensor(sorted(sample_evenly(len(bank), IMAGES)))
    if known is None:
        known = left_out_distances(density, statistics, bank, detector.seen, profiled, device)
    places = {int(number): place for place, number in enumerate(profiled)}
    numbers = torch.arange(len(bank)) if chosen is None else torch.tensor(chosen, dtype=torch.long)
    for part in numbers[_mine(len(numbers))].split(_AT_ONCE):  # together: the bank is read once for all of them
        new = torch.tensor([int(own) for own in part if int(own) not in places], dtype=torch.long)
        found = left_out_distances(density, statistics, bank, detector.seen, new, device)
        distances = {int(own): found[place : place + 1] for place, own in enumerate(new)}
        for own in part.split(1):
            place = places.get(int(own))
            distance = distances[int(own)] if place is None else known[place : place + 1]
            others = known[_unrelated(statistics, own, profiled)]
            yield _under_profile_of(others, detector, distance, statistics, own)


def _by_folds(detector: Detector, statistics: Statistics, metric: Metric, config: DensityConfig) -> Iterator[LeftOut]:
    """Of this worker's part of the images, under metrics that have not seen them."""
    bank = statistics.bank
    assert bank is not None
    assert metric.fold_of is not None
    density = detector.density.tile_density if isinstance(detector.density, TiledDensity) else detector.density
    everyone = torch.arange(len(bank))
    if isinstance(density, CheckedMemory):
        distances_of_folds = _checked_distances_by_folds(detector, density, statistics, metric, config)
    elif isinstance(density, (NearestMemory, JointMemory)):
        distances_of_folds = _memory_distances_by_folds(detector, density, statistics, metric)
    else:
        distances_of_folds = _rebuilt_distances_by_folds(detector, statistics, metric, config)
    for fold, distances in enumerate(distances_of_folds):
        for own in _mine(len(bank)).split(1):
            number = int(own)
            if int(metric.fold_of[number]) == fold:
                others = distances[_unrelated(statistics, own, everyone)]
                yield _under_profile_of(others, detector, distances[number : number + 1], statistics, own)


def _projected(metric: Metric, fold: int, device: torch.device) -> Iterator[Tensor]:
    """Embeddings (B, k, H, W) of all images in order, under the metric that was learnt without one fold."""
    assert metric.folds is not None
    assert metric.embeddings is not None
    for part in metric.embeddings.split(_AT_ONCE):
        yield torch.einsum("kc,nchw->nkhw", metric.folds[fold], part.to(device, torch.float32))


def _rebuilt_distances_by_folds(
    detector: Detector, statistics: Statistics, metric: Metric, config: DensityConfig
) -> Iterator[Tensor]:
    """Left-out distances (N, H, W) of all images, by a density of any kind that is built anew for each fold's metric."""
    device, bank, whole = detector.density.device, statistics.bank, statistics.moments
    assert bank is not None
    for fold in range(FOLDS):
        moments = Moments(whole.height, whole.width, whole.channels, device)
        rows = []
        for embedding in _projected(metric, fold, device):
            moments.update(split_maps(embedding, *statistics.grid))
            rows.append(to_bank_rows(embedding))
        of_fold = dataclasses.replace(statistics, moments=moments, bank=torch.cat(rows))
        density = leave_one_out_scorer(config, of_fold, build_density(config, of_fold))
        everyone = torch.arange(len(bank))
        yield left_out_distances(density, statistics, torch.cat(rows), detector.seen, everyone, device)


def _memory_distances_by_folds(
    detector: Detector, density: NearestMemory | JointMemory, statistics: Statistics, metric: Metric
) -> Iterator[Tensor]:
    """As `_rebuilt_distances_by_folds`, of a memory: its coreset knows no metric, and is not chosen anew for each fold."""
    bank, grid = statistics.bank, statistics.grid
    assert bank is not None
    device, everyone = density.device, torch.arange(len(bank))
    places = density.location_memory if isinstance(density, JointMemory) else density
    num_channels = places.bank.shape[2]

    def of_images(one: LeaveOneOutScorer) -> LeaveOneOutScorer:
        return one if grid == (1, 1) else TiledDensity(one, grid)

    def per_tile(rows: Tensor) -> Tensor:
        return fold_bank(rows, grid, places.height, places.width)

    coreset_distances: Tensor | None = None
    if isinstance(density, JointMemory):
        others = bank[:, :, num_channels:]
        coreset = of_images(_CoresetOf(density))
        coreset_distances = left_out_distances(coreset, statistics, others, detector.seen, everyone, device)
    for fold in range(FOLDS):
        rows = torch.cat([to_bank_rows(embedding) for embedding in _projected(metric, fold, device)])
        whitening = places.whitening
        kept, images = subsample_coreset(whiten(per_tile(rows), whitening), places.bank.shape[1], device)
        memory = NearestMemory(kept, whitening, places.height, places.width, places.window, places.bank.dtype, images)
        distances = left_out_distances(of_images(memory), statistics, rows, detector.seen, everyone, device)
        if isinstance(density, JointMemory):
            assert coreset_distances is not None
            both = per_tile(torch.cat([rows, bank[:, :, num_channels:]], dim=2))
            typical = measure_typical_distances(memory, density.coreset, both, statistics.per_tile.relations)
            distances = (distances / typical[0] + coreset_distances / typical[1]) / 2
        yield distances


def _checked_distances_by_folds(
    detector: Detector, density: CheckedMemory, statistics: Statistics, metric: Metric, config: DensityConfig
) -> Iterator[Tensor]:
    """As `_rebuilt_distances_by_folds`, of a checked memory: its Gaussians are fitted anew for each fold."""
    device, whole = density.device, statistics.moments
    memory_distances = _memory_distances_by_folds(detector, unwrap_memory(density), statistics, metric)
    for fold, distances in enumerate(memory_distances):
        moments = Moments(whole.height, whole.width, whole.channels, device)
        rows = []
        for embedding in _projected(metric, fold, device):
            moments.update(embedding)
            rows.append(to_bank_rows(embedding))
        of_fold = dataclasses.replace(statistics, moments=moments, bank=torch.cat(rows))
        gaussian = leave_one_out_gaussian(of_fold)
        everyone = torch.arange(len(distances))
        varied = left_out_distances(gaussian, of_fold, torch.cat(rows), detector.seen, everyone, device)
        yield torch.minimum(distances, varied * measure_scale(config, of_fold, gaussian))


def _unrelated(statistics: Statistics, own: Tensor, numbers: Tensor) -> Tensor:
    """Positions in `numbers` (n,), of images of the bank, without the image own (1,) and the images related to it."""
    left_out = statistics.images_to_exclude(own).view(-1)
    return (~torch.isin(numbers, left_out)).nonzero()[:, 0]


class _CoresetOf:
    """The coreset of a joint memory, as a density that leaves out."""

    def __init__(self, density: JointMemory) -> None:
        self.height, self.width, self.coreset = density.height, density.width, density.coreset

    def score(self, embedding: Tensor, own: Tensor) -> Tensor:
        return self.coreset.score(embedding, own)


def _under_profile_of(
    others: Tensor, detector: Detector, distance: Tensor, statistics: Statistics, own: Tensor
) -> LeftOut:
    """One image (1, H, W), number own (1,) of the bank, under the profile that the other images' distances (n, H, W) give, where
    profiles score at all."""
    theta = None if statistics.thetas is None else statistics.thetas[own].to(distance.device)
    shown = None
    if statistics.shown is not None:
        shown = pixels_shown(statistics.shown[own].to(distance.device).view_as(distance), theta, detector.tiles)
    profile = None
    if detector.profile is not None and len(others):
        profile = profile_of(others, detector.spread, statistics.shown)
    return own, detector.score_distance(distance, theta, profile, shown), shown


def _mine(count: int) -> Tensor:
    """Numbers of this worker's part of `count` images."""
    part = own_part(count)
    return torch.arange(part.start, part.stop)
