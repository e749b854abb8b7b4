"""Module that learns the discriminant projection [ours], which maps embeddings to fewer channels.

It finds directions in which defects differ much from normal patches, while normal patches differ little from each other. For
each patch of a normal image, the nearest neighbour is searched around the same location in the other normal images. The
difference of the two embeddings is the residual. It shows how normal patches differ from each other. The residual of a patch
with a synthetic defect shows how a defective patch differs. Two scatter matrices are computed, `Sn` of normal and `Sd` of
defective residuals. The generalised eigenproblem `Sd v = lambda Sn v` gives directions v, ordered by lambda: the variance of
defective residuals divided by the variance of normal residuals (Fisher's discriminant, on differences). Each direction is scaled
by sqrt(log lambda). To first order, a likelihood ratio of two zero-mean Gaussians gives this weight to the direction.

Real defects differ from synthetic ones. So only half of the channels are learnt directions. The other half is a random
projection that is whitened by the normal covariance and prefers no kind of defect. Both halves are scaled to the same mean
square of normal residuals.

Both scatter matrices are sums over images. Each worker sums over its own images, and one all-reduce adds the sums, so the result
does not depend on the number of workers, up to rounding. There is no gradient descent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from focus_ray.defects import SegmentedImage, draw_defective_copies, merge_defective_copies, segment_images
from focus_ray.density.base import choose_evenly_spaced
from focus_ray.density.nearest import compute_whitening_matrix
from focus_ray.density.reduction import ChannelReduction
from focus_ray.density.relations import ImageRelations, assign_folds
from focus_ray.density.settings import DensityConfig
from focus_ray.density.tiles import TileGrid
from focus_ray.detect.detector import compute_descriptors, compute_scored_locations, embed_tiles
from focus_ray.distributed import all_gather_rows, compute_worker_range, get_world_size
from focus_ray.features.alignment.theta import warp_images
from focus_ray.features.network import FocusNet, convert_to_float_images
from focus_ray.fitting.duplicates import ImageGroupsAndOrder, find_related_images
from focus_ray.progress import track_progress
from focus_ray.seeds import derive_seed

MAX_NEIGHBOURS = 64  # images (or tiles, if images have tiles) among which nearest neighbours are searched
MIN_TILED_IMAGES = 32  # take tiles from at least this many images
MAX_QUERIES = 32  # images whose residuals are computed if there are more images than `MAX_NEIGHBOURS`
NUM_DEFECTS = 192  # approximate number of synthetic defects, 3 to 8 per image
RIDGE = 0.5  # added to the diagonal of Sn, as a share of its mean
SEARCH_RIDGE = 2.0  # added to the diagonal of the covariance for the neighbour search, as a share of its mean
WHITENED_SHARE = 0.5  # share of channels that are a whitened random projection, for defects unlike the synthetic ones
NUM_FOLDS = 5  # of images; each fold is calibrated with a projection that has not seen it
_IMAGES_AT_ONCE = 8
_IMAGES_AT_ONCE_FP32 = 16  # images whose features of all channels are in memory in float32 at the same time
COVERED_SHARE = 0.5  # a location counts as defective if a defect covers a larger share of its area


class DiscriminantProjection(NamedTuple):
    """The learnt projection from C to k channels, and data for the calibration.

    projection: (k, C) float32, for `ChannelReduction.projection`; a learnt row is 0 if lambda of this direction is at most 1.
    scatters: (2, C, C) float32, scatter per patch of normal and of defective residuals. The defective scatter is 0 if the
        directions come from other categories (a shared metric).
    fold_projections: (NUM_FOLDS, k, C), projections that were learnt without the images of each cross-validation fold; None if
        they were not computed.
    embeddings: (N, C, H, W) float16 on the CPU, embeddings of all whole images; None without `fold_projections`.
    cache: embeddings of this worker's images, so that the network need not compute them again for the statistics.
    fold_of: (N,) int64, fold of each image; images of one physical part are in one fold. None without `fold_projections`.
    """

    projection: Tensor
    scatters: Tensor
    fold_projections: Tensor | None = None
    embeddings: Tensor | None = None
    cache: CachedEmbeddings | None = None
    fold_of: Tensor | None = None


class CachedEmbeddings(NamedTuple):
    """Embeddings of n images, before the projection.

    row: image number (over all workers) -> row of the image in the tensors.
    full: (n, C, H, W) float16 on the CPU, all channels of whole images.
    coreset: (n, K, H, W) float16 on the CPU, channels for the coreset.
    thetas: (n, 2, 3), alignment of each image; None without image alignment.
    """

    row: dict[int, int]
    full: Tensor
    coreset: Tensor
    thetas: Tensor | None

    def project_embeddings(self, numbers: Sequence[int], projection: Tensor) -> tuple[Tensor, Tensor | None]:
        """Projects the cached embeddings of B images, as `detector.embed_images` does, up to the rounding of float16.

        Args:
            numbers: B image numbers, keys of `row`.
            projection: (k, C), on the device on which the result is computed.

        Returns: embedding (B, k + K, H, W); theta (B, 2, 3), or None.
        """
        rows, device = [self.row[number] for number in numbers], projection.device
        projected = F.conv2d(self.full[rows].to(device, torch.float32), projection[:, :, None, None])
        embedding = torch.cat([projected, self.coreset[rows].to(device, torch.float32)], dim=1)
        return embedding, None if self.thetas is None else self.thetas[rows].to(device)


def build_reduction_with_all_channels(reduction: ChannelReduction, channels: tuple[int, ...]) -> ChannelReduction:
    """Builds a channel reduction that keeps all channels of the used layers of the backbone.

    Args:
        reduction: the reduction whose other settings and projection for the coreset are copied.
        channels: numbers of channels of layers 1 to 3.
    """
    full_reduction = ChannelReduction(channels, reduction.config.model_copy(update={"reduction": "none"}), 0)
    if full_reduction.num_coreset_channels:
        full_reduction.coreset_projection.copy_(reduction.coreset_projection)
    return full_reduction


def choose_projection_images(num_images: int, num_tiles: int) -> set[int]:
    """Chooses from which of the images 0 to num_images - 1 a projection is learnt; each image has `num_tiles` tiles."""
    return choose_evenly_spaced(num_images, max(MIN_TILED_IMAGES, MAX_NEIGHBOURS // num_tiles))


@torch.no_grad()
def learn_projection(
    net: FocusNet,
    reduction: ChannelReduction,
    batches: Iterable[Tensor],
    device: torch.device,
    num_images: int,
    numbers: Sequence[int],
    seed: int,
    shared: Tensor | None = None,
    has_folds: bool = False,
    groups_and_order: ImageGroupsAndOrder | None = None,
    log: Callable[[str], None] = lambda message: None,
) -> DiscriminantProjection:
    """Learns the projection for density.reduction=discriminant; only `cache` of the result differs between workers.

    Args:
        batches: this worker's share of the images of `choose_projection_images`, uint8 (B, H, W, C).
        num_images: number of training images of all workers, chosen or not.
        numbers: number, over all workers, of each image of the batches.
        seed: seed of the synthetic defects and of the random projection.
        shared: (2, C, C), scatter matrices of other categories. The directions are then computed from these matrices, without
            synthetic defects. None: learn from synthetic defects.
        has_folds: also learn a projection without each cross-validation fold. This is done only if all images are used, their
            number is at least 2 * NUM_FOLDS, and `shared` is None.
        groups_and_order: of the chosen images of all workers. Neighbours are then searched only among images of other physical
            parts. None: every image shows a different part.
        log: called with each message.

    Raises: ValueError: fewer than two images (or tiles, if images have tiles).
    """
    net.eval()
    tiles = TileGrid(*net.config.tile_layout)
    size = net.config.image_size_px
    own_parts = [torch.empty(0, size, size, 4, dtype=torch.uint8)]
    for batch in batches:
        # without a fourth channel (`data.framing`), all pixels are scored
        framed = batch if batch.shape[3] > 3 else F.pad(batch, (0, 1), value=255)
        own_parts.append(tiles.cut_channels_last_images(framed))
    own_images = torch.cat(own_parts)  # (n, S, S, 4), tiles count as images
    full_reduction = build_reduction_with_all_channels(reduction, net.backbone.spec.channels).to(device)
    # every worker needs all chosen images, because synthetic defects contain pieces of other images
    images = all_gather_rows(own_images)
    embedding, theta = _embed_all_channels(net, full_reduction, own_images, device)
    num_channels = full_reduction.num_channels
    full, coreset = embedding.cpu().split([num_channels, full_reduction.num_coreset_channels], dim=1)
    rows = {number: row for row, number in enumerate(numbers)}
    cache = CachedEmbeddings(rows, tiles.join_tile_maps(full), tiles.join_tile_maps(coreset), theta)
    bank = all_gather_rows(full)
    # (n, H, W) bool, locations of the aligned frame that are scored
    scored = compute_scored_locations(own_images[..., 3].to(device) > 0, theta, TileGrid(1, 1, size, 0), full.shape[2:])
    scored = all_gather_rows(scored.cpu())
    if len(images) < 2:
        raise ValueError(
            f"density.reduction=discriminant needs at least 2 normal images, got {len(images)}: add training images"
        )
    relations = None
    if groups_and_order is not None:
        # same_part_distance was measured on the channels of the coreset and is not valid for all channels
        groups_and_order = groups_and_order if coreset.shape[1] else groups_and_order._replace(same_part_distance=None)
        compared = tiles.join_tile_maps(all_gather_rows(coreset if coreset.shape[1] else full))
        relations = find_related_images(compute_descriptors(compared), groups_and_order)
    scatter = ResidualScatter(bank.to(device), reduction.config, seed, tiles.num_tiles, relations)
    queries = _choose_query_images(len(images), tiles.num_tiles, use_all=len(images) == num_images)
    own_queries = compute_worker_range(len(queries))
    defects_per_image = max(3, min(8, -(-NUM_DEFECTS // len(queries))))
    pictures = [] if shared is not None else segment_images(images[queries, ..., :3].numpy())
    groups = [own_queries[start : start + _IMAGES_AT_ONCE] for start in range(0, len(own_queries), _IMAGES_AT_ONCE)]
    for group in track_progress(groups, "metric: images with defects", len(own_queries), log, count=len):
        group_images = torch.tensor([queries[number] for number in group])
        scatter.add_residuals(0, scatter.bank[group_images].float(), group_images, scored[group_images].to(device))
        if shared is not None:
            continue
        copies, masks, sources = _paint_defects(pictures, group, derive_seed(seed, "metric"), defects_per_image)
        source_images = torch.tensor(queries)[sources]
        masks &= images[source_images, ..., 3].numpy() > 0
        embedding, theta = _embed_all_channels(net, full_reduction, torch.from_numpy(copies), device)
        covered = _find_covered_locations(masks, theta, bank.shape[2], device)
        for part in torch.arange(len(copies)).split(_IMAGES_AT_ONCE):
            scatter.add_residuals(1, embedding[part, :num_channels].float(), source_images[part], covered[part])
    projection, scatters = scatter.compute_projection(reduction.num_channels, shared)
    num_used = len(queries) if tiles.num_tiles == 1 else len(images) // tiles.num_tiles
    if not has_folds or shared is not None or num_used < num_images or num_images < 2 * NUM_FOLDS:
        return DiscriminantProjection(projection, scatters, cache=cache)
    fold_projections = scatter.compute_fold_projections(reduction.num_channels)
    return DiscriminantProjection(
        projection, scatters, fold_projections, tiles.join_tile_maps(bank), cache, scatter.fold_of
    )


def _paint_defects(
    pictures: Sequence[SegmentedImage], numbers: Iterable[int], seed: int, defects_per_image: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], list[int]]:
    """Paints synthetic defects on copies of some pictures.

    Args:
        pictures: normal images of S x S pixels; some defects contain pieces of other images.
        numbers: indices of the pictures to copy.
        defects_per_image: number of defects for each picture.

    Returns: copies (M, S, S, 3), masks (M, S, S) of the defects, and for each copy the index of the copied picture.
    """
    painted, masks, sources = [], [], []
    for number in numbers:
        copies, covered, _ = draw_defective_copies(pictures, number, seed, defects_per_image)
        copies, covered = merge_defective_copies(pictures[number].pixels, copies, covered)
        painted.append(copies)
        masks.append(covered)
        sources += [number] * len(copies)
    return np.concatenate(painted), np.concatenate(masks), sources


def _embed_all_channels(
    net: FocusNet, full_reduction: ChannelReduction, images: Tensor, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Computes embeddings with all channels of the used levels, before any projection.

    The result for an image does not depend on the number of workers.

    Args:
        full_reduction: the result of `build_reduction_with_all_channels`.
        images: (B, S, S, 3 or 4) uint8, images or tiles of the network's input size.

    Returns: embeddings (B, C + K, H, W) float16, C channels of all used layers and K channels for the coreset (K is 0 without a
        coreset); theta (B, 2, 3), or None without image alignment or without images.
    """
    if not len(images):
        side = net.config.image_size_px // net.config.location_side_px(full_reduction.config.map_layer)
        num_channels = full_reduction.num_channels + full_reduction.num_coreset_channels
        return torch.empty(0, num_channels, side, side, device=device, dtype=torch.float16), None
    parts = [
        embed_tiles(net, full_reduction, convert_to_float_images(part, device), pad_batches=True)
        for part in images.split(_IMAGES_AT_ONCE_FP32)
    ]
    thetas = [theta for _, theta in parts if theta is not None]
    return torch.cat([embedding.half() for embedding, _ in parts]), torch.cat(thetas) if thetas else None


def _choose_query_images(num_images: int, num_tiles: int, use_all: bool) -> list[int]:
    """Chooses the images, or tiles, whose residuals are computed, and returns their ascending indices.

    Tiles are chosen at random, because every n-th tile could be the same tile of each image.

    Args:
        num_images: number of images, or of tiles if `num_tiles` is above 1.
        num_tiles: number of tiles of an image.
        use_all: choose all images, because calibration by folds needs all residuals. It has no effect on tiles.
    """
    if num_tiles == 1:
        return sorted(choose_evenly_spaced(num_images, num_images if use_all else MAX_QUERIES))
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(0))
    return sorted(order[:MAX_NEIGHBOURS].tolist())


def _find_covered_locations(masks: np.ndarray, theta: Tensor | None, side: int, device: torch.device) -> Tensor:
    """Returns which locations of the feature map are covered by a defect on more than `COVERED_SHARE` of their area.

    Args:
        masks: (B, S, S) bool, True at defective pixels.
        theta: (B, 2, 3), alignment of each image; None without image alignment.
        side: locations along one side of the map.

    Returns: (B, side, side) bool.
    """
    defects = torch.from_numpy(masks).float()[:, None].to(device)
    if theta is not None:
        defects = warp_images(defects, theta, "zeros")
    return F.adaptive_avg_pool2d(defects, side)[:, 0] > COVERED_SHARE


class ResidualScatter:
    """Adds up the scatter matrices of normal and defective residuals, and computes projections from them.

    Args:
        bank: (N, C, H, W), embeddings, with all channels, of the normal images among which neighbours are searched; any float
            type. If images have tiles, each tile is a row.
        config: neighbours are searched in config.window x config.window locations around a patch.
        seed: seed of the random projection in which neighbours are searched.
        tiles_per_image: number of tiles of an image; the tiles of an image are consecutive in the bank.
        relations: which images (not tiles) show the same physical part; None: no two images are related.

    Attributes:
        fold_of: (number of images,) int64, fold of each image; images of one physical part are in one fold.
        search: (K, C), whitened random projection in which neighbours are searched.
        reduced_LKN, squares_LN: projected embeddings of the bank (L locations, K channels, N images), and their squared norms.
        sums: (NUM_FOLDS, 2, C, C), for each fold the sum of outer products of the normal and of the defective residuals.
        counts: (NUM_FOLDS, 2), numbers of these residuals.
    """

    def __init__(
        self,
        bank: Tensor,
        config: DensityConfig,
        seed: int,
        tiles_per_image: int = 1,
        relations: ImageRelations | None = None,
    ) -> None:
        self.bank, self.window, self.tiles_per_image = bank, config.window, tiles_per_image
        num_images = len(bank) // tiles_per_image
        groups = torch.arange(num_images) if relations is None else relations.groups
        self.fold_of = assign_folds(groups, NUM_FOLDS)
        self.relations = None if relations is None else relations.repeat_for_tiles(tiles_per_image)
        channels = bank.shape[1]
        generator = torch.Generator().manual_seed(derive_seed(seed, "metric's search"))
        num_search = min(config.num_channels, channels)
        basis = torch.linalg.qr(torch.randn(channels, num_search, generator=generator, dtype=torch.float64)).Q
        search = basis.t().float().to(bank.device)
        # covariance within locations of the bank, in the random projection
        reduced = torch.stack([search @ image.flatten(1).float() for image in bank])  # (N, K, L)
        centred = (reduced - reduced.mean(dim=0)).transpose(1, 2).reshape(-1, num_search)
        covariance = centred.t() @ centred / max(1, (len(bank) - 1) * bank.shape[2] * bank.shape[3])
        ridge = SEARCH_RIDGE * float(covariance.diagonal().mean())
        self.search = compute_whitening_matrix(covariance, max(ridge, 1e-12)) @ search  # (K, C)
        reduced = torch.stack([self.search @ image.flatten(1).float() for image in bank]).permute(2, 1, 0)
        self.reduced_LKN, self.squares_LN = reduced.contiguous(), reduced.square().sum(dim=1)
        self.sums = torch.zeros(NUM_FOLDS, 2, channels, channels, dtype=torch.float64, device=bank.device)
        self.counts = torch.zeros(NUM_FOLDS, 2, dtype=torch.float64, device=bank.device)

    def add_residuals(self, kind: int, embedding: Tensor, images: Tensor, used: Tensor) -> None:
        """Adds residuals to the normal (kind 0) or defective (kind 1) sums.

        The residual of a patch is its difference to the most similar patch of another normal image.

        Args:
            embedding: (B, C, H, W) float32, all channels of images of the bank, or of copies with synthetic defects.
            images: (B,), positions in the bank of the images, or of the images that were copied.
            used: (B, H, W) bool, locations whose residuals are added.
        """
        for number, image in enumerate(self._compute_residuals(embedding, images)):
            fold = int(self.fold_of[int(images[number]) // self.tiles_per_image])
            rows = image[used[number]].double()
            self.sums[fold, kind] += rows.t() @ rows
            self.counts[fold, kind] += len(rows)

    def compute_projection(self, num_channels: int, shared: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Adds up the sums of all workers, in place, and computes the projection from them; call it once.

        Args:
            num_channels: k, channels after the projection.
            shared: (2, C, C), scatter matrices of other categories, from which the directions are learnt; None: the directions
                are learnt from the scatter matrices of this category.

        Returns: `DiscriminantProjection.projection` and `DiscriminantProjection.scatters`, on the device of the bank.
        """
        if get_world_size() > 1:
            for total in (self.sums, self.counts):
                dist.all_reduce(total)
        mean = self.sums.sum(dim=0) / self.counts.sum(dim=0).clamp_min(1)[:, None, None]
        return self._build_projection(num_channels, mean, mean if shared is None else shared.to(mean)), mean.float()

    def compute_fold_projections(self, num_channels: int) -> Tensor:
        """Computes `DiscriminantProjection.fold_projections`. Call it after `compute_projection`, which joins all workers."""
        sums, counts = self.sums.sum(dim=0) - self.sums, self.counts.sum(dim=0) - self.counts
        means = sums / counts.clamp_min(1)[:, :, None, None]
        return torch.stack([self._build_projection(num_channels, mean, mean) for mean in means])

    def _build_projection(self, num_channels: int, scale_scatters: Tensor, direction_scatters: Tensor) -> Tensor:
        """Builds a projection (k, C): rows with learnt directions, then rows of the whitened random projection.

        Args:
            num_channels: k.
            scale_scatters: (2, C, C), normal and defective scatter; the normal scatter sets the scale of both halves.
            direction_scatters: (2, C, C), normal and defective scatter from which the directions are learnt.
        """
        num_whitened = int(WHITENED_SHARE * num_channels)
        learnt = compute_discriminant_directions(
            direction_scatters[0], direction_scatters[1], num_channels - num_whitened
        )
        projection = torch.cat(
            [
                _scale_to_unit_residuals(learnt, scale_scatters[0]),
                _scale_to_unit_residuals(self.search[:num_whitened], scale_scatters[0]),
            ]
        )
        if get_world_size() > 1:  # different machines may give an eigenvector the opposite sign
            dist.broadcast(projection, 0)
        return projection

    def _compute_residuals(self, embedding: Tensor, images: Tensor) -> Tensor:
        """Subtracts from each patch its nearest neighbour in other images of the bank.

        Args:
            embedding: (B, C, H, W).
            images: (B,), positions in the bank of the B images; an image and its related images are not used as neighbours.

        Returns: residuals (B, H, W, C).
        """
        batch, _, height, width = embedding.shape
        window, reach = self.window, self.window // 2
        query = (self.search @ embedding.flatten(2)).permute(2, 0, 1).unflatten(0, (height, width))  # (H, W, B, K)
        padded = F.pad(query, [0, 0, 0, 0, reach, reach, reach, reach])
        # one product compares the bank of a location with all queries around it: the bank, by far the larger, is read only once
        around = padded.unfold(0, window, 1).unfold(1, window, 1).permute(0, 1, 4, 5, 2, 3)  # (H, W, w, w, B, K)
        # (L, w * w * B, N): |q - b|^2 - |q|^2 = |b|^2 - 2 q b
        distance = torch.baddbmm(
            self.squares_LN[:, None], around.reshape(height * width, -1, query.shape[3]), self.reduced_LKN, alpha=-2
        )
        excluded = (images if self.relations is None else self.relations.find_related_images(images)).view(batch, -1)
        by_query = distance.view(height * width, window**2, batch, -1)
        by_query[:, :, torch.arange(batch)[:, None], excluded.to(query.device)] = torch.inf
        value, image = (minimum.view(height, width, window, window, batch) for minimum in distance.min(dim=2))
        # a patch of the bank has the number image * L + location
        patch = image * (height * width) + torch.arange(height * width, device=query.device).view(
            height, width, 1, 1, 1
        )
        best = query.new_full((height, width, batch), torch.inf)
        nearest = torch.zeros(height, width, batch, dtype=torch.long, device=query.device)
        for offset in range(window**2):
            down, right = (number - reach for number in divmod(offset, window))
            # compare the query at (r + down, c + right) with the bank of (r, c), as far as both are inside the map
            at_query = slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0))
            at_bank = slice(max(-down, 0), height + min(-down, 0)), slice(max(-right, 0), width + min(-right, 0))
            candidate, number = (found[at_bank][:, :, down + reach, right + reach] for found in (value, patch))
            is_closer = candidate < best[at_query]
            best[at_query] = torch.where(is_closer, candidate, best[at_query])
            nearest[at_query] = torch.where(is_closer, number, nearest[at_query])
        bank = self.bank.flatten(2).transpose(1, 2)  # (N, L, C)
        neighbour = bank[nearest // bank.shape[1], nearest % bank.shape[1]].float()  # (H, W, B, C)
        return (embedding.permute(2, 3, 0, 1) - neighbour).permute(2, 0, 1, 3)


def _scale_to_unit_residuals(rows: Tensor, normal: Tensor) -> Tensor:
    """Scales a projection (k, C) by one factor, so that projected normal residuals have a mean squared norm of 1.

    Args: normal: (C, C), scatter per patch of the normal residuals.
    """
    square = torch.einsum("kc,cd,kd->", rows.double(), normal, rows.double())
    return rows / square.clamp_min(1e-24).sqrt().float()


def compute_discriminant_directions(normal: Tensor, defective: Tensor, num_channels: int) -> Tensor:
    """Computes the scaled leading eigenvectors of `defective v = lambda normal v`.

    Args:
        normal, defective: (C, C), scatter per patch of normal and of defective residuals. A ridge is added to `normal`.

    Returns: (num_channels, C) float32, rows v^T sqrt(log lambda), largest lambda first. A row with lambda <= 1 is 0, and so are
        rows beyond the first C.
    """
    channels = len(normal)
    ridge = RIDGE * normal.diagonal().mean().clamp_min(1e-12)
    # with normal = R R^T, this is the ordinary eigenproblem of R^-1 defective R^-T, whose eigenvectors are R^T v
    root = torch.linalg.cholesky(normal + ridge * torch.eye(channels, dtype=normal.dtype, device=normal.device))
    half = torch.linalg.solve_triangular(root, defective, upper=False)
    balanced = torch.linalg.solve_triangular(root, half.t(), upper=False)
    values, vectors = torch.linalg.eigh((balanced + balanced.t()) / 2)
    order = values.argsort(descending=True)[:num_channels]
    weights = values[order].clamp_min(1.0).log().sqrt()
    directions = torch.linalg.solve_triangular(root.t(), vectors[:, order], upper=True)
    rows = normal.new_zeros(num_channels, channels)
    rows[: len(order)] = (directions * weights).t()
    return rows.float()
