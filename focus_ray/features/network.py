"""Module for FocusNet, the network: image alignment, and a backbone with feature alignment between layers.

theta is the transform of an alignment, see `alignment.theta`. An aligned frame is the coordinate system after an alignment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus_ray.features.alignment.congealing import CongealingAligner
from focus_ray.features.alignment.theta import TransformBounds, compose_theta, warp_images
from focus_ray.features.alignment.transformer import LocalisationNetworkAligner, SpatialTransformer
from focus_ray.features.backbones.base import Backbone, build_backbone, set_padding_mode
from focus_ray.features.batch_norm import use_global_batch_norm
from focus_ray.features.settings import ModelConfig
from focus_ray.settings.sections import LAYERS

# Bounds of the movements that alignment undoes [ours]. Without a bound, zooming in lowers the loss. A shift is in half widths.
IMAGE_BOUNDS = TransformBounds(max_rotation_rad=math.pi, max_translation=0.4, max_scale=1.15)
FEATURE_BOUNDS = TransformBounds(max_rotation_rad=math.radians(15.0), max_translation=0.15, max_scale=1.15)
ALIGNED_IMAGE_PADDING = (
    "reflection"  # content of the area that an aligned image leaves empty; it is never scored [ours]
)


class AlignedFeatures(NamedTuple):
    """The result of a forward pass of `FocusNet`: aligned images, features of three layers, and the transforms.

    levels: features of layers 1 to 3, (B, C, H/stride, W/stride) each, strides mostly 4 to 16, each in its own aligned frame.
    thetas: for each layer, theta (B, 2, 3) of the feature alignment after it; None if the layer has no feature aligner.
    image: (B, 3, H, W), the images after image alignment.
    theta_image: (B, 2, 3), the transform of the image alignment; None without it.
    """

    levels: tuple[Tensor, Tensor, Tensor]
    thetas: tuple[Tensor | None, Tensor | None, Tensor | None]
    image: Tensor
    theta_image: Tensor | None


class FocusNet(nn.Module):
    """The network of FYD (arXiv 2110.04538), without the parts that only the training needs (head and losses).

    Inputs are square images (B, 3, H, W), RGB in 0..1, of the configured size.

    Attributes:
        backbone: pretrained network that computes the features.
        compiled: function that replaces the backbone for scoring; None: the backbone is used.
        image_aligner: computes theta from images; None without image alignment.
        feature_aligners: "layer1" ... "layer3" -> the aligner after this layer; layers without alignment are missing.
    """

    def __init__(self, config: ModelConfig, backbone: Backbone) -> None:
        """
        Args: backbone: backbone that already has its weights; the padding of its convolutions is changed in place.
            `build_network` builds it with the configured weights.
        """
        super().__init__()
        self.config, self.backbone = config, backbone
        # a compiled function that replaces the backbone for scoring, only without feature aligners (`bundle.engine`)
        self.compiled: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None = None
        set_padding_mode(backbone, config.padding)
        spec = self.backbone.spec
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        self.image_aligner = build_image_aligner(config)
        self.feature_aligners = nn.ModuleDict(
            {
                layer: SpatialTransformer(channels, config.image_size_px // stride, group, FEATURE_BOUNDS)
                for layer, channels, stride in zip(LAYERS, spec.channels, spec.strides, strict=True)
                if (group := getattr(config.feature_alignment, layer)) != "none"
            }
        )
        use_global_batch_norm(self)

    def train(self, mode: bool = True) -> FocusNet:
        """Switches between training and evaluation mode; frozen batch norms of the backbone stay in evaluation mode."""
        super().train(mode)
        if self.config.batch_norm == "frozen":
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def align_images(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Aligns images (B, 3, H, W).

        Returns: the aligned images, and theta (B, 2, 3). If there is no image aligner, or it is disabled, the same images and
            None.

        Raises: ValueError: a congealing aligner gets images that are not square.
        """
        aligner = self.image_aligner
        if aligner is None or (isinstance(aligner, CongealingAligner) and not bool(aligner.enabled)):
            return images, None
        theta = aligner(images)
        return warp_images(images, theta, ALIGNED_IMAGE_PADDING), theta

    def forward(self, images: Tensor) -> AlignedFeatures:
        """Aligns images (B, 3, H, W), RGB in 0..1, and computes their features."""
        image, theta_image = self.align_images(images)
        levels, thetas = self.compute_features(image)
        return AlignedFeatures(levels, thetas, image, theta_image)

    def compute_features(
        self, image: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Computes the features of the three layers from images that are already aligned.

        Args: image: (B, 3, H, W), RGB in 0..1.

        Returns:
            The features of layers 1 to 3, (B, C, H/stride, W/stride) each, where C and stride may differ between layers.
            For each layer, theta (B, 2, 3) of the feature alignment after it; None if the layer has no feature aligner.
        """
        if self.compiled is not None:
            return self.compiled(image), (None, None, None)
        x = (image - self.pixel_mean) / self.pixel_std
        levels: list[Tensor] = []
        thetas: list[Tensor | None] = []
        dtype = next(self.backbone.parameters()).dtype  # not float32 inside `use_inference_backbone`
        for layer in LAYERS:
            x = getattr(self.backbone, layer)(x if dtype == torch.float32 else x.to(dtype))
            level = self.backbone.convert_to_feature_map(x)
            level = level if dtype == torch.float32 else level.float()
            theta = self.feature_aligners[layer](level) if layer in self.feature_aligners else None
            if theta is not None:
                level = x = warp_images(level, theta, self.config.feature_alignment.padding)
            levels.append(level)
            thetas.append(theta)
        return (levels[0], levels[1], levels[2]), (thetas[0], thetas[1], thetas[2])


def build_network(config: ModelConfig) -> FocusNet:
    """Builds the network and loads the configured backbone weights. Raises: WeightsError: see `build_backbone`."""
    return FocusNet(config, build_backbone(config.backbone, config.weights, config.weights_sha256))


def convert_to_float_images(batch: Tensor, device: torch.device | str) -> Tensor:
    """Converts a batch of uint8 images (B, H, W, 3 or 4) to float images (B, 3, H, W) in 0..1, on a device.

    A fourth channel is dropped. A batch of another type is only moved to the device.
    """
    batch = batch.to(device, non_blocking=True)
    if batch.dtype != torch.uint8:
        return batch
    return batch[..., :3].permute(0, 3, 1, 2).to(torch.float32).div_(255.0)


def build_image_aligner(config: ModelConfig) -> nn.Module | None:
    """Builds the configured image aligner; None if model.image_alignment.group is none."""
    alignment = config.image_alignment
    if alignment.group == "none":
        return None
    if alignment.method == "congealing":
        return CongealingAligner(
            alignment.group, IMAGE_BOUNDS.max_translation, IMAGE_BOUNDS.max_scale, alignment.min_drop
        )
    return LocalisationNetworkAligner(alignment.group, IMAGE_BOUNDS)


def warp_features_to_common_frame(aligned: AlignedFeatures) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """Warps the features of all layers so that a location means the same position in all layers [ours].

    The common frame is the aligned frame of layer 3.

    Returns: the features of the three layers, and theta (B, 2, 3), which maps coordinates of the common frame to coordinates of
        the input image; None without any alignment.
    """
    first, second, third = aligned.levels
    onward: Tensor | None = None  # from the last frame to the frame of the current level
    levels = [third]
    for level, theta in ((second, aligned.thetas[2]), (first, aligned.thetas[1])):
        onward = _compose_optional_thetas(theta, onward)
        levels.append(level if onward is None else warp_images(level, onward))
    total = _compose_optional_thetas(aligned.theta_image, _compose_optional_thetas(aligned.thetas[0], onward))
    return (levels[2], levels[1], levels[0]), total


def _compose_optional_thetas(outer: Tensor | None, inner: Tensor | None) -> Tensor | None:
    """Composes two transforms (B, 2, 3), see `compose_theta`. None stands for the identity, also as a result."""
    if outer is None or inner is None:
        return outer if inner is None else inner
    return compose_theta(outer, inner)


def compute_training_coverage_mask(net: FocusNet, height: int, width: int) -> Tensor | None:
    """Returns which locations of the aligned images at least half of the training images showed.

    Returns: (height, width) bool. None, which means all locations, in two cases. First, no congealing aligner is enabled, so the
        locations that images showed are not known. Second, the network aligns features. Locations are then in the common frame
        of `warp_features_to_common_frame`, but the aligner stores the shares of images in the frame of the image alignment.
    """
    aligner = net.image_aligner
    if len(net.feature_aligners) or not isinstance(aligner, CongealingAligner) or not bool(aligner.enabled):
        return None
    return F.adaptive_avg_pool2d(aligner.weight[None, None], (height, width))[0, 0] >= 0.5
