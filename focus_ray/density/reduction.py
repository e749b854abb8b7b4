"""Module for the channel reduction: combines the features of three backbone layers into one embedding with fewer channels."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus_ray.density.registry import DENSITIES
from focus_ray.density.settings import DensityConfig
from focus_ray.settings.sections import LAYERS


class ChannelReduction(nn.Module):
    """Combines the features of layers 1 to 3 into one embedding, on the grid of layer 1 (map_stride_px 4) or layer 2 (8).

    A level is the feature map of one layer. The reduction is a random choice of channels (as in PaDiM), a semi-orthogonal
    projection, a projection that `fitting.projection` learns, or none. Because all reductions are linear, each level is reduced
    at its own resolution and then resampled to the grid. Up to rounding, this equals concatenating all levels first, and is
    cheaper.

    If the density has a coreset (a representative set of patches), the channels for the coreset come last: a semi-orthogonal
    projection of layers 2 and 3, averaged over 3x3 locations including the zero padding (as in PatchCore).

    Attributes:
        num_channels: C, channels for the location memory or the Gaussians.
        num_coreset_channels: K, channels for the coreset; 0 without a coreset.
        chosen: (C,), indices of the chosen channels in the concatenation of the used levels; only with density.reduction=random.
        projection: (C, channels of all used levels); only with density.reduction=semi_orthogonal or discriminant.
        coreset_projection: (K, channels of layers 2 and 3); only with a coreset.
    """

    def __init__(self, channels: tuple[int, ...], config: DensityConfig, seed: int) -> None:
        """
        Args:
            channels: numbers of channels of layers 1 to 3.
            seed: seed of the random choice and of the random projections.

        Raises: ValueError: density.num_channels exceeds the channels of the used layers.
        """
        super().__init__()
        self.config = config
        self.chosen: Tensor
        self.projection: Tensor
        self.used = [LAYERS.index(layer) for layer in config.layers]
        widths = [channels[index] for index in self.used]
        total = sum(widths)
        if config.reduction != "none" and config.num_channels > total:
            raise ValueError(
                f"density.num_channels={config.num_channels}, but {', '.join(config.layers)} have {total} channels: "
                "lower density.num_channels, or set density.reduction=none"
            )
        self.num_channels = total if config.reduction == "none" else config.num_channels
        generator = torch.Generator().manual_seed(seed)
        if config.reduction == "random":
            chosen = torch.randperm(total, generator=generator)[: config.num_channels].sort().values
            self.register_buffer("chosen", chosen)
        # a discriminant projection is semi-orthogonal until it is learnt
        self.has_projection = config.reduction in ("semi_orthogonal", "discriminant")
        if self.has_projection:
            self.register_buffer("projection", _draw_semi_orthogonal_projection(total, config.num_channels, generator))
        self.widths = widths
        self.num_coreset_channels = 0
        limit = DENSITIES[config.kind].count_coreset_channels(config)
        if limit:
            total = sum(channels[1:])
            self.num_coreset_channels = min(limit, total)
            self.coreset_projection: Tensor
            self.register_buffer(
                "coreset_projection", _draw_semi_orthogonal_projection(total, self.num_coreset_channels, generator)
            )

    def forward(self, levels: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Computes the embedding (B, C + K, H/stride, W/stride) from three levels (B, C_i, H_i, W_i) with the same alignment."""
        height, width = levels[self.config.map_layer].shape[2:]
        size = int(height), int(width)
        parts = [self._reduce_for_locations(levels, size)]
        if self.num_coreset_channels:
            parts.append(self._reduce_for_coreset(levels, size))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _reduce_for_locations(self, levels: tuple[Tensor, Tensor, Tensor], size: tuple[int, int]) -> Tensor:
        """Computes the C channels for the location memory or the Gaussians: (B, C, *size)."""
        reduced: list[Tensor] = []
        start = 0
        for index, width in zip(self.used, self.widths, strict=True):
            level = levels[index]
            if self.config.reduction == "random":
                is_in_level = (self.chosen >= start) & (self.chosen < start + width)
                # index_select on the last dimension is fast, because features are channels-last in memory
                channels_last = level.permute(0, 2, 3, 1).index_select(3, self.chosen[is_in_level] - start)
                level = channels_last.permute(0, 3, 1, 2)
            elif self.has_projection:  # the part of the projection for this level's channels
                level = F.conv2d(level, self.projection[:, start : start + width, None, None].to(level.dtype))
            if LAYERS[index] in self.config.smooth_layers:
                level = F.avg_pool2d(level, 3, stride=1, padding=1, count_include_pad=False)
            reduced.append(self._resample_level(level, size))
            start += width
        return _sum_tensors(reduced) if self.has_projection else torch.cat(reduced, dim=1)

    def _reduce_for_coreset(self, levels: tuple[Tensor, Tensor, Tensor], size: tuple[int, int]) -> Tensor:
        """Computes the K channels for the coreset: (B, K, *size)."""
        parts: list[Tensor] = []
        start = 0
        for level in levels[1:]:
            weight = self.coreset_projection[:, start : start + level.shape[1], None, None].to(level.dtype)
            start += level.shape[1]
            parts.append(self._resample_level(F.avg_pool2d(F.conv2d(level, weight), 3, stride=1, padding=1), size))
        return _sum_tensors(parts)

    def _resample_level(self, level: Tensor, size: tuple[int, int]) -> Tensor:
        """Resamples a level (B, C, h, w) to the map's size: (B, C, *size)."""
        if level.shape[2:] == size:
            return level
        if self.config.map_stride_px == 4:
            return F.interpolate(level, size=size, mode="nearest")
        if level.shape[2] > size[0]:
            return F.adaptive_avg_pool2d(level, size)
        return F.interpolate(level, size=size, mode="bilinear", align_corners=False)


def _draw_semi_orthogonal_projection(num_inputs: int, num_outputs: int, generator: torch.Generator) -> Tensor:
    """Draws a random projection (num_outputs, num_inputs) whose rows are orthonormal; num_outputs is at most num_inputs."""
    gaussian = torch.randn(num_inputs, num_outputs, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q.float().t().contiguous()


def _sum_tensors(parts: list[Tensor]) -> Tensor:
    """Adds tensors, from the first to the last."""
    return functools.reduce(torch.add, parts)
