"""ConvNeXt-Tiny (arXiv 2201.03545), as torchvision has it: its first three stages. It normalises by LayerNorm alone."""

from __future__ import annotations

from functools import partial

from torch import nn

from focus_ray.model.backbones.base import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec
from focus_ray.model.backbones.weights import hub_state


def convnext_key(key: str) -> str | None:
    part, _, rest = key.partition(".")
    if part == "classifier":
        return None
    number, _, rest = rest.partition(".")
    if part != "features" or not number.isdigit():
        return key
    layer, index = divmod(int(number), 2)  # the stem or a step down to half the size, then the stage's blocks
    return f"layer{layer + 1}.{index}.{rest}" if layer < 3 else None


def convnext_stages() -> tuple[nn.Module, nn.Module, nn.Module]:
    from torchvision import models

    # no blocks are dropped at random: the branches of a pair are to differ by their images alone
    net = models.convnext_tiny(weights=None, stochastic_depth_prob=0.0).features
    return nn.Sequential(net[0], net[1]), nn.Sequential(net[2], net[3]), nn.Sequential(net[4], net[5])


CONVNEXT_TINY = BackboneSpec(
    (96, 192, 384), IMAGENET_MEAN, IMAGENET_STD, convnext_stages, convnext_key, partial(hub_state, "convnext_tiny")
)
