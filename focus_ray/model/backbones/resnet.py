"""ResNet-18 and Wide-ResNet-50-2, as torchvision has them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from focus_ray.errors import WeightsError
from focus_ray.model.backbones.base import BackboneSpec

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def hub_weights(name: str) -> Any:
    """torchvision's weights of a backbone, an enum with their `url`; None where the backbone has others."""
    from torchvision import models

    # V1 weights: the ones that PaDiM, RegAD and PatchCore report with
    return {
        "resnet18": models.ResNet18_Weights.IMAGENET1K_V1,
        "wide_resnet50_2": models.Wide_ResNet50_2_Weights.IMAGENET1K_V1,
    }.get(name)


def hub_state(name: str) -> Mapping[str, Tensor]:
    weights = hub_weights(name)
    try:
        return weights.get_state_dict(progress=False, check_hash=True)  # type: ignore[no-any-return]
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"model.weights=default: cannot get torchvision's {name} weights from {weights.url} ({error}). Without a way to "
            f"its hub, set model.weights to a downloaded file, put the file into {torch.hub.get_dir()}/checkpoints, or set "
            "model.backbone=efficientnet_lite0, whose weights come in a package"
        ) from error


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
WIDE_RESNET50_2 = _spec("wide_resnet50_2", (256, 512, 1024))
