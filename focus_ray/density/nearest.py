"""Module for a density that measures the distance to the nearest normal embedding around each location of aligned images [ours].

Good parts can look different at one location, for instance by the phase of a thread. A single Gaussian also covers everything
between the different appearances. A memory, which stores the normal embeddings of each location (the bank), does not. All
embeddings are whitened by one covariance, pooled over locations, so that directions in which normal parts vary count less. A
patch is only compared with embeddings from around its own location; alignment makes this possible. If parts lie anywhere, or are
textures, a coreset without locations has more examples to compare with (`coreset`). By default, the distances of both memories
are averaged.

If there are many images, each location keeps a coreset (a representative subset) of embeddings. Leave-one-out scores an image as
if the memory had not stored it: it removes the embeddings of the image from the coresets, but does not choose the coresets
again. A new choice would be nearly the same at locations where no embedding of the image was chosen. At other locations, a new
choice would contain one more embedding, near the removed one. So a left-out image scores slightly higher than a new image of the
same kind, and thresholds become slightly higher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from focus_ray.density.base import LeaveOneOutScorer, NormalStatistics, choose_evenly_spaced, shrink_tensor_for_export
from focus_ray.density.coreset import Coreset, ExportableCoreset, choose_farthest_points_per_set
from focus_ray.density.moments import (
    check_enough_images,
    compute_absolute_ridge,
    compute_pooled_covariance,
    move_locations_first,
)
from focus_ray.precision import choose_compute_dtype

if TYPE_CHECKING:
    from focus_ray.density.kinds.nearest import NearestSettings

_CHUNK_BYTES = 64 * 2**20  # of distances that are in memory at the same time
_TYPICAL_IMAGES = 16
_LOCATIONS_AT_ONCE = 64
_SEARCH_CHANNELS = 32  # of the random projection in which a location's coreset is chosen


class LocationMemory:
    """A fitted memory of normal embeddings for each location.

    Attributes:
        bank: (L, M, C), stored whitened embeddings of normal images, M at each of L = height * width locations. `centre` is
            already subtracted.
        image_numbers: (L, M) int32, for each stored embedding the index of the normal image that it comes from; None: embedding
            m is from image m at every location.
        centre: (L, 1, C) float32, mean of the stored embeddings of each location; None except in bfloat16, where smaller values
            have smaller rounding errors.
        whitening: (C, C), matrix W with W^T W = inverse pooled covariance, or the identity. The Euclidean distance of whitened
            embeddings is the Mahalanobis distance of raw embeddings.
        window: odd number; a patch is compared with the stored embeddings of window x window locations around it.
        half_squares: (L, M), half the squared norm of each embedding of the bank.
    """

    def __init__(
        self,
        bank: Tensor,
        whitening: Tensor,
        height: int,
        width: int,
        window: int = 1,
        dtype: torch.dtype = torch.float32,
        image_numbers: Tensor | None = None,
    ) -> None:
        """
        Args:
            bank: (L, M, C), whitened but not centred, any float type, any device.
            whitening, height, width, window, image_numbers: see the class.
            dtype: type in which embeddings are stored and distances are computed, float32 or bfloat16.

        Raises: ValueError: the shapes do not fit together.
        """
        if bank.ndim != 3 or bank.shape[0] != height * width or whitening.shape != (bank.shape[2], bank.shape[2]):
            raise ValueError(
                f"a map of {height} x {width} locations needs a bank (L, M, C) with L = {height * width} and a whitening (C, C), "
                f"got {tuple(bank.shape)} and {tuple(whitening.shape)}"
            )
        if image_numbers is not None and image_numbers.shape != bank.shape[:2]:
            raise ValueError(
                f"a bank {tuple(bank.shape)} needs image numbers {tuple(bank.shape[:2])}, got {tuple(image_numbers.shape)}"
            )
        num_locations, count, channels = bank.shape
        # stored as (L, C, M), the layout in which matrix products are fast
        stored_LCM = torch.empty(num_locations, channels, count, dtype=dtype, device=whitening.device)
        centres = []
        # in parts, because a float32 copy of the bank is large
        for start in range(0, num_locations, _LOCATIONS_AT_ONCE):
            part = bank[start : start + _LOCATIONS_AT_ONCE].to(whitening.device, torch.float32)
            if dtype == torch.bfloat16:
                centres.append(part.mean(dim=1, keepdim=True))
                part = part - centres[-1]
            stored_LCM[start : start + _LOCATIONS_AT_ONCE] = part.transpose(1, 2)
        self.centre = torch.cat(centres) if centres else None
        self.bank = bank = stored_LCM.transpose(1, 2)
        self.whitening, self.height, self.width, self.window = whitening, height, width, window
        self.channels = channels
        self.image_numbers = None if image_numbers is None else image_numbers.to(whitening.device, torch.int32)
        self.is_unwhitened = _is_identity_matrix(whitening)
        norms = torch.linalg.vector_norm(bank, dim=2, dtype=torch.float32)
        self.half_squares = (norms.square() / 2).to(dtype)  # (L, M)

    @property
    def device(self) -> torch.device:
        """The device on which distances are computed."""
        return self.bank.device

    def score(self, embedding: Tensor, excluded_images: Tensor | None = None) -> Tensor:
        """Computes the distance of each patch to the nearest normal embedding in the window around its location.

        Args:
            embedding: (B, C, H, W), embeddings of B images, not whitened.
            excluded_images: (B,) or (B, K), for each of the B images the indices of the normal images that are ignored. If the
                memory has `image_numbers`, a negative index stands for no image. None ignores no image.

        Returns: (B, H, W), >= 0; infinite if all normal images are ignored.
        """
        batch, channels, height, width = embedding.shape
        assert (height, width) == (self.height, self.width)
        queries = move_locations_first(embedding).to(self.whitening.dtype)  # (L, B, C)
        if not self.is_unwhitened:
            queries = queries @ self.whitening.t()
        # |q - b|^2 / 2 = |q|^2 / 2 - (q b - |b|^2 / 2): the nearest b has the largest agreement q b - |b|^2 / 2
        closest = torch.full((height, width, batch), -torch.inf, device=self.device, dtype=queries.dtype)
        reach = self.window // 2
        padded = queries.new_zeros(height + 2 * reach, width + 2 * reach, batch, channels)
        padded[reach : reach + height, reach : reach + width] = queries.view(height, width, batch, channels)
        # one product compares the bank of a location with all queries around it: the bank, by far the larger, is read only once
        around = padded.unfold(0, self.window, 1).unfold(1, self.window, 1)  # (H, W, B, C, w, w)
        rows_at_once = max(1, _CHUNK_BYTES // (width * self.window**2 * batch * (self.bank.shape[1] + channels) * 4))
        for top in range(0, height, rows_at_once):
            rows = range(top, min(top + rows_at_once, height))
            part = slice(rows.start * width, rows.stop * width)
            # (P, w * w * B, C), queries around P locations
            near = around[rows.start : rows.stop].permute(0, 1, 4, 5, 2, 3).reshape(len(rows) * width, -1, channels)
            if self.centre is not None:
                near = (near - self.centre[part]).to(self.bank.dtype)
            agreement = torch.baddbmm(self.half_squares[part, None], near, self.bank[part].transpose(1, 2), beta=-1)
            if excluded_images is not None:
                agreement_PWBM = agreement.view(len(agreement), -1, batch, agreement.shape[2])
                self._mask_excluded_images(agreement_PWBM, excluded_images.view(batch, -1), part)
            best = agreement.amax(dim=2)
            if self.centre is not None:  # every location has another centre, so |q - centre|^2 differs between them
                best = best.to(queries.dtype) - near.to(queries.dtype).square().sum(dim=2) / 2
            best = best.view(len(rows), width, self.window, self.window, batch)
            for down in range(self.window):
                for right in range(self.window):
                    # best[r, c, down, right]: the bank of (r, c) and the query at (r + down - reach, c + right - reach)
                    update_maximum(closest, best[:, :, down, right], rows.start + down - reach, right - reach)
        squares = 0 if self.centre is not None else queries.square().sum(dim=2).view(height, width, batch)
        return (squares - 2 * closest).clamp_min_(0).sqrt_().permute(2, 0, 1)

    def make_exportable(self, half: bool) -> LocationMemory:
        """Returns a memory that `torch.export` can trace. Args: half: see `shrink_tensor_for_export`."""
        return ExportableLocationMemory(self, half)

    def _mask_excluded_images(self, agreement: Tensor, excluded_images: Tensor, part: slice) -> None:
        """Sets the agreement (a similarity) with stored embeddings of excluded images to -inf, in place.

        Args:
            agreement: (P, w * w, B, M), agreement of B images, in a window of w * w locations, with M stored embeddings at each
                of P locations.
            excluded_images: (B, K), see `score`.
            part: the slice of the P locations among all locations.
        """
        if self.image_numbers is None:
            agreement[:, :, torch.arange(len(excluded_images))[:, None], excluded_images.to(self.device)] = -torch.inf
            return
        num_images = 1 + max(int(self.image_numbers.max()), int(excluded_images.max()))
        is_excluded = torch.zeros(len(excluded_images), num_images + 1, dtype=torch.bool, device=self.device)
        # a negative number is no image: it goes to an extra column, which no embedding refers to
        is_excluded.scatter_(1, excluded_images.where(excluded_images >= 0, num_images).to(self.device), True)
        is_excluded_PBM = is_excluded[:, self.image_numbers[part].long()].transpose(0, 1)
        agreement.masked_fill_(is_excluded_PBM[:, None], -torch.inf)


class LocationAndCoresetMemory:
    """A density that averages the distances of a memory of locations and of a coreset [ours].

    Before that, each distance is divided by the typical distance of good images.

    Attributes:
        location_memory: compares the first C channels of an embedding.
        coreset: compares the last K channels of an embedding.
        typical_distance: (2,), mean leave-one-out distance of good images in `location_memory` and in `coreset`.
    """

    def __init__(self, location_memory: LocationMemory, coreset: Coreset, typical_distance: Tensor) -> None:
        self.location_memory, self.coreset, self.typical_distance = location_memory, coreset, typical_distance
        self.height, self.width = location_memory.height, location_memory.width

    @property
    def device(self) -> torch.device:
        """The device on which distances are computed."""
        return self.location_memory.device

    def score(self, embedding: Tensor, *excluded_images: Tensor) -> Tensor:
        """Computes distances (B, H, W), >= 0, of B images; a typical good patch has the distance 1.

        Args:
            embedding: (B, C + K, H, W), C channels for the location memory and K channels for the coreset.
            excluded_images: (B,) or (B, K'), indices of the normal images that are ignored for each of the B images.
        """
        channels = self.location_memory.channels
        return (
            self.location_memory.score(embedding[:, :channels], *excluded_images) / self.typical_distance[0]
            + self.coreset.score(embedding[:, channels:], *excluded_images) / self.typical_distance[1]
        ) / 2

    def make_exportable(self, half: bool) -> LocationAndCoresetMemory:
        """Returns a density that `torch.export` can trace. Args: half: see `shrink_tensor_for_export`."""
        memory = self.location_memory.make_exportable(half)
        return LocationAndCoresetMemory(memory, ExportableCoreset(self.coreset, half), self.typical_distance)


class CoresetScorer:
    """Scores images with the coreset of a joint memory alone (a `LeaveOneOutScorer`)."""

    def __init__(self, memory: LocationAndCoresetMemory) -> None:
        self.height, self.width, self.coreset = memory.height, memory.width, memory.coreset

    def score(self, embedding: Tensor, excluded_images: Tensor) -> Tensor:
        """See `Coreset.score`: returns the distance (B, H, W) of each patch to the nearest patch of the coreset."""
        return self.coreset.score(embedding, excluded_images)


def measure_typical_distances(
    location_memory: LocationMemory, coreset: Coreset, statistics: NormalStatistics
) -> Tensor:
    """Computes the mean leave-one-out distance of a sample of normal images in both memories.

    Args: statistics: with the bank (stored embeddings) from which both memories were built.

    Returns: (2,), above 0: the mean distance in the location memory, and in the coreset. Both are 1 if the bank has one image.
    """
    assert statistics.bank is not None
    if len(statistics.bank) < 2:
        return torch.ones(2, device=location_memory.device)
    channels = location_memory.channels
    parts = (location_memory, slice(channels)), (coreset, slice(channels, None))
    return torch.stack([measure_mean_distance(memory, statistics, part) for memory, part in parts])


def measure_mean_distance(
    scorer: LeaveOneOutScorer | LocationMemory | Coreset, statistics: NormalStatistics, channels: slice
) -> Tensor:
    """Computes the mean leave-one-out distance of at most `_TYPICAL_IMAGES` images of the bank: a scalar above 0.

    Args: channels: the channels of the bank's embeddings that the scorer compares.

    Raises: ValueError: fewer than two images would remain for a Gaussian when an image and its related images are left out.
    """
    bank, moments = statistics.bank, statistics.moments
    assert bank is not None
    total = torch.zeros((), device=moments.mean.device)
    sampled = torch.tensor(sorted(choose_evenly_spaced(len(bank), _TYPICAL_IMAGES)))
    for numbers in sampled.split(8):  # 8 images together, so that a memory is read only once for them
        rows = bank[numbers].to(moments.mean).transpose(1, 2).unflatten(2, (moments.height, moments.width))
        distance = scorer.score(rows[:, channels], statistics.find_images_to_exclude(numbers))
        total += distance.mean() * len(numbers)
    return (total / len(sampled)).clamp_min(1e-12)


def update_maximum(target: Tensor, values: Tensor, top: int, left_edge: int) -> None:
    """Replaces elements of a target by values that are larger, in place.

    Args:
        target: (H, W, B).
        values: (h, w, B). Element (i, j) is compared with element (top + i, left_edge + j) of the target; values outside the
            target are ignored.
        top, left_edge: row and column of the target at which `values` start; they may be negative.
    """
    height, width = target.shape[:2]
    first, last = max(top, 0), min(top + values.shape[0], height)
    start, stop = max(left_edge, 0), min(left_edge + values.shape[1], width)
    if first < last and start < stop:
        inside = target[first:last, start:stop]
        torch.maximum(inside, values[first - top : last - top, start - left_edge : stop - left_edge], out=inside)


@torch.no_grad()
def build_location_memory(config: NearestSettings, statistics: NormalStatistics) -> LocationMemory:
    """Builds a memory of locations from the stored embeddings of normal images.

    With density.reduction=discriminant, embeddings are not whitened, because the learnt projection already defines the metric.

    Args: statistics: with a bank of embeddings that are not whitened. It may contain only some of the images of the moments.

    Raises: ValueError: the bank has no image, or the moments are of fewer than two images.
    """
    moments, device = statistics.moments, statistics.moments.mean.device
    assert statistics.bank is not None
    if len(statistics.bank) == 0:
        raise ValueError("a memory needs at least 1 normal image, got 0: add training images")
    check_enough_images(moments)
    whitening = torch.eye(moments.channels, device=device)
    if config.reduction != "discriminant":
        whitening = compute_whitening_matrix(
            compute_pooled_covariance(moments), compute_absolute_ridge(config, moments)
        )
    whitened = whiten_bank(statistics.bank[:, :, : moments.channels], whitening)
    coreset, images = subsample_location_coresets(whitened, config.per_place, device)
    dtype = choose_compute_dtype(config.precision, device)
    return LocationMemory(coreset, whitening, moments.height, moments.width, config.window, dtype, images)


@torch.no_grad()
def subsample_location_coresets(
    bank: Tensor, limit: int | None, device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """Reduces a whitened bank to a coreset of at most `limit` embeddings at each location. The choice is deterministic.

    Args:
        bank: (L, N, C), any float type.
        limit: largest number of embeddings at a location; None keeps all embeddings.
        device: where the coresets are computed.

    Returns:
        The bank (L, M, C), and for each embedding the index (L, M) of the image that it comes from. If no location has more than
        `limit` embeddings, the unchanged bank and None.
    """
    num_locations, count, channels = bank.shape
    if limit is None or count <= limit:
        return bank, None
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(channels, _SEARCH_CHANNELS, generator=generator).to(device)
    images = torch.cat(
        [
            choose_farthest_points_per_set(part.to(device, torch.float32) @ projection, limit).sort(dim=1).values.cpu()
            for part in bank.split(_LOCATIONS_AT_ONCE)
        ]
    )
    return bank[torch.arange(num_locations)[:, None], images.to(bank.device)], images.int()


def compute_whitening_matrix(covariance: Tensor, ridge: float) -> Tensor:
    """Computes the lower triangular W (C, C) with W^T W = (covariance + ridge I)^-1 for a covariance (C, C)."""
    identity = torch.eye(len(covariance), device=covariance.device, dtype=covariance.dtype)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(covariance + ridge * identity), identity, upper=False)


def _is_identity_matrix(whitening: Tensor) -> bool:
    """Returns whether a whitening matrix (C, C) is exactly the identity."""
    return bool((whitening == torch.eye(len(whitening), device=whitening.device)).all())


def whiten_bank(bank: Tensor, whitening: Tensor) -> Tensor:
    """Whitens a bank (N, L, C) and returns it as (L, N, C), in float32 and on the device of the whitening matrix.

    If the whitening matrix (C, C) is the identity, returns a view of the bank in its own type and on its own device.
    """
    if _is_identity_matrix(whitening):
        return bank.transpose(0, 1)
    whitened = torch.empty(bank.shape[1], bank.shape[0], bank.shape[2], device=whitening.device)
    for number, image in enumerate(bank):
        whitened[:, number] = image.to(whitening.device, torch.float32) @ whitening.t()
    return whitened


_LOWEST = -3e38  # agreement of a missing neighbour; not -inf, because not every runtime supports infinity


class ExportableLocationMemory(LocationMemory):
    """A memory that `torch.export` can trace: without chunks and in-place writes.

    The bank has the shape (L, C, M), and is float16 where `shrink_tensor_for_export` allows it.
    """

    def __init__(self, memory: LocationMemory, half: bool) -> None:
        """Args: memory: computes in float32. half: see `shrink_tensor_for_export`."""
        assert memory.centre is None
        self.height, self.width, self.window, self.channels = (
            memory.height,
            memory.width,
            memory.window,
            memory.channels,
        )
        self.bank = shrink_tensor_for_export(memory.bank.transpose(1, 2), half)
        self.half_squares = self.bank.float().square().sum(dim=1)[:, None] / 2
        self.whitening, self.is_unwhitened = memory.whitening, memory.is_unwhitened

    def score(self, embedding: Tensor, excluded_images: Tensor | None = None) -> Tensor:
        """See `LocationMemory.score`: returns distances (B, H, W) of embeddings (B, C, H, W); `excluded_images` is ignored."""
        batch, channels, height, width = embedding.shape
        queries = move_locations_first(embedding)  # (L, B, C)
        if not self.is_unwhitened:
            queries = queries @ self.whitening.t()
        reach = self.window // 2
        # Every location compares its bank with all queries of the window around it: (L, W * B, C) against (L, C, M).
        query_grid = queries.reshape(height, width, batch, channels)
        padded = F.pad(query_grid, (0, 0, 0, 0, reach, reach, reach, reach))
        offsets = [(down, right) for down in range(self.window) for right in range(self.window)]
        near = torch.stack([padded[down : down + height, right : right + width] for down, right in offsets], dim=2)
        near = near.reshape(height * width, len(offsets) * batch, channels)
        # |q - m|^2 / 2 = |q|^2 / 2 - (q m - |m|^2 / 2): the nearest memory entry has the largest agreement.
        agreement = (near @ self.bank.float() - self.half_squares).amax(dim=2)
        agreement = agreement.reshape(height, width, len(offsets), batch)
        best_agreement = agreement[:, :, len(offsets) // 2]
        for number, (down, right) in enumerate(offsets):
            # move each agreement from the location of the bank to the location of the query
            padding = (0, 0, right, 2 * reach - right, down, 2 * reach - down)
            moved = F.pad(agreement[:, :, number], padding, value=_LOWEST)
            best_agreement = torch.maximum(best_agreement, moved[reach : reach + height, reach : reach + width])
        squares = queries.square().sum(dim=2).reshape(height, width, batch)
        return (squares - 2 * best_agreement).clamp_min(0).sqrt().permute(2, 0, 1)
