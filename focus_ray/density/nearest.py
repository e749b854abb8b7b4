"""Nearest normal neighbour at each location of the aligned frame [ours]: a density beside the single Gaussian.

Where a part looks different in a few ways at one place (a thread's phase, a print), one Gaussian spreads over what lies
between them. Keeping the normal embeddings of each location and scoring by the distance to the nearest one does not. All
embeddings are whitened by one covariance pooled over locations, so that directions in which normal parts vary count less.
Patches are compared at their own place only, which alignment makes possible: nothing like PatchCore's coreset
(arXiv 2106.08265) has to be searched.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from focus_ray.config import DensityConfig
from focus_ray.density.base import Statistics, ridge_of
from focus_ray.density.moments import Moments, check_count, locations_first, pooled_covariance

_CHUNK_BYTES = 64 * 2**20  # of distances held at once


class NearestMemory:
    """The fitted density.

    Attributes:
        bank: (L, N, C), whitened embeddings of N normal images at each of L = height * width places.
        whitening: (C, C), W with W^T W = inverse pooled covariance; Euclidean distance after it is Mahalanobis before.
        window: odd; a patch is compared with the bank of window x window places around its own.
    """

    def __init__(self, bank: Tensor, whitening: Tensor, height: int, width: int, window: int = 1) -> None:
        if bank.ndim != 3 or bank.shape[0] != height * width or whitening.shape != (bank.shape[2], bank.shape[2]):
            raise ValueError(
                f"bank {tuple(bank.shape)} and whitening {tuple(whitening.shape)} do not fit a map of {height} x {width}"
            )
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window={window} must be odd and positive")
        self.bank, self.whitening, self.height, self.width, self.window = bank, whitening, height, width, window
        self.plain = bool((whitening == torch.eye(len(whitening), device=whitening.device)).all())
        self.half_norms = bank.square().sum(dim=2) / 2  # (L, N)

    @property
    def device(self) -> torch.device:
        return self.bank.device

    def score(self, embedding: Tensor, own: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> distances (B, H, W) to the nearest normal embedding around the place, >= 0.

        Args:
            own: (B,), the number in the bank of each image, which is left out for it: what a new image like it would get.
        """
        batch, channels, height, width = embedding.shape
        if (height, width) != (self.height, self.width):
            raise ValueError(
                f"embedding of {(height, width)} places, the memory was made at {(self.height, self.width)}"
            )
        queries = locations_first(embedding).to(self.bank.dtype)  # (L, B, C)
        if not self.plain:
            queries = queries @ self.whitening.t()
        # |q - b|^2 / 2 = |q|^2 / 2 - (q b - |b|^2 / 2), and the best b does not depend on |q|
        closest = torch.full((height, width, batch), -torch.inf, device=self.device, dtype=self.bank.dtype)
        reach = self.window // 2
        padded = queries.new_zeros(height + 2 * reach, width + 2 * reach, batch, channels)
        padded[reach : reach + height, reach : reach + width] = queries.view(height, width, batch, channels)
        # every bank row meets all the queries around it in one product: the bank, by far the larger, is read once
        around = padded.unfold(0, self.window, 1).unfold(1, self.window, 1)  # (H, W, B, C, w, w)
        rows_at_once = max(1, _CHUNK_BYTES // (width * self.window**2 * batch * (self.bank.shape[1] + channels) * 4))
        for top in range(0, height, rows_at_once):
            rows = range(top, min(top + rows_at_once, height))
            part = slice(rows.start * width, rows.stop * width)
            near = around[rows.start : rows.stop].permute(0, 1, 4, 5, 2, 3).reshape(len(rows) * width, -1, channels)
            agreement = torch.baddbmm(self.half_norms[part, None], near, self.bank[part].transpose(1, 2), beta=-1)
            if own is not None:
                apart = agreement.view(len(agreement), -1, batch, agreement.shape[2])
                apart[:, :, torch.arange(batch), own.to(self.device)] = -torch.inf
            best = agreement.amax(dim=2)
            best = best.view(len(rows), width, self.window, self.window, batch)
            for down in range(self.window):
                for right in range(self.window):
                    # best[r, c, down, right] is what the bank of (r, c) says of the query at (r + down - reach, ...)
                    _keep_larger(closest, best[:, :, down, right], rows.start + down - reach, right - reach)
        squares = queries.square().sum(dim=2).view(height, width, batch)
        return (squares - 2 * closest).clamp_min_(0).sqrt_().permute(2, 0, 1)


def _keep_larger(target: Tensor, values: Tensor, top: int, left: int) -> None:
    """target (H, W, B) becomes its maximum with values (h, w, B) laid at (top, left), cut to what is inside."""
    height, width = target.shape[:2]
    first, last = max(top, 0), min(top + values.shape[0], height)
    start, stop = max(left, 0), min(left + values.shape[1], width)
    if first < last and start < stop:
        inside = target[first:last, start:stop]
        torch.maximum(inside, values[first - top : last - top, start - left : stop - left], out=inside)


@torch.no_grad()
def build_memory(bank: Tensor, moments: Moments, ridge: float | None, window: int = 1) -> NearestMemory:
    """A memory from raw embeddings and the moments of the same images.

    Args:
        bank: (N, L, C), as `gather` keeps them, any float type.
        ridge: added to the pooled covariance's diagonal; None: embeddings are compared as they are.

    Raises: ValueError: no image, or fewer than two in the moments.
    """
    if len(bank) == 0:
        raise ValueError("a memory needs at least 1 normal image")
    check_count(moments)
    if ridge is None:
        whitening = torch.eye(bank.shape[2], device=moments.mean.device)
    else:
        whitening = whitening_of(pooled_covariance(moments), ridge)
    whitened = whiten(bank, whitening)
    return NearestMemory(whitened, whitening, moments.height, moments.width, window)


def whitening_of(covariance: Tensor, ridge: float) -> Tensor:
    """(C, C) -> W (C, C) with W^T W = (covariance + ridge I)^-1, lower triangular."""
    identity = torch.eye(len(covariance), device=covariance.device, dtype=covariance.dtype)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(covariance + ridge * identity), identity, upper=False)


def whiten(bank: Tensor, whitening: Tensor) -> Tensor:
    """Raw (N, L, C) -> whitened (L, N, C), float32, on the whitening's device."""
    whitened = torch.empty(bank.shape[1], bank.shape[0], bank.shape[2], device=whitening.device)
    for number, image in enumerate(bank):
        whitened[:, number] = image.to(whitening.device, torch.float32) @ whitening.t()
    return whitened


def keep(embedding: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, L, C) in float16 on the CPU: what a memory keeps of a batch."""
    batch, channels, height, width = embedding.shape
    return embedding.permute(0, 2, 3, 1).reshape(batch, height * width, channels).to("cpu", torch.float16)


def _ridge(config: DensityConfig, statistics: Statistics) -> float | None:
    """None where the reduction has learnt the metric already."""
    return None if config.reduction == "discriminant" else ridge_of(config, statistics.moments)


class _NearestKind:
    keeps_bank = True

    def build(self, config: DensityConfig, statistics: Statistics) -> NearestMemory:
        assert statistics.bank is not None
        return build_memory(statistics.bank, statistics.moments, _ridge(config, statistics), config.window)

    def tensors(self, config: DensityConfig, statistics: Statistics) -> dict[str, Tensor]:
        assert statistics.bank is not None
        one = build_memory(statistics.bank[:1], statistics.moments, _ridge(config, statistics))
        return {"bank": statistics.bank, "whitening": one.whitening}

    def load(
        self, config: DensityConfig, tensors: Mapping[str, Tensor], height: int, width: int, device: torch.device | str
    ) -> NearestMemory:
        whitening = tensors["whitening"].to(device)
        return NearestMemory(whiten(tensors["bank"], whitening), whitening, height, width, config.window)


NEAREST = _NearestKind()
