"""Levels of features to one embedding of fewer channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus_ray.config import DensityConfig
from focus_ray.model.network import LAYERS


class ChannelReduction(nn.Module):
    """Levels -> one embedding of fewer channels, at the places of layer 1 (map_stride_px 4) or layer 2 (8).

    A random choice of channels [kin, PaDiM], a semi-orthogonal projection, or one that `fitting.projection` learns. All are linear
    in the channels, so each level is reduced at its own resolution before it is brought to the map's: the result is that of
    concatenating first.

    Where the density keeps a coreset, its channels follow: a semi-orthogonal projection of layers 2 and 3, averaged over 3x3 with
    the padding counted, as PatchCore does [kin].

    Attributes:
        num_channels: for the memory of places or the Gaussians.  num_coreset_channels: for the coreset; 0 without one.
    """

    def __init__(self, channels: tuple[int, ...], config: DensityConfig, seed: int) -> None:
        """channels: of layers 1 to 3. Raises: ValueError: more channels asked for than there are."""
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
                "lower it, or set density.reduction=none"
            )
        self.num_channels = total if config.reduction == "none" else config.num_channels
        generator = torch.Generator().manual_seed(seed)
        if config.reduction == "random":
            chosen = torch.randperm(total, generator=generator)[: config.num_channels].sort().values
            self.register_buffer("chosen", chosen)
        # a discriminant one starts from there, until it is learnt
        self.projects = config.reduction in ("semi_orthogonal", "discriminant")
        if self.projects:
            gaussian = torch.randn(total, config.num_channels, generator=generator, dtype=torch.float64)
            basis = torch.linalg.qr(gaussian).Q.to(torch.float32)
            self.register_buffer("projection", basis.t().contiguous())
        self.widths = widths
        self.num_coreset_channels = 0
        if config.keeps_coreset:
            total = sum(channels[1:])
            self.num_coreset_channels = min(config.coreset_channels, total)
            gaussian = torch.randn(total, self.num_coreset_channels, generator=generator, dtype=torch.float64)
            self.coreset_projection: Tensor
            self.register_buffer("coreset_projection", torch.linalg.qr(gaussian).Q.float().t().contiguous())

    def forward(self, levels: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Three levels (B, C_i, H_i, W_i) in one frame -> (B, num_channels + num_coreset_channels, H/stride, W/stride)."""
        height, width = levels[self.config.map_layer].shape[2:]
        size = int(height), int(width)
        parts = [self._for_places(levels, size)]
        if self.num_coreset_channels:
            parts.append(self._for_coreset(levels, size))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _for_places(self, levels: tuple[Tensor, Tensor, Tensor], size: tuple[int, int]) -> Tensor:
        reduced: list[Tensor] = []
        start = 0
        for index, width in zip(self.used, self.widths, strict=True):
            level = levels[index]
            if self.config.reduction == "random":
                inside = (self.chosen >= start) & (self.chosen < start + width)
                last = level.permute(0, 2, 3, 1).index_select(3, self.chosen[inside] - start)  # quick on channels-last
                level = last.permute(0, 3, 1, 2)
            elif self.projects:
                level = F.conv2d(level, self.projection[:, start : start + width, None, None].to(level.dtype))
            if LAYERS[index] in self.config.smooth_layers:
                level = F.avg_pool2d(level, 3, stride=1, padding=1, count_include_pad=False)
            reduced.append(self._bring(level, size))
            start += width
        if self.projects:
            total_sum = reduced[0]
            for part in reduced[1:]:
                total_sum = total_sum + part
            return total_sum
        return torch.cat(reduced, dim=1)

    def _for_coreset(self, levels: tuple[Tensor, Tensor, Tensor], size: tuple[int, int]) -> Tensor:
        found: Tensor | None = None
        start = 0
        for level in levels[1:]:
            weight = self.coreset_projection[:, start : start + level.shape[1], None, None].to(level.dtype)
            start += level.shape[1]
            part = self._bring(F.avg_pool2d(F.conv2d(level, weight), 3, stride=1, padding=1), size)
            found = part if found is None else found + part
        assert found is not None
        return found

    def _bring(self, level: Tensor, size: tuple[int, int]) -> Tensor:
        """A level to the map's places."""
        if level.shape[2:] == size:
            return level
        if self.config.map_stride_px == 4:
            return F.interpolate(level, size=size, mode="nearest")
        if level.shape[2] > size[0]:
            return F.adaptive_avg_pool2d(level, size)
        return F.interpolate(level, size=size, mode="bilinear", align_corners=False)
