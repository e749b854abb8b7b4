"""ResNet-18, -34 and -50 and Wide-ResNet-50-2, as torchvision has them."""

from __future__ import annotations

from functools import partial

from torch import nn

from focus_ray.model.backbones.base import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec
from focus_ray.model.backbones.weights import hub_state


def resnet_key(key: str) -> str | None:
    part, _, rest = key.partition(".")
    if part in ("layer4", "fc"):
        return None
    if part in ("conv1", "bn1"):
        return f"layer1.{'0' if part == 'conv1' else '1'}.{rest}"
    if part == "layer1":
        return f"layer1.4.{rest}"
    return key


def resnet_stages(name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    from torchvision import models

    net = getattr(models, name)(weights=None)
    return nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1), net.layer2, net.layer3


def _spec(name: str, channels: tuple[int, int, int]) -> BackboneSpec:
    stages, state = partial(resnet_stages, name), partial(hub_state, name)
    return BackboneSpec(channels, IMAGENET_MEAN, IMAGENET_STD, stages, resnet_key, state)


RESNET18 = _spec("resnet18", (64, 128, 256))
RESNET34 = _spec("resnet34", (64, 128, 256))
RESNET50 = _spec("resnet50", (256, 512, 1024))
WIDE_RESNET50_2 = _spec("wide_resnet50_2", (256, 512, 1024))
