"""Module that finds images of the same physical part, and neighbours in a slowly changing sequence, without labels [ours].

Such images are related: they are left out together when any related image is scored. A lag is the difference of two ranks in the
order of file names.

Images are compared by their descriptors: features of the pretrained network, averaged over a coarse grid. Two photographs of
one part are then clearly closer to each other than to photographs of other parts. Three sources of relations are combined:

1. Groups that the user named.
2. Near-duplicates: images that are as close to each other as two photographs of one part (`measure_same_part_distance`), and
   that a gap in the sorted distances separates from all other images.
3. Sequences: if neighbours in the order of file names are closer than distant images, each block of neighbours is related.

The constants were chosen on bursts that were simulated from bottle, circuit_board, cookie and screw, and checked on six other
categories (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor

from focus_ray.density.base import NormalStatistics
from focus_ray.density.reduction import ChannelReduction
from focus_ray.density.relations import ImageRelations
from focus_ray.detect.detector import GRID, compute_descriptors, embed_images, select_descriptor_channels
from focus_ray.features.network import FocusNet, convert_to_float_images

GAP = 0.8  # an image's nearest images are its duplicates if the next image is at least 1 / GAP times as far away
# Duplicates are ignored if a smaller share of the images has duplicates. Chance pairs stayed below 0.2 in all tested categories.
# Ignoring them raises the false alarm rate by at most 1 / (1 - share), because only the scores of these images are too low.
MIN_DUPLICATE_SHARE = 0.4
MAX_GROUP_SHARE = (
    0.34  # largest share of images in one group; a larger cluster is a product variant rather than one part
)
# Two simulated photographs of one part differ by these shifts (in pixels of the model's input, down and right) and by noise.
SHIFTS_PX = ((1, 0), (0, 1), (1, 1), (2, 0), (0, 2), (1, -1), (2, 1), (1, 2))
NOISE = 2.0  # grey levels of 255, standard deviation
TOLERANCE = 1.3  # real photographs may lie this much farther apart than the median of the simulated ones
MIN_IMAGES = 4  # with fewer images, the sorted distances have no meaningful gap
MIN_SEQUENCE_IMAGES = 16
SEQUENCE_DISTANCE = 0.8  # neighbours in a sequence are closer than this share of the mean distance
PLATEAU = 0.9  # images at a lag are unrelated if their mean distance reaches this share of the overall mean
# An image leaves out its block and, on each side, at most this share of all images. A block is at most as wide as both sides
# together, so at least half of the images remain.
MAX_BLOCK_SHARE = 0.125
PERMUTATIONS = 199
SEQUENCE_LEVEL = 0.005  # of the permutation test: the smallest p-value that 199 permutations can give


class ImageGroupsAndOrder(NamedTuple):
    """Groups and order of N images, from which relations between images are derived.

    Attributes:
        groups: (N,) int64, number of the group that the user named for each image; an image without a group has its own number.
        order: (N,) int64, rank of each image in the order of file names.
        same_part_distance: result of `measure_same_part_distance`; None: near-duplicates are not searched.
    """

    groups: Tensor
    order: Tensor
    same_part_distance: float | None = None


def compute_image_descriptors(net: FocusNet, reduction: ChannelReduction, images: Tensor) -> Tensor:
    """Computes descriptors of images with the network: embeddings that are averaged over a coarse grid.

    Args: images: (N, 3, H, W) in 0..1, on the device of the network.

    Returns: (N, P, K), K channels in each of P cells.
    """
    embedding, _ = embed_images(net, reduction, images, pad_batches=True)
    return compute_descriptors(select_descriptor_channels(embedding, reduction))


def compute_bank_descriptors(statistics: NormalStatistics, reduction: ChannelReduction) -> Tensor:
    """Computes descriptors (N, GRID * GRID, K), float16, of N images from their embeddings in the bank of the statistics.

    The statistics need a bank.
    """
    bank, moments, grid = statistics.bank, statistics.moments, statistics.grid
    assert bank is not None
    size = moments.height * grid[0], moments.width * grid[1]
    first = reduction.num_channels if reduction.num_coreset_channels else 0
    parts = [torch.empty(0, GRID * GRID, bank.shape[2] - first)]
    for rows in bank[:, :, first:].split(16):  # a few images at a time bound the memory
        parts.append(compute_descriptors(rows.transpose(1, 2).unflatten(2, size)))
    return torch.cat(parts).half()


def compute_descriptor_distances(first: Tensor, second: Tensor) -> Tensor:
    """Computes the distances between two sets of descriptors: Euclidean distances of the cells, averaged over the cells.

    Args:
        first: (N, P, C), descriptors of N images: C channels in each of P cells.
        second: (M, P, C).

    Returns: (N, M), >= 0.
    """
    total = torch.zeros(len(first), len(second), device=first.device)
    for cell in range(first.shape[1]):  # one cell at a time bounds the memory at N * M
        total += torch.cdist(first[:, cell], second[:, cell])
    return total / first.shape[1]


@torch.no_grad()
def measure_same_part_distance(
    net: FocusNet, reduction: ChannelReduction, images: Tensor, device: torch.device | str
) -> float | None:
    """Measures the largest distance between descriptors at which two images may be photographs of the same physical part.

    Two photographs of each image are simulated, both with noise, the second also shifted by up to two pixels. The result is
    `TOLERANCE` times the median of their distances.

    Args: images: (N, H, W, C) uint8, a few images of the category; only the first three channels are used.

    Returns: the distance, see `compute_descriptor_distances`; None without images.
    """
    if not len(images):
        return None
    distances = []
    generator = torch.Generator().manual_seed(0)
    for number, image in enumerate(images[..., :3].float()):
        shifted = _shift_image(image, *SHIFTS_PX[number % len(SHIFTS_PX)])
        pair = torch.stack([image, shifted]) + NOISE * torch.randn(2, *image.shape, generator=generator)
        batch = convert_to_float_images(pair.clamp(0, 255).round().to(torch.uint8), device)
        descriptors = compute_image_descriptors(net, reduction, batch)
        distances.append(float(compute_descriptor_distances(descriptors[:1], descriptors[1:])))
    return TOLERANCE * float(torch.tensor(distances).median())


def _shift_image(image: Tensor, down: int, right: int) -> Tensor:
    """Shifts an image (H, W, C) by up to two pixels and repeats its border."""
    height, width = image.shape[:2]
    padded = F.pad(image.permute(2, 0, 1)[None], (2, 2, 2, 2), mode="replicate")[0].permute(1, 2, 0)
    return padded[2 - down : 2 - down + height, 2 - right : 2 - right + width]


@torch.no_grad()
def find_related_images(descriptors: Tensor, groups_and_order: ImageGroupsAndOrder) -> ImageRelations | None:
    """Finds which of N images are related, from their descriptors (N, P, C), user groups and order.

    Returns: the relations. None if no two images are related, or if an image is related to all other images, because no image
        would then remain to compare it with.
    """
    distances = compute_descriptor_distances(descriptors, descriptors).cpu()
    groups = groups_and_order.groups.cpu()
    if groups_and_order.same_part_distance is not None:
        groups = _merge_groupings(groups, group_near_duplicates(distances, groups_and_order.same_part_distance))
    return _drop_uninformative_relations(
        relate_sequence_neighbours(distances, ImageRelations.from_groups(groups), groups_and_order.order.cpu())
    )


def _drop_uninformative_relations(relations: ImageRelations) -> ImageRelations | None:
    """Returns the relations; None if no two images are related, or if at least one image is related to all others."""
    return None if relations.has_no_related_images or bool(relations.related.all(dim=1).any()) else relations


def add_duplicate_relations(statistics: NormalStatistics) -> None:
    """Adds relations between near-duplicates to the statistics, in place. Use it after banks of several sites were joined.

    Nothing happens without descriptors, `same_part_distance` or bank. The relations become None if `find_related_images` would
    return None for this reason: no two images, or one image and all others, are related.
    """
    if statistics.descriptors is None or statistics.same_part_distance is None or statistics.bank is None:
        return
    descriptors = statistics.descriptors.float()
    distances = compute_descriptor_distances(descriptors, descriptors)
    relations = statistics.relations or ImageRelations.from_groups(torch.arange(len(descriptors)))
    groups = _merge_groupings(relations.groups, group_near_duplicates(distances, statistics.same_part_distance))
    statistics.relations = _drop_uninformative_relations(
        ImageRelations(relations.related | (groups[:, None] == groups), groups)
    )


def group_near_duplicates(distances: Tensor, same_part_distance: float) -> Tensor:
    """Finds groups of near-duplicates.

    Args:
        distances: (N, N) between images.
        same_part_distance: images that are farther apart are not duplicates.

    Returns: (N,) group number of each image. With fewer than `MIN_IMAGES` images, too few duplicates, or a too large group,
        every image has its own group.
    """
    num_images = len(distances)
    single_groups = torch.arange(num_images)
    if num_images < MIN_IMAGES:
        return single_groups
    to_others = distances.clone().fill_diagonal_(torch.inf)
    nearest, numbers = to_others.sort(dim=1)
    max_duplicates = max(1, int(MAX_GROUP_SHARE * num_images))
    # ratio of the k-th to the (k + 1)-th distance: the smallest one is the widest gap, after k duplicates
    ratios = nearest[:, :max_duplicates] / nearest[:, 1 : max_duplicates + 1].clamp_min(1e-12)
    gap, gap_position = ratios.min(dim=1)
    is_before_gap = torch.arange(max_duplicates) <= gap_position[:, None]
    linked = torch.zeros(num_images, num_images, dtype=torch.bool)
    is_close = nearest[:, :max_duplicates] <= same_part_distance
    linked.scatter_(1, numbers[:, :max_duplicates], is_before_gap & (gap <= GAP)[:, None] & is_close)
    # two images are duplicates only if each is among the other's nearest images
    groups = find_connected_components(linked & linked.t())
    sizes = torch.bincount(groups, minlength=num_images)[groups]
    if float((sizes > 1).float().mean()) < MIN_DUPLICATE_SHARE or int(sizes.max()) > MAX_GROUP_SHARE * num_images + 1:
        return single_groups
    return groups


def find_connected_components(linked: Tensor) -> Tensor:
    """Returns the connected component of each node of a graph.

    Args: linked: (N, N) bool, symmetric; True where two nodes are linked.

    Returns: (N,) int64, for each node the smallest node number in its component.
    """
    labels = scipy.sparse.csgraph.connected_components(linked.numpy(), directed=False)[1]
    _, first_nodes = np.unique(labels, return_index=True)
    return torch.from_numpy(first_nodes[labels])


def _merge_groupings(first: Tensor, second: Tensor) -> Tensor:
    """Merges two groupings (N,) of the same images: images that share a group in a grouping share a group in the result."""
    return find_connected_components((first[:, None] == first) | (second[:, None] == second))


def relate_sequence_neighbours(distances: Tensor, relations: ImageRelations, order: Tensor) -> ImageRelations:
    """Relates neighbours in the order of file names if their distances show a sequence.

    Pairs that are already related, such as photographs of one part, are not used. Otherwise every burst would look like a
    sequence. A permutation test guards against chance.

    Args:
        distances: (N, N), between images.
        order: (N,), rank of each image in the order of file names.

    Returns: relations in which each image is also related to its block of neighbours and to further images on both sides of the
        block. Without a sequence, or with fewer than `MIN_SEQUENCE_IMAGES` images, the unchanged relations.
    """
    num_images = len(order)
    if num_images < MIN_SEQUENCE_IMAGES:
        return relations
    images = order.argsort()
    ordered = distances[images][:, images]
    unrelated = ~relations.related[images][:, images]
    mean = float(ordered[unrelated].mean()) if bool(unrelated.any()) else 0.0
    if mean <= 0:
        return relations

    def compute_mean_distance_at_lag(lag: int) -> float:
        """Returns the mean distance of unrelated images at a lag, as a share of the overall mean; nan if there are none."""
        values = ordered.diagonal(lag)[unrelated.diagonal(lag)]
        return float(values.mean()) / mean if len(values) else math.nan

    max_lag = max(1, int(MAX_BLOCK_SHARE * num_images))
    lags = [compute_mean_distance_at_lag(lag) for lag in range(1, max_lag + 1)]
    nearest = next((value for value in lags if not math.isnan(value)), math.nan)
    if not nearest < SEQUENCE_DISTANCE or not _is_sequence_significant(ordered, unrelated):
        return relations
    reach = next((lag for lag, value in enumerate(lags) if value >= PLATEAU), max_lag)
    # 1 - value is the similarity of images at a lag; the sum estimates how many neighbours count as one observation
    similarity = sum(1 - value for value in lags[:reach] if not math.isnan(value))
    width = max(1, round(1 + 2 * similarity))
    ranks = torch.empty_like(images)
    ranks[images] = torch.arange(num_images)
    blocks = ranks // width
    # blocked cross-validation: the images of a block leave out the block and its neighbours on both sides
    first, last = blocks * width - reach, (blocks + 1) * width - 1 + reach
    is_left_out = (ranks[None, :] >= first[:, None]) & (ranks[None, :] <= last[:, None])
    groups = _merge_groupings(relations.groups, blocks)
    if len(groups.unique()) < 2:
        groups = blocks
    return ImageRelations(relations.related | is_left_out, groups)


def _is_sequence_significant(ordered: Tensor, unrelated: Tensor) -> bool:
    """Returns whether neighbours are significantly closer than after random permutations of the order.

    Args:
        ordered: (N, N), distances between images in order.
        unrelated: (N, N) bool, pairs to use.
    """
    lag = next((lag for lag in range(1, len(ordered)) if bool(unrelated.diagonal(lag).any())), None)
    if lag is None:
        return False
    observed = ordered.diagonal(lag)[unrelated.diagonal(lag)].mean()
    generator = torch.Generator().manual_seed(0)
    num_lower = 0
    for _ in range(PERMUTATIONS):
        shuffled = torch.randperm(len(ordered), generator=generator)
        values = ordered[shuffled, shuffled.roll(lag)][unrelated[shuffled, shuffled.roll(lag)]]
        num_lower += int(len(values) > 0 and values.mean() <= observed)
    return (1 + num_lower) / (1 + PERMUTATIONS) <= SEQUENCE_LEVEL


REPEAT_SHARE = 0.2  # repeats are reported if at least this share of the test images repeats training images


class RepeatedPartFinder:
    """Finds test images that show the same part as a training image.

    Args:
        descriptors: (N, P, K), of the training images.
        same_part_distance: result of `measure_same_part_distance`.

    Attributes:
        limit: largest distance to a training image at which a test image is a repeat.
    """

    def __init__(self, descriptors: Tensor, same_part_distance: float) -> None:
        self.descriptors = descriptors
        # if a category varies little, different parts are close too: a repeat must be closer than different parts usually are
        distances = compute_descriptor_distances(descriptors, descriptors)
        to_other_parts = distances.masked_fill(distances <= same_part_distance, torch.inf).amin(dim=1)
        is_finite = to_other_parts.isfinite()
        usual = float(to_other_parts[is_finite].median()) if bool(is_finite.any()) else 0.0
        self.limit = min(same_part_distance, GAP * usual)

    def find_repeats(self, descriptors: Tensor) -> Tensor:
        """Returns which of B images show the same physical part as a training image.

        Args: descriptors: (B, P, K), of the B images.

        Returns: (B,) bool, on the CPU.
        """
        return (compute_descriptor_distances(descriptors, self.descriptors).amin(dim=1) <= self.limit).cpu()


def format_repeat_warning(num_repeats: int, num_images: int) -> str | None:
    """Returns a warning if at least one and at least `REPEAT_SHARE` of the test images repeat training images, else None."""
    if num_repeats < max(1.0, REPEAT_SHARE * num_images):
        return None
    return (
        f"{num_repeats} of {num_images} test images are almost equal to training images, as photographs of the same part are. "
        "The figures are better than new parts would give. Keep all photographs of a part on one side: ingest with --group-by."
    )
