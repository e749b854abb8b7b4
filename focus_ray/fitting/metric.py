"""The discriminant metric [ours]: the directions in which defects leave the normal patches, and normal patches do not.

Every patch of a normal image has a nearest neighbour among the patches of the other normal images around its place. What is
left between the two, the residual, says how normal patches differ; the same of a patch with a synthetic defect says how a
defective one does. With the two scatter matrices of residuals, normal `Sn` and defective `Sd`, the generalised eigenproblem
`Sd v = lambda Sn v` gives the directions in order of the variance of defects against that of normals (Fisher's discriminant,
on differences). Each direction kept is scaled by sqrt(log lambda), the weight that a likelihood ratio of the two zero-mean
Gaussians would give it to first order.

Real defects are not the synthetic ones. So the learnt directions take half of the channels, and a random projection whitened
by the normal covariance, which favours no kind of defect, takes the other half; both weigh alike on normal residuals.

Both matrices are sums over images, so workers add up their own and join them by one all-reduce: the metric of any number of
workers is that of one, up to the rounding of sums. Nothing is trained by gradient descent.
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

from focus_ray.config import DensityConfig
from focus_ray.density.base import sample_evenly
from focus_ray.density.nearest import whitening_matrix
from focus_ray.density.relations import Relations, fold_numbers
from focus_ray.density.tiles import Tiles
from focus_ray.evaluation.defects import overlaid, synthetic_validation_set
from focus_ray.fitting.distributed import gather_rows, own_part, world_size
from focus_ray.fitting.duplicates import ImageOrigins, find_relations
from focus_ray.fitting.scoring import describe_embedding, embed_tiles, places_shown, to_images
from focus_ray.model.alignment.theta import warp
from focus_ray.model.network import FocusNet
from focus_ray.model.reduction import ChannelReduction
from focus_ray.progress import track
from focus_ray.seeds import derived_seed

NEIGHBOURS = 64  # images, at most, among which nearest neighbours are searched; of images in tiles, so many tiles
FEWEST = 32  # but tiles of so many images
QUERIES = 32  # of them whose patches and defects are looked at, where there are more than are looked at all
DEFECTS = 192  # synthetic ones, at most about: 3 to 8 an image
RIDGE = 0.5  # on Sn, of its mean diagonal
SEARCH_RIDGE = 2.0  # on the covariance that whitens for the search, of its mean diagonal
WHITENED = 0.5  # of the channels: a whitened random projection beside the learnt directions, for defects of other kinds
FOLDS = 5  # of the images, for calibration by metrics that have not seen them
_AT_ONCE = 8
_GROUP = 16  # images whose features of all channels are held in float32 at once
COVERED = 0.5  # of a place: from so much on it counts as defective


class Metric(NamedTuple):
    """What `metric_pass` learns, with C channels before and k after it; on the device.

    projection: (k, C) float32, for `ChannelReduction.projection`; learnt rows beyond those worth keeping are 0.
    scatters: (2, C, C) a patch, float32, of normal and of defective residuals; the latter 0 where directions are shared.
    folds: (FOLDS, k, C), the projection as it is without the images of each fold; or None.
    fold_of: (N,) int64, the fold of each image: images that show one part are in one fold; beside folds.
    embeddings: (N, C, H, W) float16 on the CPU, of all images with the places of their tiles side by side, beside folds; or None.
    known: of this worker's images among those looked at, so that their statistics take no further pass.
    """

    projection: Tensor
    scatters: Tensor
    folds: Tensor | None = None
    embeddings: Tensor | None = None
    known: Known | None = None
    fold_of: Tensor | None = None


class Known(NamedTuple):
    """What the network made of n images, with all channels and as the coreset wants them.

    row: image's number, over all workers -> its row.  full: (n, C, H, W), coreset: (n, K, H, W), of whole images, float16 on the
    CPU.  thetas: (n, 2, 3), or None.
    """

    row: dict[int, int]
    full: Tensor
    coreset: Tensor
    thetas: Tensor | None

    def embedding(self, numbers: Sequence[int], projection: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `scoring.embed` gives of B images, up to the rounding of float16: (B, k + K, H, W) and theta (B, 2, 3)."""
        rows, device = [self.row[number] for number in numbers], projection.device
        places = F.conv2d(self.full[rows].to(device, torch.float32), projection[:, :, None, None])
        found = torch.cat([places, self.coreset[rows].to(device, torch.float32)], dim=1)
        return found, None if self.thetas is None else self.thetas[rows].to(device)


def full_reduction(reduction: ChannelReduction, channels: tuple[int, ...]) -> ChannelReduction:
    """The reduction that keeps all channels, smoothed and brought to the map's places as the other does; its coreset's too."""
    found = ChannelReduction(channels, reduction.config.model_copy(update={"reduction": "none"}), 0)
    if found.num_coreset_channels:
        found.coreset_projection.copy_(reduction.coreset_projection)
    return found


def images_to_look_at(num_images: int, num_tiles: int) -> set[int]:
    """Numbers of the images that a metric is learnt from, each in so many tiles."""
    return sample_evenly(num_images, max(FEWEST, NEIGHBOURS // num_tiles))


@torch.no_grad()
def metric_pass(
    net: FocusNet,
    reduction: ChannelReduction,
    batches: Iterable[Tensor],
    device: torch.device,
    num_images: int,
    numbers: Sequence[int],
    seed: int,
    shared: Tensor | None = None,
    in_folds: bool = False,
    origins: ImageOrigins | None = None,
    log: Callable[[str], None] = lambda message: None,
) -> Metric:
    """Learns the projection of a `discriminant` reduction; the same on every worker.

    Args:
        batches: this worker's images of those that `images_to_look_at` names, uint8 (B, H, W, C); tiles count as images.
        num_images: of all workers, whether they are looked at or not.
        numbers: of the images of the batches, among those of all workers.
        shared: (2, C, C), scatters learnt over other categories, from which the directions are taken instead.
        in_folds: find, beside it, the metrics without a fold of the images each; done where every image is looked at, and
            none is shared.
        origins: of the images that are looked at, of all workers, in order; None: every image shows a part of its own.
            Neighbours are searched among images of other parts.

    Raises: ValueError: fewer than two images.
    """
    net.eval()
    tiles = Tiles.from_config(net.config)
    size = net.config.image_size_px
    mine = [torch.empty(0, size, size, 4, dtype=torch.uint8)]
    mine += [_marked(tiles.cut_batch(one)) for batch in batches for one in batch.split(1)]
    own = torch.cat(mine)
    full = full_reduction(reduction, net.backbone.spec.channels).to(device)
    # every worker has all of the chosen images, since defects are made with pieces of others
    images = gather_rows(own, device)
    embedding, theta = _embedded(net, full, own, device)
    width = full.num_channels
    places, beyond = embedding.cpu().split([width, full.num_coreset_channels], dim=1)
    rows = {number: row for row, number in enumerate(numbers)}
    known = Known(rows, tiles.join(places), tiles.join(beyond), theta)
    bank = gather_rows(places, device)
    scored = gather_rows(_places(own[..., 3], theta, bank.shape[2], device).byte().cpu(), device) > 0
    if len(images) < 2:
        raise ValueError(f"a metric needs at least 2 normal images, got {len(images)}: add training images")
    relations = None
    if origins is not None:
        # a distance that was measured on the coreset's channels says nothing of all channels
        origins = origins if beyond.shape[1] else origins._replace(same_part_distance=None)
        compared = tiles.join(gather_rows(beyond if beyond.shape[1] else places, device))
        relations = find_relations(describe_embedding(compared), origins)
    scatter = ResidualScatter(bank.to(device), reduction.config, seed, tiles.num_tiles, relations)
    queries = _queries(len(images), tiles.num_tiles, all_of_them=len(images) == num_images)
    part = own_part(len(queries))
    per_image = max(3, min(8, -(-DEFECTS // len(queries))))
    shown = images[queries, ..., :3].numpy()
    foregrounds: dict[int, NDArray[np.bool_]] = {}
    groups = [part[start : start + _AT_ONCE] for start in range(0, len(part), _AT_ONCE)]
    for group in track(groups, "metric: images with defects", len(part), log, count=len):
        where = torch.tensor([queries[number] for number in group])
        scatter.add_normal(where, scored[where].to(device))
        if shared is not None:
            continue
        made, masks, of = _with_defects(shown, group, derived_seed(seed, "metric"), per_image, foregrounds)
        owners = torch.tensor(queries)[of]
        masks &= images[owners, ..., 3].numpy() > 0
        embedding, theta = _embedded(net, full, torch.from_numpy(made), device)
        place = _covered(masks, theta, bank.shape[2], device)
        for some in torch.arange(len(made)).split(_AT_ONCE):
            scatter.add_defective(embedding[some, :width].float(), owners[some], place[some])
    projection, scatters = scatter.projection(reduction.num_channels, shared)
    looked_at = len(queries) if tiles.num_tiles == 1 else len(images) // tiles.num_tiles
    if not in_folds or shared is not None or looked_at < num_images or num_images < 2 * FOLDS:
        return Metric(projection, scatters, known=known)
    folds = scatter.projections_of_folds(reduction.num_channels)
    return Metric(projection, scatters, folds, tiles.join(bank), known, scatter.fold_of)


def _with_defects(
    images: NDArray[np.uint8],
    numbers: Iterable[int],
    seed: int,
    per_image: int,
    foregrounds: dict[int, NDArray[np.bool_]],
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], list[int]]:
    """Copies (M, S, S, 3) of some of the images with defects on them, masks (M, S, S), and the number of each one's image."""
    made, masks, owners = [], [], []
    for number in numbers:
        only = range(number, number + 1)
        copies, covered, _ = synthetic_validation_set(images, seed, per_image, only, foregrounds)
        together, covered = overlaid(images[number], copies, covered)
        made.append(together)
        masks.append(covered)
        owners += [number] * len(together)
    return np.concatenate(made), np.concatenate(masks), owners


def _embedded(
    net: FocusNet, full: ChannelReduction, images: Tensor, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """(B, C, H, W) float16 with all channels, and theta; the same of each image with any number of workers."""
    if not len(images):
        side = net.config.image_size_px // net.config.place_px(full.config)
        channels = full.num_channels + full.num_coreset_channels
        return torch.empty(0, channels, side, side, device=device, dtype=torch.float16), None
    parts = [embed_tiles(net, full, to_images(part, device), alike=True) for part in images.split(_GROUP)]
    thetas = [theta for _, theta in parts if theta is not None]
    return torch.cat([embedding.half() for embedding, _ in parts]), torch.cat(thetas) if thetas else None


def _marked(images: Tensor) -> Tensor:
    """(B, S, S, 3 or 4) -> (B, S, S, 4), the fourth channel saying what is scored (`data.framing`)."""
    return images if images.shape[3] > 3 else F.pad(images, (0, 1), value=255)


def _queries(num_images: int, num_tiles: int, all_of_them: bool) -> list[int]:
    """Which of the chosen images, or tiles, are looked at; of tiles not every so many, which might be one tile of each image.

    All of few, by folds of which they are calibrated then.
    """
    if num_tiles == 1:
        return sorted(sample_evenly(num_images, num_images if all_of_them else QUERIES))
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(0))
    return sorted(order[:NEIGHBOURS].tolist())


def _places(shown: Tensor, theta: Tensor | None, side: int, device: torch.device) -> Tensor:
    """(B, S, S), above 0 where scored -> (B, side, side) bool, places of the aligned frame."""
    whole = Tiles(1, 1, shown.shape[1], 0)
    return places_shown(shown.to(device) > 0, theta, whole, (side, side))


def _covered(masks: np.ndarray, theta: Tensor | None, side: int, device: torch.device) -> Tensor:
    """(B, side, side) bool: places of the aligned frame that a defect covers."""
    shown = torch.from_numpy(masks).float()[:, None].to(device)
    if theta is not None:
        shown = warp(shown, theta, "zeros")
    return F.adaptive_avg_pool2d(shown, side)[:, 0] > COVERED


class ResidualScatter:
    """The two scatter matrices; knows no image.

    Args:
        bank: (N, C, H, W), all channels of normal images, among which neighbours are searched; any float type.
        config: its window says how far around a place.  seed: of the projection in which the search is done.
        per_image: tiles of an image, which come after one another and stand for images here.
        relations: between the images, not the tiles; None: no two are related.

    Attributes:
        fold_of: (images,) int64, the fold of each image; images that show one part are in one fold.
    """

    def __init__(
        self, bank: Tensor, config: DensityConfig, seed: int, per_image: int = 1, relations: Relations | None = None
    ) -> None:
        self.bank, self.window, self.per_image = bank, config.window, per_image
        num_images = len(bank) // per_image
        groups = torch.arange(num_images) if relations is None else relations.groups
        self.fold_of = fold_numbers(groups, FOLDS)
        self.relations = None if relations is None else relations.repeat(per_image)
        channels = bank.shape[1]
        generator = torch.Generator().manual_seed(derived_seed(seed, "metric's search"))
        few = min(config.num_channels, channels)
        basis = torch.linalg.qr(torch.randn(channels, few, generator=generator, dtype=torch.float64)).Q
        search = basis.t().float().to(bank.device)
        reduced = torch.stack([search @ image.flatten(1).float() for image in bank])  # (N, K, L)
        centred = (reduced - reduced.mean(dim=0)).transpose(1, 2).reshape(-1, few)
        covariance = centred.t() @ centred / max(1, (len(bank) - 1) * bank.shape[2] * bank.shape[3])
        ridge = SEARCH_RIDGE * float(covariance.diagonal().mean())
        self.search = whitening_matrix(covariance, max(ridge, 1e-12)) @ search  # (few, C)
        reduced = torch.stack([self.search @ image.flatten(1).float() for image in bank]).permute(2, 1, 0)
        self.rows, self.norms = reduced.contiguous(), reduced.square().sum(dim=1)  # (L, K, N), (L, N)
        # a fold of the images each: normal and defective sums (FOLDS, 2, C, C), and patches (FOLDS, 2)
        self.sums = torch.zeros(FOLDS, 2, channels, channels, dtype=torch.float64, device=bank.device)
        self.counts = torch.zeros(FOLDS, 2, dtype=torch.float64, device=bank.device)

    def add_normal(self, own: Tensor, scored: Tensor | None = None) -> None:
        """Takes in images of the bank, by their numbers (B,), where they are scored, (B, H, W) bool; None: everywhere."""
        residuals = self._residuals(self.bank[own].float(), own)
        self._add(0, residuals, own, scored)

    def add_defective(self, embedding: Tensor, own: Tensor, covered: Tensor) -> None:
        """Takes in copies (B, C, H, W) with defects where covered (B, H, W), of images of the bank, their numbers own (B,)."""
        self._add(1, self._residuals(embedding, own), own, covered)

    def _add(self, kind: int, residuals: Tensor, own: Tensor, counted: Tensor | None) -> None:
        for number, image in enumerate(residuals):
            fold = int(self.fold_of[int(own[number]) // self.per_image])
            rows = (image.flatten(0, 1) if counted is None else image[counted[number]]).double()
            self.sums[fold, kind] += rows.t() @ rows
            self.counts[fold, kind] += len(rows)

    def projection(self, num_channels: int, shared: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Joins all workers' sums. Returns: `Metric.projection` and `Metric.scatters`, on the bank's device."""
        if world_size() > 1:
            for total in (self.sums, self.counts):
                dist.all_reduce(total)
        mean = self.sums.sum(dim=0) / self.counts.sum(dim=0).clamp_min(1)[:, None, None]
        return self._projection(num_channels, mean, mean if shared is None else shared.to(mean)), mean.float()

    def projections_of_folds(self, num_channels: int) -> Tensor:
        """`Metric.folds`; to be called after `projection`, which joins the workers' sums."""
        sums, counts = self.sums.sum(dim=0) - self.sums, self.counts.sum(dim=0) - self.counts
        means = sums / counts.clamp_min(1)[:, :, None, None]
        return torch.stack([self._projection(num_channels, mean, mean) for mean in means])

    def _projection(self, num_channels: int, mean: Tensor, taken: Tensor) -> Tensor:
        """Of the scatters (2, C, C) that directions are taken from, at the scale of the normal one of `mean` (2, C, C)."""
        num_whitened = int(WHITENED * num_channels)
        learnt = discriminant(taken[0], taken[1], num_channels - num_whitened)
        found = torch.cat([_unit(learnt, mean[0]), _unit(self.search[:num_whitened], mean[0])])
        if world_size() > 1:  # machines of different kinds may round an eigenvector to another sign
            dist.broadcast(found, 0)
        return found

    def _residuals(self, embedding: Tensor, own: Tensor) -> Tensor:
        """(B, C, H, W) less the nearest neighbours in other images than own -> (B, H, W, C)."""
        batch, _, height, width = embedding.shape
        window, reach = self.window, self.window // 2
        query = (self.search @ embedding.flatten(2)).permute(2, 0, 1).unflatten(0, (height, width))  # (H, W, B, K)
        padded = F.pad(query, [0, 0, 0, 0, reach, reach, reach, reach])
        # every bank row meets all the queries around it in one product: the bank, by far the larger, is read once
        around = padded.unfold(0, window, 1).unfold(1, window, 1).permute(0, 1, 4, 5, 2, 3)  # (H, W, w, w, B, K)
        distance = torch.baddbmm(
            self.norms[:, None], around.reshape(height * width, -1, query.shape[3]), self.rows, alpha=-2
        )
        left_out = own if self.relations is None else self.relations.relatives(own)
        image_numbers = torch.arange(batch)[:, None].expand(batch, left_out.view(batch, -1).shape[1])
        distance.view(height * width, window**2, batch, -1)[
            :, :, image_numbers, left_out.view(batch, -1).to(query.device)
        ] = torch.inf
        value, image = (found.view(height, width, window, window, batch) for found in distance.min(dim=2))
        best = query.new_full((height, width, batch), torch.inf)
        nearest = torch.zeros(height, width, batch, dtype=torch.long, device=query.device)
        y, x = torch.zeros_like(nearest), torch.zeros_like(nearest)
        down_all = torch.arange(height, device=query.device)[:, None, None].expand_as(nearest)
        right_all = torch.arange(width, device=query.device)[None, :, None].expand_as(nearest)
        for offset in range(window**2):
            down, right = (number - reach for number in divmod(offset, window))
            # what the bank of (r, c) says of the query at (r + down, c + right)
            mine = slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0))
            theirs = slice(max(-down, 0), height + min(-down, 0)), slice(max(-right, 0), width + min(-right, 0))
            said = value[theirs][:, :, down + reach, right + reach]
            closer = said < best[mine]
            for target, found in (
                (best, said),
                (nearest, image[theirs][:, :, down + reach, right + reach]),
                (y, down_all[theirs]),
                (x, right_all[theirs]),
            ):
                target[mine] = torch.where(closer, found, target[mine])
        neighbour = self.bank.permute(0, 2, 3, 1)[nearest, y, x].float()  # (H, W, B, C)
        return (embedding.permute(2, 3, 0, 1) - neighbour).permute(2, 0, 1, 3)


def _unit(rows: Tensor, normal: Tensor) -> Tensor:
    """Rows (k, C), scaled together so that normal residuals have a mean square of 1 over them."""
    square = torch.einsum("kc,cd,kd->", rows.double(), normal, rows.double())
    return rows / square.clamp_min(1e-24).sqrt().float()


def discriminant(normal: Tensor, defective: Tensor, num_channels: int) -> Tensor:
    """The scaled leading directions of `defective v = lambda normal v`.

    Args:
        normal, defective: (C, C), scatter a patch.

    Returns: (num_channels, C) float32: rows v^T sqrt(log lambda), of the largest lambda first; 0 where lambda is 1 at most.
    """
    channels = len(normal)
    ridge = RIDGE * normal.diagonal().mean().clamp_min(1e-12)
    root = torch.linalg.cholesky(normal + ridge * torch.eye(channels, dtype=normal.dtype, device=normal.device))
    half = torch.linalg.solve_triangular(root, defective, upper=False)
    balanced = torch.linalg.solve_triangular(root, half.t(), upper=False)
    values, vectors = torch.linalg.eigh((balanced + balanced.t()) / 2)
    order = values.argsort(descending=True)[:num_channels]
    weights = values[order].clamp_min(1.0).log().sqrt()
    directions = torch.linalg.solve_triangular(root.t(), vectors[:, order], upper=True)
    found = normal.new_zeros(num_channels, channels)
    found[: len(order)] = (directions * weights).t()
    return found.float()
