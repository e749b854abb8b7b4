"""DINOv2's vision transformers (arXiv 2304.07193; with registers, 2309.16588), from a file of their published weights.

Layers 1, 2 and 3 are blocks 1 to 3, 4 to 6 and 7 to 9 of 12; the rest is left out. Each layer's features are its patch tokens,
before the last norm, at places of 14 x 14 pixels.
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
from focus_ray.model.backbones.base import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec

PATCH_PX = 14
_BLOCKS_A_LAYER = 3
_GRID = 37  # patches a side that the position embeddings are published for: 518 px
_HEAD_WIDTH = 64


class _Embedding(nn.Module):
    """Images (B, 3, H, W) -> tokens (B, 1 + registers + H/14 * W/14, C): the class's, registers, patches by rows."""

    def __init__(self, width: int, registers: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH_PX, PATCH_PX)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + _GRID**2, width))
        self.register_tokens = nn.Parameter(0.02 * torch.randn(1, registers, width)) if registers else None

    def forward(self, images: Tensor) -> Tensor:
        patches: Tensor = self.proj(images)
        count, _, height, width = patches.shape  # len(images) would be a constant of an exported network
        at_class, at_patches = self.positions(height, width)
        tokens = [(self.cls_token + at_class).expand(count, -1, -1)]
        if self.register_tokens is not None:  # they have no position
            tokens.append(self.register_tokens.expand(count, -1, -1))
        return torch.cat([*tokens, patches.flatten(2).transpose(1, 2) + at_patches], dim=1)

    def positions(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Position embeddings of the class (1, 1, C) and of so many patches (1, height * width, C)."""
        at_class, at_patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        if (height, width) == (_GRID, _GRID):
            return at_class, at_patches
        grid = at_patches.float().transpose(1, 2).unflatten(2, (_GRID, _GRID))
        if self.register_tokens is not None:
            grid = F.interpolate(grid, size=(height, width), mode="bicubic", antialias=True)
        else:  # as they were trained: without registers, scaled by a tenth of a patch more than they cover
            factors = ((height + 0.1) / _GRID, (width + 0.1) / _GRID)
            grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
        return at_class, grid.flatten(2).transpose(1, 2).to(at_patches.dtype)


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        heads = self.qkv(tokens).unflatten(2, (3, -1, _HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        return self.proj(found.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _Scale(nn.Module):
    """A factor a channel (LayerScale, arXiv 2103.17239)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


class _Perceptron(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """Tokens (B, N, C) -> the same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = _Attention(width), _Perceptron(width)
        self.ls1, self.ls2 = _Scale(width), _Scale(width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))  # type: ignore[no-any-return]


def vit_stages(width: int, registers: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    layers = [[_Block(width) for _ in range(_BLOCKS_A_LAYER)] for _ in range(3)]
    first = nn.Sequential(_Embedding(width, registers), *layers[0])
    return first, nn.Sequential(*layers[1]), nn.Sequential(*layers[2])


def patch_map(registers: int, tokens: Tensor) -> Tensor:
    """(B, 1 + registers + S * S, C) -> the patches' (B, C, S, S)."""
    patches = tokens[:, 1 + registers :].transpose(1, 2)
    side = math.isqrt(patches.shape[2])
    return patches.unflatten(2, (side, side))


def vit_key(key: str) -> str | None:
    part, _, rest = key.partition(".")
    if part in ("mask_token", "norm", "head"):
        return None
    if part in ("cls_token", "pos_embed", "register_tokens"):
        return f"layer1.0.{part}"
    if part == "patch_embed":
        return f"layer1.0.{rest}"
    number, _, rest = rest.partition(".")
    if part != "blocks" or not number.isdigit():
        return key
    layer, index = divmod(int(number), _BLOCKS_A_LAYER)
    return f"layer{layer + 1}.{index + (layer == 0)}.{rest}" if layer < 3 else None


# Hugging Face's names -> the authors'; the three of attention's input are one tensor there
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


def authors_names(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights under the names of DINOv2's authors or of Hugging Face -> under the authors'."""
    if not any("encoder.layer." in key for key in state):
        return state
    renamed = {}
    for key, value in state.items():
        for pattern, own in _HUGGING_FACE:
            key = re.sub(pattern, own, key)
        renamed[key] = value
    for key in [key for key in renamed if ".attn.query." in key]:
        names = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(name in renamed for name in names):
            renamed[key.replace(".query.", ".qkv.")] = torch.cat([renamed.pop(name) for name in names])
    return renamed


def no_state(name: str, hugging_face: str) -> Mapping[str, Tensor]:
    raise WeightsError(
        f"model.backbone={name} takes its weights from a file alone: set model.weights to the {name.removesuffix('_reg')}"
        f"{'_reg4' if name.endswith('_reg') else ''}_pretrain.pth of DINOv2's authors, or to the model.safetensors of "
        f"{hugging_face} on Hugging Face"
    )


def _spec(name: str, width: int, registers: int, hugging_face: str) -> BackboneSpec:
    return BackboneSpec(
        (width, width, width),
        IMAGENET_MEAN,
        IMAGENET_STD,
        partial(vit_stages, width, registers),
        vit_key,
        partial(no_state, name, hugging_face),
        partial(patch_map, registers),
        authors_names,
    )


VITS14 = _spec("dinov2_vits14", 384, 0, "facebook/dinov2-small")
VITB14 = _spec("dinov2_vitb14", 768, 0, "facebook/dinov2-base")
VITS14_REG = _spec("dinov2_vits14_reg", 384, 4, "facebook/dinov2-with-registers-small")
VITB14_REG = _spec("dinov2_vitb14_reg", 768, 4, "facebook/dinov2-with-registers-base")
