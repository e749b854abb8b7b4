"""Module for the backbones ResNet-18, ResNet-34, ResNet-50 and Wide-ResNet-50-2 from torchvision."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from focus_ray.features.backbones.spec import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec
from focus_ray.features.backbones.weights import load_torchvision_weights

if TYPE_CHECKING:
    from torch import nn


def convert_resnet_weight_name(key: str) -> str | None:
    """Converts the torchvision name of a weight to the name in `Backbone`.

    Returns: None if the weight is not used; an unknown name unchanged.
    """
    part, _, suffix = key.partition(".")
    if part in ("layer4", "fc"):
        return None
    if part in ("conv1", "bn1"):
        return f"layer1.{'0' if part == 'conv1' else '1'}.{suffix}"
    if part == "layer1":
        return f"layer1.4.{suffix}"
    return key


def build_resnet_layers(name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Builds layers 1 to 3 of a ResNet with random weights; layer 1 also contains the first convolution and pooling (the stem).

    Args: name: name of the ResNet in torchvision.
    """
    from torch import nn
    from torchvision import models

    net = getattr(models, name)(weights=None)
    return nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1), net.layer2, net.layer3


def _make_resnet_spec(name: str, channels: tuple[int, int, int], enum: str) -> BackboneSpec:
    hub_weights = f"{enum}.IMAGENET1K_V1"  # PaDiM, RegAD and PatchCore report results with V1 weights
    return BackboneSpec(
        channels,
        IMAGENET_MEAN,
        IMAGENET_STD,
        partial(build_resnet_layers, name),
        convert_resnet_weight_name,
        partial(load_torchvision_weights, name, hub_weights),
        hub_weights=hub_weights,
    )


RESNET18 = _make_resnet_spec("resnet18", (64, 128, 256), "ResNet18_Weights")
RESNET34 = _make_resnet_spec("resnet34", (64, 128, 256), "ResNet34_Weights")
RESNET50 = _make_resnet_spec("resnet50", (256, 512, 1024), "ResNet50_Weights")
WIDE_RESNET50_2 = _make_resnet_spec("wide_resnet50_2", (256, 512, 1024), "Wide_ResNet50_2_Weights")
