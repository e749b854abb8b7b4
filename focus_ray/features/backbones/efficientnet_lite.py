"""Module for the backbones EfficientNet-Lite0, Lite1 and Lite2; Python packages contain their ImageNet weights.

A group is a series of blocks with the same number of output channels; the backbones have five groups in three layers.
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

from focus_ray.features.backbones.spec import BackboneSpec
from focus_ray.features.backbones.weights import load_weights_from_package

if TYPE_CHECKING:
    from torch import nn

LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3  # input normalisation that EfficientNet-Lite was trained with

# EfficientNet-Lite (github.com/tensorflow/tpu, efficientnet/lite): MBConv blocks without squeeze-and-excitation, ReLU6.
LAYERS = ((0, 1), (2,), (3, 4))  # numbers of the groups in each layer

Numbers = tuple[int, int, int, int, int]  # one for each group


def convert_efficientnet_weight_name(repeats: Numbers, key: str) -> str | None:
    """Converts the published name of a weight to the name in `Backbone`.

    Args:
        repeats: number of blocks in each group.
        key: published name.

    Returns: None if the weight is not used; an unknown name unchanged.
    """
    part, _, suffix = key.partition(".")
    if part in ("_conv_head", "_bn1", "_fc"):
        return None
    if part == "_conv_stem":
        return f"layer1.0.conv.{suffix}"
    if part == "_bn0":
        return f"layer1.0.norm.{suffix}"
    if part == "_blocks":
        number, _, suffix = suffix.partition(".")
        if not number.isdigit():
            return key
        block = int(number)
        ends = list(accumulate(sum(repeats[group] for group in groups) for groups in LAYERS))
        if block >= ends[2]:
            return None
        layer = next(index for index in range(3) if block < ends[index])
        index = block + 1 if layer == 0 else block - ends[layer - 1]
        module, _, leaf = suffix.partition(".")
        names = {
            "_expand_conv": "expand.conv",
            "_bn0": "expand.norm",
            "_depthwise_conv": "depthwise.conv",
            "_bn1": "depthwise.norm",
            "_project_conv": "project.conv",
            "_bn2": "project.norm",
        }
        return f"layer{layer + 1}.{index}.{names.get(module, module)}.{leaf}"
    return key


def build_lite_layers(widths: Numbers, repeats: Numbers) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Builds layers 1 to 3 with random weights; see `efficientnet_lite_layers.build_efficientnet_layers`."""
    from focus_ray.features.backbones.efficientnet_lite_layers import build_efficientnet_layers

    return build_efficientnet_layers(widths, repeats)


def _make_efficientnet_spec(name: str, widths: Numbers, repeats: Numbers) -> BackboneSpec:
    build_layers = partial(build_lite_layers, widths, repeats)
    convert_weight_name = partial(convert_efficientnet_weight_name, repeats)
    channels = (widths[1], widths[2], widths[4])
    load_state = partial(load_weights_from_package, name)
    # kernels of 5 x 5 need a map of at least 3 x 3 cells
    return BackboneSpec(
        channels, LITE_MEAN, LITE_STD, build_layers, convert_weight_name, load_state, min_reflected_px=48
    )


LITE0 = _make_efficientnet_spec("efficientnet_lite0", (16, 24, 40, 80, 112), (1, 2, 2, 3, 3))
LITE1 = _make_efficientnet_spec("efficientnet_lite1", (16, 24, 40, 80, 112), (1, 3, 3, 4, 4))
LITE2 = _make_efficientnet_spec("efficientnet_lite2", (16, 24, 48, 88, 120), (1, 3, 3, 4, 4))
