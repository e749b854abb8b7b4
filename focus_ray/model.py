"""FocusNet: image alignment, backbone with feature alignment between its layers, projector and predictor."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from focus_ray.alignment import (
    Bounds,
    SpatialTransformer,
    compose_theta,
    valid_mask,
    warp,
)
from focus_ray.backbone import STRIDES, Backbone, build_backbone
from focus_ray.config import DensityConfig, ModelConfig
from focus_ray.congealing import CongealingAligner

LAYERS = ("layer1", "layer2", "layer3")


class Aligned(NamedTuple):
    """What a forward pass gives.

    levels: features of layers 1 to 3, (B, C, H/4, W/4) to (B, C, H/16, W/16), each in its own aligned frame.
    thetas: what brought each level there from the level before, (B, 2, 3) each; None where nothing moves.
    image: (B, 3, H, W) after image alignment.  theta_image: (B, 2, 3), None without image alignment.
    """

    levels: tuple[Tensor, Tensor, Tensor]
    thetas: tuple[Tensor | None, Tensor | None, Tensor | None]
    image: Tensor
    theta_image: Tensor | None


class FocusNet(nn.Module):
    """The network of FYD, without its losses. Input: images (B, 3, H, W), RGB in 0..1, square of the config's size."""

    def __init__(self, config: ModelConfig, backbone: Backbone | None = None) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone or build_backbone(config.backbone, config.weights, config.weights_sha256)
        spec = self.backbone.spec
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        self.image_aligner = build_image_aligner(config)
        features = config.feature_alignment
        bounds = Bounds(math.radians(features.max_rotation_deg), features.max_translation, features.max_scale)
        self.feature_aligners = nn.ModuleDict(
            {
                layer: SpatialTransformer(channels, config.image_size_px // stride, group, bounds)
                for layer, channels, stride in zip(LAYERS, spec.channels, STRIDES, strict=True)
                if (group := getattr(features, layer)) != "none"
            }
        )
        width = config.projector_width
        self.projector = nn.Sequential(  # [kin, RegAD's encoder]
            nn.Conv2d(spec.channels[2], width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )
        self.predictor = (
            nn.Sequential(
                nn.Conv2d(width, config.predictor_width, 1, bias=False),
                nn.BatchNorm2d(config.predictor_width),
                nn.ReLU(),
                nn.Conv2d(config.predictor_width, width, 1),
            )
            if config.predictor
            else nn.Identity()
        )
        use_global_batch_norm(self)

    def train(self, mode: bool = True) -> FocusNet:
        """As nn.Module's, but a frozen batch norm of the backbone stays in evaluation mode."""
        super().train(mode)
        if self.config.batch_norm == "frozen":
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def align_image(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """ICA: (B, 3, H, W) -> the aligned images and theta (B, 2, 3), or None without image alignment."""
        aligner = self.image_aligner
        if aligner is None or (isinstance(aligner, CongealingAligner) and not bool(aligner.enabled)):
            return images, None
        theta = aligner(images)
        return warp(images, theta, self.config.image_alignment.padding), theta

    def forward(self, images: Tensor) -> Aligned:
        """(B, 3, H, W), RGB in 0..1 -> see `Aligned`."""
        image, theta_image = self.align_image(images)
        levels, thetas = self.features(image)
        return Aligned(levels, thetas, image, theta_image)

    def features(
        self, image: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Aligned images (B, 3, H, W), RGB in 0..1 -> levels and thetas of `Aligned`."""
        x = (image - self.pixel_mean) / self.pixel_std
        levels: list[Tensor] = []
        thetas: list[Tensor | None] = []
        for layer in LAYERS:
            x = getattr(self.backbone, layer)(x)
            theta = self.feature_aligners[layer](x) if layer in self.feature_aligners else None
            if theta is not None:
                x = warp(x, theta)
            levels.append(x)
            thetas.append(theta)
        return (levels[0], levels[1], levels[2]), (thetas[0], thetas[1], thetas[2])

    def project(self, aligned: Aligned) -> tuple[Tensor, Tensor]:
        """f and g on the last level -> projected f(x) and predicted g(f(x)), both (B, C, H/16, W/16)."""
        projected = self.projector(aligned.levels[2])
        return projected, self.predictor(projected)


def build_image_aligner(config: ModelConfig) -> nn.Module | None:
    """The aligner of the config's group; None where it is 'none'."""
    alignment = config.image_alignment
    if alignment.group == "none":
        return None
    if alignment.method == "congealing":
        return CongealingAligner(alignment.group, alignment.max_translation, alignment.max_scale, alignment.min_drop)
    return LocalisedAligner(alignment.group, Bounds(math.pi, alignment.max_translation, alignment.max_scale))


class LocalisedAligner(nn.Module):
    """The paper's way: a localisation net reads theta off the image, here off a copy of 64 px [ours]."""

    SIZE_PX = 64

    def __init__(self, group: str, bounds: Bounds) -> None:
        super().__init__()
        self.transformer = SpatialTransformer(3, self.SIZE_PX, group, bounds)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), 0..1 -> theta (B, 2, 3)."""
        small = F.interpolate(images, size=(self.SIZE_PX, self.SIZE_PX), mode="bilinear", antialias=True)
        return self.transformer(small - 0.5)  # type: ignore[no-any-return]


def common_frame(aligned: Aligned) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """Brings every level to the last level's frame [ours], so that one location is one place in all of them.

    Returns: the levels, and theta (B, 2, 3) from that frame to the input image's; None where nothing moved.
    """
    first, second, third = aligned.levels
    onward: Tensor | None = None  # from the last frame back to the level at hand
    levels = [third]
    for level, theta in ((second, aligned.thetas[2]), (first, aligned.thetas[1])):
        onward = _chain(theta, onward)
        levels.append(level if onward is None else warp(level, onward))
    total = _chain(aligned.theta_image, _chain(aligned.thetas[0], onward))
    return (levels[2], levels[1], levels[0]), total


def _chain(outer: Tensor | None, inner: Tensor | None) -> Tensor | None:
    if outer is None or inner is None:
        return outer if inner is None else inner
    return compose_theta(outer, inner)


class ChannelReduction(nn.Module):
    """Levels -> one embedding of fewer channels, at the places of layer 1 (map_stride_px 4) or layer 2 (8).

    A random choice of channels [kin, PaDiM] or a semi-orthogonal projection. Both are linear in the channels, so each
    level is reduced at its own resolution before it is brought to the map's: the result is that of concatenating first.
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
        elif config.reduction == "semi_orthogonal":
            gaussian = torch.randn(total, config.num_channels, generator=generator, dtype=torch.float64)
            basis = torch.linalg.qr(gaussian).Q.to(torch.float32)
            self.register_buffer("projection", basis.t().contiguous())
        self.widths = widths

    def forward(self, levels: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Three levels (B, C_i, H_i, W_i) in one frame -> (B, num_channels, H/stride, W/stride)."""
        size = levels[0 if self.config.map_stride_px == 4 else 1].shape[2:]
        reduced: list[Tensor] = []
        start = 0
        for index, width in zip(self.used, self.widths, strict=True):
            level = levels[index]
            if self.config.reduction == "random":
                inside = (self.chosen >= start) & (self.chosen < start + width)
                last = level.permute(0, 2, 3, 1).index_select(3, self.chosen[inside] - start)  # quick on channels-last
                level = last.permute(0, 3, 1, 2)
            elif self.config.reduction == "semi_orthogonal":
                level = F.conv2d(level, self.projection[:, start : start + width, None, None].to(level.dtype))
            if LAYERS[index] in self.config.smooth_layers:
                level = F.avg_pool2d(level, 3, stride=1, padding=1, count_include_pad=False)
            reduced.append(self._bring(level, (int(size[0]), int(size[1]))))
            start += width
        if self.config.reduction == "semi_orthogonal":
            total_sum = reduced[0]
            for part in reduced[1:]:
                total_sum = total_sum + part
            return total_sum
        return torch.cat(reduced, dim=1)

    def _bring(self, level: Tensor, size: tuple[int, int]) -> Tensor:
        """A level to the map's places."""
        if level.shape[2:] == size:
            return level
        if self.config.map_stride_px == 4:
            return F.interpolate(level, size=size, mode="nearest")
        if level.shape[2] > size[0]:
            return F.adaptive_avg_pool2d(level, size)
        return F.interpolate(level, size=size, mode="bilinear", align_corners=False)


class _SumOverWorkers(torch.autograd.Function):
    """all_reduce whose gradient is all_reduce (torch.distributed.nn's own is deprecated since torch 2.13)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the joined batch of all workers, on any device (torch's SyncBatchNorm wants a GPU)."""

    def forward(self, x: Tensor) -> Tensor:
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if not self.training or world == 1:
            return super().forward(x)
        values = x.float()
        # squares are taken about a point near the mean, the same for all workers, or float32 would lose the variance
        shift_point = torch.zeros_like(values[0, :, 0, 0]) if self.running_mean is None else self.running_mean.float()
        values = values - shift_point[:, None, None]
        count = values.numel() / values.shape[1]
        sums = torch.cat([values.sum((0, 2, 3)), values.square().sum((0, 2, 3)), values.new_full((1,), count)])
        sums = _SumOverWorkers.apply(sums)
        total = sums[-1].detach()
        mean = sums[: self.num_features] / total
        variance = (sums[self.num_features : -1] / total - mean.square()).clamp_min(0)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                momentum = 0.1 if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean + shift_point, momentum)
                self.running_var.lerp_(variance * (total / (total - 1).clamp_min(1)), momentum)
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        return (values * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


def use_global_batch_norm(module: nn.Module) -> None:
    """Makes every batch norm in a module one over all workers, in place; its parameters and statistics stay."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = GlobalBatchNorm2d


def inside_mask(theta: Tensor | None, like: Tensor) -> Tensor | None:
    """(B, H, W) bool: which pixels of aligned images come from inside; None where nothing was aligned."""
    return None if theta is None else valid_mask(theta, like.shape[2], like.shape[3])


def seen_mask(net: FocusNet, height: int, width: int, share: float = 0.5) -> Tensor | None:
    """(H, W) bool: places of the aligned frame that at least this share of the training images showed; None: all."""
    aligner = net.image_aligner
    if not isinstance(aligner, CongealingAligner) or not bool(aligner.enabled):
        return None
    return F.adaptive_avg_pool2d(aligner.weight[None, None], (height, width))[0, 0] >= share
