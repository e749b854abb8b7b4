"""The vision transformers of DINOv2 (arXiv 2304.07193; with registers, 2309.16588), with weights from a file.

Layers 1, 2 and 3 are blocks 1 to 3, 4 to 6 and 7 to 9 of 12; the last three blocks are not used. The features of a layer are its
patch tokens, without the final norm, one for each 14 x 14 pixels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus_ray.errors import WeightsError
from focus_ray.features.backbones.base import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec

PATCH_PX = 14
_BLOCKS_PER_LAYER = 3
_GRID = 37  # patches per side of the published position embeddings: 518 px
_HEAD_WIDTH = 64


class _Embedding(nn.Module):
    """Converts images (B, 3, H, W) to tokens (B, 1 + registers + H/14 * W/14, C): class token, registers, patches row by row."""

    def __init__(self, width: int, registers: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH_PX, PATCH_PX)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + _GRID**2, width))
        self.register_tokens = nn.Parameter(0.02 * torch.randn(1, registers, width)) if registers else None

    def forward(self, images: Tensor) -> Tensor:
        """Computes the tokens, with position embeddings."""
        patches: Tensor = self.proj(images)
        count, _, height, width = patches.shape  # len(images) would become a constant in an exported network
        class_position, patch_positions = self.positions(height, width)
        tokens = [(self.cls_token + class_position).expand(count, -1, -1)]
        if self.register_tokens is not None:  # registers have no position
            tokens.append(self.register_tokens.expand(count, -1, -1))
        return torch.cat([*tokens, patches.flatten(2).transpose(1, 2) + patch_positions], dim=1)

    def positions(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Returns position embeddings of the class token (1, 1, C) and of height x width patches (1, height * width, C).

        If the number of patches differs from the published embeddings, these are interpolated.
        """
        class_position, patch_positions = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        if (height, width) == (_GRID, _GRID):
            return class_position, patch_positions
        grid = patch_positions.float().transpose(1, 2).unflatten(2, (_GRID, _GRID))
        if self.register_tokens is not None:
            grid = F.interpolate(grid, size=(height, width), mode="bicubic", antialias=True)
        else:  # like in training: models without registers add 0.1 patches to the size of the interpolation
            factors = ((height + 0.1) / _GRID, (width + 0.1) / _GRID)
            grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
        return class_position, grid.flatten(2).transpose(1, 2).to(patch_positions.dtype)


class _Attention(nn.Module):
    """Multi-head self-attention of tokens (B, N, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        # queries, keys and values: (3, B, heads, N, _HEAD_WIDTH)
        heads = self.qkv(tokens).unflatten(2, (3, -1, _HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        return self.proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _Scale(nn.Module):
    """Multiplies each channel by a learnt factor (LayerScale, arXiv 2103.17239)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


class _Perceptron(nn.Module):
    """Two linear layers with GELU between them, for each token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """A transformer block; it keeps the shape of tokens (B, N, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = _Attention(width), _Perceptron(width)
        self.ls1, self.ls2 = _Scale(width), _Scale(width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))  # type: ignore[no-any-return]


def build_vit_layers(width: int, registers: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Builds layers 1 to 3 of a vision transformer with random weights; layer 1 also embeds the images.

    Args:
        width: channels of a token.
        registers: number of register tokens.
    """
    layers = [[_Block(width) for _ in range(_BLOCKS_PER_LAYER)] for _ in range(3)]
    first = nn.Sequential(_Embedding(width, registers), *layers[0])
    return first, nn.Sequential(*layers[1]), nn.Sequential(*layers[2])


def tokens_to_map(registers: int, tokens: Tensor) -> Tensor:
    """Converts tokens (B, 1 + registers + S * S, C) to a map of the patch tokens (B, C, S, S)."""
    patches = tokens[:, 1 + registers :].transpose(1, 2)
    side = math.isqrt(patches.shape[2])
    return patches.unflatten(2, (side, side))


def map_vit_key(key: str) -> str | None:
    """Converts the authors' name of a weight to its name in `Backbone`; None if the weight is not used."""
    part, _, suffix = key.partition(".")
    if part in ("mask_token", "norm", "head"):
        return None
    if part in ("cls_token", "pos_embed", "register_tokens"):
        return f"layer1.0.{part}"
    if part == "patch_embed":
        return f"layer1.0.{suffix}"
    number, _, suffix = suffix.partition(".")
    if part != "blocks" or not number.isdigit():
        return key
    layer, index = divmod(int(number), _BLOCKS_PER_LAYER)
    return f"layer{layer + 1}.{index + (layer == 0)}.{suffix}" if layer < 3 else None


# from names of Hugging Face to the authors' names; query, key and value are then merged into the authors' single tensor
_HUGGING_FACE = (
    (r"^(dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)


def to_author_names(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Renames weights of Hugging Face to the names of DINOv2's authors; returns weights of the authors unchanged."""
    if not any("encoder.layer." in key for key in state):
        return state
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in _HUGGING_FACE:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    for key in [key for key in renamed if ".attn.query." in key]:
        names = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(name in renamed for name in names):
            renamed[key.replace(".query.", ".qkv.")] = torch.cat([renamed.pop(name) for name in names])
    return renamed


def refuse_default_weights(name: str, hugging_face: str) -> Mapping[str, Tensor]:
    """Raises WeightsError, because DINOv2 has no default weights; the message names the files to use."""
    raise WeightsError(
        f"model.backbone={name} has no default weights: set model.weights to the {name.removesuffix('_reg')}"
        f"{'_reg4' if name.endswith('_reg') else ''}_pretrain.pth of DINOv2's authors, or to the model.safetensors of "
        f"{hugging_face} on Hugging Face"
    )


def _spec(name: str, width: int, registers: int, hugging_face: str) -> BackboneSpec:
    return BackboneSpec(
        (width, width, width),
        IMAGENET_MEAN,
        IMAGENET_STD,
        partial(build_vit_layers, width, registers),
        map_vit_key,
        partial(refuse_default_weights, name, hugging_face),
        partial(tokens_to_map, registers),
        to_author_names,
    )


VITS14 = _spec("dinov2_vits14", 384, 0, "facebook/dinov2-small")
VITB14 = _spec("dinov2_vitb14", 768, 0, "facebook/dinov2-base")
VITS14_REG = _spec("dinov2_vits14_reg", 384, 4, "facebook/dinov2-with-registers-small")
VITB14_REG = _spec("dinov2_vitb14_reg", 768, 4, "facebook/dinov2-with-registers-base")
