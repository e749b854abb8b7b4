"""EfficientNet-Lite0, Lite1 and Lite2; their ImageNet weights are in Python packages."""

from __future__ import annotations

from functools import partial
from itertools import accumulate

import torch.nn.functional as F
from torch import Tensor, nn

from focus_ray.features.backbones.base import BackboneSpec
from focus_ray.features.backbones.weights import load_packaged_state

LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3  # input normalisation that EfficientNet-Lite was trained with

# EfficientNet-Lite (github.com/tensorflow/tpu, efficientnet/lite): MBConv blocks without squeeze-and-excitation, ReLU6.
_STEM = 32
_GROUPS = (
    (1, 1, 3),
    (6, 2, 3),
    (6, 2, 5),
    (6, 2, 3),
    (6, 1, 5),
)  # expansion, stride and kernel of each group of blocks
_LAYERS = ((0, 1), (2,), (3, 4))  # numbers of the groups in each layer

Numbers = tuple[int, int, int, int, int]  # one for each group


def map_lite_key(repeats: Numbers, key: str) -> str | None:
    """Converts the published name of a weight to its name in `Backbone`; None if the weight is not used.

    Args: repeats: number of blocks in each group.
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
        ends = list(accumulate(sum(repeats[group] for group in groups) for groups in _LAYERS))
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


class _ConvNorm(nn.Module):
    """A convolution with the SAME padding of TensorFlow, then batch norm and an optional ReLU6."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True
    ) -> None:
        super().__init__()
        self.padding_mode = "zeros"
        # for an even input and stride 2, SAME adds kernel - 2 pixels in total, one more at the end than at the start
        self.uneven_padding = (kernel // 2 - 1, kernel // 2) * 2 if stride == 2 else None
        padding = 0 if stride == 2 else kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)
        self.act = nn.ReLU6() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.uneven_padding is not None:
            x = F.pad(x, self.uneven_padding, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        return self.act(self.norm(self.conv(x)))  # type: ignore[no-any-return]


class _MBConv(nn.Module):
    """An inverted residual block: a 1x1 expansion, a depthwise convolution, and a 1x1 projection."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = _ConvNorm(inputs, width, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _ConvNorm(width, width, kernel, stride, groups=width)
        self.project = _ConvNorm(width, outputs, 1, act=False)
        self.has_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.has_residual else y


def build_lite_layers(widths: Numbers, repeats: Numbers) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Builds layers 1 to 3 of an EfficientNet-Lite with random weights; layer 1 contains the stem.

    Args:
        widths: output channels of each group.
        repeats: number of blocks in each group.
    """
    stages = []
    inputs = _STEM
    for number, groups in enumerate(_LAYERS):
        layers: list[nn.Module] = [_ConvNorm(3, _STEM, 3, stride=2)] if number == 0 else []
        for group in groups:
            expansion, stride, kernel = _GROUPS[group]
            for repeat in range(repeats[group]):
                layers.append(_MBConv(inputs, widths[group], kernel, stride if repeat == 0 else 1, expansion))
                inputs = widths[group]
        stages.append(nn.Sequential(*layers))
    return stages[0], stages[1], stages[2]


def _spec(name: str, widths: Numbers, repeats: Numbers) -> BackboneSpec:
    build_layers, map_key = partial(build_lite_layers, widths, repeats), partial(map_lite_key, repeats)
    channels = (widths[1], widths[2], widths[4])
    return BackboneSpec(channels, LITE_MEAN, LITE_STD, build_layers, map_key, partial(load_packaged_state, name))


LITE0 = _spec("efficientnet_lite0", (16, 24, 40, 80, 112), (1, 2, 2, 3, 3))
LITE1 = _spec("efficientnet_lite1", (16, 24, 40, 80, 112), (1, 3, 3, 4, 4))
LITE2 = _spec("efficientnet_lite2", (16, 24, 48, 88, 120), (1, 3, 3, 4, 4))
