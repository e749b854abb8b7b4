"""Module that builds the layers of EfficientNet-Lite."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from focus_ray.features.backbones.efficientnet_lite import LAYERS, Numbers

_STEM = 32
_GROUPS = (
    (1, 1, 3),
    (6, 2, 3),
    (6, 2, 5),
    (6, 2, 3),
    (6, 1, 5),
)  # expansion, stride and kernel of each group of blocks


class _ConvBatchNorm(nn.Module):
    """A convolution with TensorFlow's padding mode SAME, then batch norm and an optional ReLU6."""

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


class _InvertedResidualBlock(nn.Module):
    """An inverted residual block: a 1x1 expansion, a depthwise convolution, and a 1x1 projection."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = _ConvBatchNorm(inputs, width, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _ConvBatchNorm(width, width, kernel, stride, groups=width)
        self.project = _ConvBatchNorm(width, outputs, 1, act=False)
        self.has_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.has_residual else y


def build_efficientnet_layers(widths: Numbers, repeats: Numbers) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Builds layers 1 to 3 of an EfficientNet-Lite with random weights; layer 1 also contains the first convolution.

    Args:
        widths: output channels of each of the five groups of blocks.
        repeats: number of blocks in each group.
    """
    stages = []
    inputs = _STEM
    for number, groups in enumerate(LAYERS):
        layers: list[nn.Module] = [_ConvBatchNorm(3, _STEM, 3, stride=2)] if number == 0 else []
        for group in groups:
            expansion, stride, kernel = _GROUPS[group]
            for repeat in range(repeats[group]):
                layers.append(
                    _InvertedResidualBlock(inputs, widths[group], kernel, stride if repeat == 0 else 1, expansion)
                )
                inputs = widths[group]
        stages.append(nn.Sequential(*layers))
    return stages[0], stages[1], stages[2]
