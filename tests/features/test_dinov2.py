"""DINOv2 and DINOv3 equal slow references and the library transformers, and read files of their authors and of Hugging Face."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from focus_ray.errors import WeightsError
from focus_ray.features.backbones.base import build_backbone, build_meta_backbone, load_published_weights

RAW_LEVELS = (2, 5, 8)  # blocks whose tokens are the features of earlier versions
LEVELS = (3, 6, 9, 11)  # blocks whose normed tokens are features


def published_shapes(width: int, registers: int, depth: int = 12) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of the weights in the authors' files."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + 37 * 37, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if registers:
        shapes["register_tokens"] = (1, registers, width)
    for number in range(depth):
        for name, (outputs, inputs) in {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
        }.items():
            shapes[f"blocks.{number}.{name}.weight"] = (outputs, inputs)
            shapes[f"blocks.{number}.{name}.bias"] = (outputs,)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{number}.{name}"] = (width,)
    return shapes


def draw_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        state[name] = value / math.sqrt(math.prod(shape[1:])) if len(shape) == 2 else 0.3 * value
    return state


@pytest.fixture(scope="module", params=[0, 4], ids=["plain", "registers"])
def named_weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Returns the name of a backbone, and a file with random weights for it."""
    path = tmp_path_factory.mktemp("weights") / "pretrain.pth"
    torch.save(draw_weights(published_shapes(384, request.param)), path)
    return "dinov2_vits14_reg" if request.param else "dinov2_vits14", path


def images(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def cubic(distance: NDArray[np.float64], a: float = -0.75) -> NDArray[np.float64]:
    """Computes the cubic convolution kernel of Keys."""
    x = np.abs(distance)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    return np.where(x <= 1, near, np.where(x < 2, a * (x**3 - 5 * x**2 + 8 * x - 4), 0.0))


def interpolated_plain(grid: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Interpolates (37, 37, C) to (side, side, C), for a grid that is 0.1 patches too small, as in the published training."""
    weights = np.zeros((side, 37))
    for row in range(side):
        position = (row + 0.5) / ((side + 0.1) / 37) - 0.5
        for tap in range(math.floor(position) - 1, math.floor(position) + 3):
            weights[row, min(max(tap, 0), 36)] += cubic(np.float64(position - tap))
    return np.einsum("ia,jb,abc->ijc", weights, weights, grid)


def interpolated_antialiased(grid: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Resizes each channel (37, 37) by Pillow."""
    channels = [Image.fromarray(channel.astype(np.float32)) for channel in np.moveaxis(grid, 2, 0)]
    resized = [np.asarray(channel.resize((side, side), Image.Resampling.BICUBIC)) for channel in channels]
    return np.stack(resized, axis=2)


def reference(state: dict[str, Tensor], x: Tensor, blocks: Sequence[int], normed: bool) -> list[Tensor]:
    """Computes the patch tokens after some blocks from the published names, one head at a time, in float64."""
    state = {name: value.double() for name, value in state.items()}
    x = x.double()
    side, width = x.shape[2] // 14, state["norm.weight"].shape[0]
    patches = x.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    tokens = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    grid = state["pos_embed"][0, 1:].reshape(37, 37, width).numpy()
    registers = state.get("register_tokens", torch.zeros(1, 0, width, dtype=torch.float64))
    positions = interpolated_antialiased(grid, side) if registers.shape[1] else interpolated_plain(grid, side)
    tokens = tokens + torch.from_numpy(positions).reshape(side * side, width)
    first = state["cls_token"] + state["pos_embed"][:, :1]
    tokens = torch.cat([first.expand(len(x), -1, -1), registers.expand(len(x), -1, -1), tokens], dim=1)

    def linear(tokens: Tensor, name: str) -> Tensor:
        return tokens @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(tokens: Tensor, name: str) -> Tensor:
        centred = tokens - tokens.mean(2, keepdim=True)
        scaled = centred / torch.sqrt(centred.square().mean(2, keepdim=True) + 1e-6)
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    levels = []
    for number in range(blocks[-1] + 1):
        block = f"blocks.{number}"
        query, key, value = linear(norm(tokens, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, dim=2)
        heads = []
        for start in range(0, width, 64):
            head = slice(start, start + 64)
            attention = torch.softmax(query[..., head] @ key[..., head].transpose(1, 2) / 8, dim=2)
            heads.append(attention @ value[..., head])
        tokens = tokens + linear(torch.cat(heads, dim=2), f"{block}.attn.proj") * state[f"{block}.ls1.gamma"]
        hidden = linear(norm(tokens, f"{block}.norm2"), f"{block}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        tokens = tokens + linear(hidden, f"{block}.mlp.fc2") * state[f"{block}.ls2.gamma"]
        if number in blocks:
            patches = tokens[:, 1 + registers.shape[1] :]
            if normed:
                patches = norm(patches, "norm")
                patches = patches / patches.square().sum(2, keepdim=True).sqrt()
            levels.append(patches.transpose(1, 2).reshape(len(x), width, side, side))
    return levels


def test_features_equal_a_reference_from_the_published_names(named_weights: tuple[str, Path]) -> None:
    name, path = named_weights
    state = torch.load(path, weights_only=True)
    levels = reference(state, images(70), LEVELS, normed=True)
    normed = [levels[0], levels[1], torch.cat(levels[2:], dim=1)]
    raw = reference(state, images(70), RAW_LEVELS, normed=False)
    with torch.inference_mode():
        for kind, expected_levels in ((name, normed), (f"{name}_raw", raw)):
            features = build_backbone(kind, str(path)).eval()(images(70))
            for level, expected in zip(features, expected_levels, strict=True):
                assert float((level - expected).norm() / expected.norm()) < 1e-5, kind


TRANSFORMERS = {  # backbone -> class in transformers, the sizes that its settings need, and the side of the images
    # at another side, transformers interpolates the position embeddings otherwise than the authors
    "dinov2_vits14": ("Dinov2", {"image_size": 518, "patch_size": 14}, 518),
    "dinov2_vits14_reg": ("Dinov2WithRegisters", {"image_size": 518, "patch_size": 14}, 70),
    "dinov3_vits16": ("DINOv3ViT", {"num_register_tokens": 4}, 80),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_features_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    kind, sizes, side_px = TRANSFORMERS[name]
    config = getattr(transformers, f"{kind}Config")(hidden_size=384, num_attention_heads=6, **sizes)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = 1 / math.sqrt(parameter.shape[1]) if parameter.ndim == 2 else 0.3
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path)
    backbone = build_backbone(name, str(tmp_path / "model.safetensors")).eval()
    num_prefix_tokens = 1 + (0 if name == "dinov2_vits14" else 4)
    with torch.inference_mode():
        hidden = model(images(side_px, 1), output_hidden_states=True).hidden_states
        norm = model.norm if kind == "DINOv3ViT" else model.layernorm
        tokens = [F.normalize(norm(hidden[block + 1])[:, num_prefix_tokens:], dim=2) for block in LEVELS]
        features = backbone(images(side_px, 1))
    maps = [part.transpose(1, 2).unflatten(2, features[0].shape[2:]) for part in tokens]
    for level, expected in zip(features, [maps[0], maps[1], torch.cat(maps[2:], dim=1)], strict=True):
        assert float((level - expected).norm() / expected.norm()) < 1e-5


def dinov3_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames weights of Hugging Face to the names of DINOv3's authors, whose keys have a masked bias."""
    replacements = {
        r"^embeddings\.patch_embeddings\.": "patch_embed.proj.",
        r"^embeddings\.register_tokens$": "storage_tokens",
        r"^embeddings\.": "",
        r"^(model\.)?layer\.": "blocks.",
        r"attention\.o_proj": "attn.proj",
        r"mlp\.up_proj": "mlp.fc1",
        r"mlp\.down_proj": "mlp.fc2",
        r"layer_scale([12])\.lambda1": r"ls\1.gamma",
    }
    result = {"rope_embed.periods": torch.ones(16)}
    for key, value in state.items():
        for pattern, replacement in replacements.items():
            key = re.sub(pattern, replacement, key)
        result[key] = value
    for number in range(12):
        block = f"blocks.{number}.attention."
        weights = [result.pop(f"{block}{part}_proj.weight") for part in "qkv"]
        query, value = result.pop(f"{block}q_proj.bias"), result.pop(f"{block}v_proj.bias")
        name = f"blocks.{number}.attn.qkv"
        result[f"{name}.weight"] = torch.cat(weights)
        result[f"{name}.bias"] = torch.cat([query, torch.full_like(query, 7.0), value])  # masked
        result[f"{name}.bias_mask"] = torch.cat([torch.ones(384), torch.zeros(384), torch.ones(384)])
    return result


def test_dinov3_reads_files_of_its_authors(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(num_register_tokens=4))
    model.save_pretrained(tmp_path)
    torch.save(dinov3_names(load_file(tmp_path / "model.safetensors")), tmp_path / "authors.pth")
    states = [
        build_backbone("dinov3_vits16", str(tmp_path / file)).state_dict()
        for file in ("authors.pth", "model.safetensors")
    ]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    with pytest.raises(WeightsError, match=r"dinov3_vits16 .*facebook/dinov3-vits16-pretrain-lvd1689m"):
        build_backbone("dinov3_vits16")


HUGGING_FACE = {  # names of the authors -> names with which transformers 5 saves a model
    r"^(cls_token|mask_token|register_tokens)$": r"embeddings.\1",
    r"^pos_embed$": "embeddings.position_embeddings",
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^norm\.": "layernorm.",
    r"^blocks\.": "encoder.layer.",
    r"attn\.proj": "attention.output.dense",
    r"ls([12])\.gamma": r"layer_scale\1.lambda1",
}


def hugging_face_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames weights to the names of Hugging Face, where query, key and value are three tensors."""
    result = {}
    for key, value in state.items():
        for pattern, replacement in HUGGING_FACE.items():
            key = re.sub(pattern, replacement, key)
        if ".attn.qkv." not in key:
            result[key] = value
            continue
        for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
            result[key.replace("attn.qkv", f"attention.attention.{part}")] = piece
    return result


def test_names_of_hugging_face_are_converted_to_names_of_the_authors(
    named_weights: tuple[str, Path], tmp_path: Path
) -> None:
    name, path = named_weights
    state = torch.load(path, weights_only=True)
    assert not set(state) & set(hugging_face_names(state))
    save_file({key: value.contiguous() for key, value in hugging_face_names(state).items()}, tmp_path / "m.safetensors")
    from_authors, from_hugging_face = (
        build_backbone(name, str(file)).state_dict() for file in (path, tmp_path / "m.safetensors")
    )
    assert all(torch.equal(value, from_hugging_face[key]) for key, value in from_authors.items())


def test_the_larger_models_have_the_published_names_and_shapes() -> None:
    for registers, name in ((0, "dinov2_vitb14"), (4, "dinov2_vitb14_reg")):
        with torch.device("meta"):
            state = {key: torch.empty(shape) for key, shape in published_shapes(768, registers).items()}
        load_published_weights(build_meta_backbone(name), state, source="here")


def test_missing_weights_and_weights_of_another_model_are_refused(named_weights: tuple[str, Path]) -> None:
    name, path = named_weights
    file = "dinov2_vits14_reg4_pretrain.pth" if name.endswith("_reg") else "dinov2_vits14_pretrain.pth"
    with pytest.raises(WeightsError, match=rf"model\.backbone={name} .*{file}"):
        build_backbone(name)
    other = "dinov2_vits14" if name.endswith("_reg") else "dinov2_vits14_reg"
    with pytest.raises(WeightsError, match=rf"{other}: .*register_tokens"):
        build_backbone(other, str(path))
    with pytest.raises(WeightsError, match=name.replace("vits", "vitb")):
        build_backbone(name.replace("vits", "vitb"), str(path))


def test_all_weights_have_a_gradient(named_weights: tuple[str, Path]) -> None:
    name, path = named_weights
    backbone = build_backbone(name, str(path)).train()
    # a sum of squares would have no gradient, because each token has length 1
    sum((level * torch.randn(level.shape)).sum() for level in backbone(images(42))).backward()  # type: ignore[union-attr]
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in backbone.parameters())


def test_every_token_of_every_block_has_length_1(named_weights: tuple[str, Path]) -> None:
    name, path = named_weights
    with torch.inference_mode():
        levels = build_backbone(name, str(path)).eval()(images(42))
    for level in (levels[0], levels[1], *levels[2].chunk(2, dim=1)):
        torch.testing.assert_close(level.norm(dim=1), torch.ones(2, 3, 3))
