"""Module for the backbone ConvNeXt-Tiny (arXiv 2201.03545) from torchvision. It has layer norms and no batch norms."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from focus_ray.features.backbones.spec import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec
from focus_ray.features.backbones.weights import load_torchvision_weights

if TYPE_CHECKING:
    from torch import nn

_HUB_WEIGHTS = "ConvNeXt_Tiny_Weights.IMAGENET1K_V1"


def convert_convnext_weight_name(key: str) -> str | None:
    """Converts the torchvision name of a weight to the name in `Backbone`.

    Returns: None if the weight is not used; an unknown name unchanged.
    """
    part, _, suffix = key.partition(".")
    if part == "classifier":
        return None
    number, _, suffix = suffix.partition(".")
    if part != "features" or not number.isdigit():
        return key
    layer, index = divmod(int(number), 2)  # index 0: the stem, or downsampling by 2; index 1: the blocks of the stage
    return f"layer{layer + 1}.{index}.{suffix}" if layer < 3 else None


def build_convnext_layers() -> tuple[nn.Module, nn.Module, nn.Module]:
    """Builds layers 1 to 3 of ConvNeXt-Tiny with random weights; layer 1 also contains the first convolution (the stem)."""
    from torch import nn
    from torchvision import models

    # no stochastic depth: in training, the two images of a pair must pass through the same network
    net = models.convnext_tiny(weights=None, stochastic_depth_prob=0.0).features
    return nn.Sequential(net[0], net[1]), nn.Sequential(net[2], net[3]), nn.Sequential(net[4], net[5])


CONVNEXT_TINY = BackboneSpec(
    (96, 192, 384),
    IMAGENET_MEAN,
    IMAGENET_STD,
    build_convnext_layers,
    convert_convnext_weight_name,
    partial(load_torchvision_weights, "convnext_tiny", _HUB_WEIGHTS),
    min_reflected_px=64,  # kernels of 7 x 7 need a map of at least 4 x 4 cells
    hub_weights=_HUB_WEIGHTS,
)
