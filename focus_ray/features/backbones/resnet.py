"""ResNet-18, ResNet-34, ResNet-50 and Wide-ResNet-50-2 from torchvision."""

from __future__ import annotations

from functools import partial

from torch import nn

from focus_ray.features.backbones.base import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec
from focus_ray.features.backbones.weights import load_hub_state


def map_resnet_key(key: str) -> str | None:
    """Converts the torchvision name of a weight to its name in `Backbone`; None if the weight is not used."""
    part, _, suffix = key.partition(".")
    if part in ("layer4", "fc"):
        return None
    if part in ("conv1", "bn1"):
        return f"layer1.{'0' if part == 'conv1' else '1'}.{suffix}"
    if part == "layer1":
        return f"layer1.4.{suffix}"
    return key


def build_resnet_layers(name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Builds layers 1 to 3 of a ResNet with random weights; layer 1 contains the stem.

    Args: name: name of the ResNet in torchvision.
    """
    from torchvision import models

    net = getattr(models, name)(weights=None)
    return nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1), net.layer2, net.layer3


def _spec(name: str, channels: tuple[int, int, int]) -> BackboneSpec:
    build_layers, state = partial(build_resnet_layers, name), partial(load_hub_state, name)
    return BackboneSpec(channels, IMAGENET_MEAN, IMAGENET_STD, build_layers, map_resnet_key, state)


RESNET18 = _spec("resnet18", (64, 128, 256))
RESNET34 = _spec("resnet34", (64, 128, 256))
RESNET50 = _spec("resnet50", (256, 512, 1024))
WIDE_RESNET50_2 = _spec("wide_resnet50_2", (256, 512, 1024))
