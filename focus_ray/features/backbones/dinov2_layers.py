"""Module that builds the layers of DINOv2's vision transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus_ray.features.backbones.dinov2 import BLOCKS_PER_LAYER, PATCH_PX

_GRID = 37  # patches per side of the published position embeddings: 518 px
_HEAD_WIDTH = 64


class _TokenEmbedding(nn.Module):
    """Converts images (B, 3, H, W) to tokens (B, 1 + registers + H/14 * W/14, C): class token, registers, patches row by row."""

    def __init__(self, width: int, registers: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH_PX, PATCH_PX)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + _GRID**2, width))
        self.register_tokens = nn.Parameter(0.02 * torch.randn(1, registers, width)) if registers else None

    def forward(self, images: Tensor) -> Tensor:
        """Computes tokens from images (B, 3, H, W), see the class; class and patch tokens include position embeddings."""
        patches: Tensor = self.proj(images)
        count, _, height, width = patches.shape  # len(images) would become a constant in an exported network
        class_position, patch_positions = self.interpolate_position_embeddings(height, width)
        tokens = [(self.cls_token + class_position).expand(count, -1, -1)]
        if self.register_tokens is not None:  # registers have no position
            tokens.append(self.register_tokens.expand(count, -1, -1))
        return torch.cat([*tokens, patches.flatten(2).transpose(1, 2) + patch_positions], dim=1)

    def interpolate_position_embeddings(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Returns position embeddings of the class token (1, 1, C) and of height x width patches (1, height * width, C).

        If the number of patches differs from the published position embeddings, the embeddings are interpolated.
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


class _SelfAttention(nn.Module):
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


class _LayerScale(nn.Module):
    """Multiplies each channel by a learnt factor (LayerScale, arXiv 2103.17239)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


class _MultiLayerPerceptron(nn.Module):
    """Two linear layers with GELU between them, for each token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))  # type: ignore[no-any-return]


class _TransformerBlock(nn.Module):
    """A transformer block: attention, then a perceptron. The shape of the tokens (B, N, C) does not change."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = _SelfAttention(width), _MultiLayerPerceptron(width)
        self.ls1, self.ls2 = _LayerScale(width), _LayerScale(width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))  # type: ignore[no-any-return]


def build_dinov2_layers(width: int, registers: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Builds layers 1 to 3 of a vision transformer with random weights; layer 1 also embeds the images.

    Args:
        width: channels of a token.
        registers: number of register tokens.
    """
    layers = [[_TransformerBlock(width) for _ in range(BLOCKS_PER_LAYER)] for _ in range(3)]
    first = nn.Sequential(_TokenEmbedding(width, registers), *layers[0])
    return first, nn.Sequential(*layers[1]), nn.Sequential(*layers[2])
