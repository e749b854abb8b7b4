"""Module for the description of a kind of backbone (a pretrained network).

Settings are checked without torch, so the module of a backbone imports torch only inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _return_unchanged(value: Any) -> Any:
    """Returns the value unchanged."""
    return value


@dataclass(frozen=True)
class BackboneSpec:
    """Describes a kind of backbone. Its key in `BACKBONES` is the value of model.backbone.

    channels: numbers of channels of layers 1, 2, 3.
    mean, std: input normalisation, for images in 0..1.
    build_layers: function that builds the three layers. Each layer takes the output of the previous layer.
    convert_weight_name: function from the published name of a weight to its name in `Backbone`; None for a weight that is not
        needed. An unknown name is returned unchanged.
    load_default_weights: function that loads the default weights: published name -> weight. It raises WeightsError if they
        cannot be loaded.
    convert_to_feature_map: function that converts the output of a layer to features (B, C, H, W).
    rename_weights: function that renames weights of another publisher to the names that `convert_weight_name` expects.
    build_norm: function that builds a module which normalises the output of every layer before `convert_to_feature_map`; the next
        layer takes the output without it. Names of its weights start with "norm.". None: there is no such module.
    strides: input pixels per cell of the feature maps of layers 1, 2 and 3; the side of the input is a multiple of the stride of
        layer 3.
    min_reflected_px: smallest side of the input with padding=reflect. With a smaller input, a kernel would have to mirror more
        cells than the last feature map has.
    passes_feature_maps: whether the layers exchange feature maps, which can be aligned between layers. Transformers exchange
        tokens.
    hub_weights: the default weights in torchvision.models, as in "ResNet18_Weights.IMAGENET1K_V1"; None if they are not there.
    """

    channels: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    build_layers: Callable[[], tuple[nn.Module, nn.Module, nn.Module]]
    convert_weight_name: Callable[[str], str | None]
    load_default_weights: Callable[[], Mapping[str, Tensor]]
    convert_to_feature_map: Callable[[Tensor], Tensor] = _return_unchanged
    rename_weights: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = _return_unchanged
    build_norm: Callable[[], nn.Module] | None = None
    strides: tuple[int, int, int] = (4, 8, 16)
    min_reflected_px: int = 32
    passes_feature_maps: bool = True
    hub_weights: str | None = None
