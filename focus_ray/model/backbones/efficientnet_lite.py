"""EfficientNet-Lite0 to Lite2, whose ImageNet weights come in packages."""

from __future__ import annotations

from functools import partial
from itertools import accumulate

import torch.nn.functional as F
from torch import Tensor, nn

from focus_ray.model.backbones.base import BackboneSpec
from focus_ray.model.backbones.weights import packaged_state

LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3  # how EfficientNet-Lite was trained

# EfficientNet-Lite (github.com/tensorflow/tpu, efficientnet/lite): MBConv blocks without squeeze-and-excitation, ReLU6.
_STEM = 32
_GROUPS = ((1, 1, 3), (6, 2, 3), (6, 2, 5), (6, 2, 3), (6, 1, 5))  # of blocks: expansion, stride, kernel
_LAYERS = ((0, 1), (2,), (3, 4))  # groups of each layer

Numbers = tuple[int, int, int, int, int]  # one a group


def lite_key(repeats: Numbers, key: str) -> str | None:
    """A published weight's name to its name here; `repeats`: blocks of each group."""
    part, _, rest = key.partition(".")
    if part in ("_conv_head", "_bn1", "_fc"):
        return None
    if part == "_conv_stem":
        return f"layer1.0.conv.{rest}"
    if part == "_bn0":
        return f"layer1.0.norm.{rest}"
    if part == "_blocks":
        number, _, rest = rest.partition(".")
        if not number.isdigit():
            return key
        block = int(number)
        ends = list(accumulate(sum(repeats[group] for group in groups) for groups in _LAYERS))
        if block >= ends[2]:
            return None
        layer = next(index for index in range(3) if block < ends[index])
        index = block + 1 if layer == 0 else block - ends[layer - 1]
        module, _, leaf = rest.partition(".")
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
    """Convolution with TensorFlow's SAME padding, batch norm, optional ReLU6."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True
    ) -> None:
        super().__init__()
        self.padding_mode = "zeros"
        # SAME pads an even input with stride 2 by kernel - 2, the odd pixel at the end
        self.uneven = (kernel // 2 - 1, kernel // 2) * 2 if stride == 2 else None
        padding = 0 if stride == 2 else kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)
        self.act = nn.ReLU6() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.uneven is not None:
            x = F.pad(x, self.uneven, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        return self.act(self.norm(self.conv(x)))  # type: ignore[no-any-return]


class _MBConv(nn.Module):
    """Inverted residual: expand, depthwise, project."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = _ConvNorm(inputs, width, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _ConvNorm(width, width, kernel, stride, groups=width)
        self.project = _ConvNorm(width, outputs, 1, act=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


def lite_stages(widths: Numbers, repeats: Numbers) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The three layers; `widths`: output channels of each group, `repeats`: its blocks."""
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
    stages, own_key = partial(lite_stages, widths, repeats), partial(lite_key, repeats)
    channels = (widths[1], widths[2], widths[4])
    return BackboneSpec(channels, LITE_MEAN, LITE_STD, stages, own_key, partial(packaged_state, name))


LITE0 = _spec("efficientnet_lite0", (16, 24, 40, 80, 112), (1, 2, 2, 3, 3))
LITE1 = _spec("efficientnet_lite1", (16, 24, 40, 80, 112), (1, 3, 3, 4, 4))
LITE2 = _spec("efficientnet_lite2", (16, 24, 48, 88, 120), (1, 3, 3, 4, 4))
