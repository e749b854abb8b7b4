"""Module that builds the layers of the vision transformers DINOv2 and DINOv3.

Tokens are feature vectors: a class token for the whole image, register tokens (additional ones, without position), and a patch
token for each square of pixels, row by row. The class token and the registers are called prefix tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_GRID = 37  # patches per side of DINOv2's published position embeddings: 518 px
_HEAD_WIDTH = 64
_ROTARY_BASE = 100.0  # base of the periods of DINOv3's rotary position embeddings


@dataclass(frozen=True)
class TransformerShape:
    """The shape of a vision transformer.

    width: channels of a token.
    num_registers: number of register tokens.
    patch_px: side of the square of pixels that becomes a patch token.
    is_rotary: True: each attention rotates queries and keys by the position of the patch (DINOv3). False: position embeddings
        are added to the tokens at the input (DINOv2).
    """

    width: int
    num_registers: int
    patch_px: int
    is_rotary: bool

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patch tokens."""
        return 1 + self.num_registers

    @property
    def norm_eps(self) -> float:
        """The constant that the layer norms add to the variance."""
        return 1e-5 if self.is_rotary else 1e-6


class _TokenEmbedding(nn.Module):
    """Converts images (B, 3, H, W) to tokens (B, 1 + registers + patches, C): class token, registers, patches row by row."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        width, registers = shape.width, shape.num_registers
        self.proj = nn.Conv2d(3, width, shape.patch_px, shape.patch_px)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = None if shape.is_rotary else nn.Parameter(0.02 * torch.randn(1, 1 + _GRID**2, width))
        self.register_tokens = nn.Parameter(0.02 * torch.randn(1, registers, width)) if registers else None

    def forward(self, images: Tensor) -> Tensor:
        """Computes tokens from images (B, 3, H, W), see the class. Position embeddings, if there are any, are added."""
        patches: Tensor = self.proj(images)
        count, _, height, width = patches.shape  # len(images) would become a constant in an exported network
        class_token: Tensor = self.cls_token
        patch_tokens = patches.flatten(2).transpose(1, 2)
        if self.pos_embed is not None:
            class_position, patch_positions = self.interpolate_position_embeddings(self.pos_embed, height, width)
            class_token, patch_tokens = class_token + class_position, patch_tokens + patch_positions
        tokens = [class_token.expand(count, -1, -1)]
        if self.register_tokens is not None:  # registers have no position
            tokens.append(self.register_tokens.expand(count, -1, -1))
        return torch.cat([*tokens, patch_tokens], dim=1)

    def interpolate_position_embeddings(self, embeddings: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Returns position embeddings of the class token (1, 1, C) and of height x width patches (1, height * width, C).

        If the number of patches differs from the published position embeddings, the embeddings are interpolated.
        """
        class_position, patch_positions = embeddings[:, :1], embeddings[:, 1:]
        if (height, width) == (_GRID, _GRID):
            return class_position, patch_positions
        grid = patch_positions.float().transpose(1, 2).unflatten(2, (_GRID, _GRID))
        if self.register_tokens is not None:
            grid = F.interpolate(grid, size=(height, width), mode="bicubic", antialias=True)
        else:  # like in training: models without registers add 0.1 patches to the size of the interpolation
            factors = ((height + 0.1) / _GRID, (width + 0.1) / _GRID)
            grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
        return class_position, grid.flatten(2).transpose(1, 2).to(patch_positions.dtype)


def compute_rotation_angles(side: int) -> Tensor:
    """Computes the angles (side * side, _HEAD_WIDTH) by which the channels of a patch are rotated, row by row.

    The position of a patch is the centre of the patch, scaled to -1..1 in both directions (arXiv 2508.10104). A quarter of the
    channels has angles for the row, the next quarter for the column; the second half repeats the first half.
    """
    quarter = _HEAD_WIDTH // 4
    periods = _ROTARY_BASE ** (torch.arange(quarter) / quarter)
    centres = 2 * (torch.arange(side) + 0.5) / side - 1
    angles = 2 * math.pi * centres[:, None] / periods  # (side, quarter)
    rows, columns = angles[:, None].expand(side, side, -1), angles[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1).tile(2)


class _SelfAttention(nn.Module):
    """Multi-head self-attention of tokens (B, N, C)."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.shape = shape
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.proj = nn.Linear(shape.width, shape.width)

    def forward(self, tokens: Tensor) -> Tensor:
        # queries, keys and values: (3, B, heads, N, _HEAD_WIDTH)
        heads = self.qkv(tokens).unflatten(2, (3, -1, _HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        queries, keys, values = heads[0], heads[1], heads[2]
        if self.shape.is_rotary:
            queries, keys = self._rotate_patches(queries), self._rotate_patches(keys)
        attended = F.scaled_dot_product_attention(queries, keys, values)
        return self.proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _rotate_patches(self, heads: Tensor) -> Tensor:
        """Rotates the channels of the patch tokens in (B, heads, N, _HEAD_WIDTH) by their positions."""
        prefix, patches = heads[:, :, : self.shape.num_prefix_tokens], heads[:, :, self.shape.num_prefix_tokens :]
        angles = compute_rotation_angles(math.isqrt(patches.shape[2])).to(heads.device)
        first, second = patches.chunk(2, dim=3)
        quarter_turn = torch.cat([-second, first], dim=3)
        rotated = patches * angles.cos().to(heads.dtype) + quarter_turn * angles.sin().to(heads.dtype)
        return torch.cat([prefix, rotated], dim=2)


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

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        width = shape.width
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=shape.norm_eps), nn.LayerNorm(width, eps=shape.norm_eps)
        self.attn, self.mlp = _SelfAttention(shape), _MultiLayerPerceptron(width)
        self.ls1, self.ls2 = _LayerScale(width), _LayerScale(width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))  # type: ignore[no-any-return]


class _TwoOutputs(nn.Module):
    """Two groups of blocks in sequence. Returns the tokens after the first and after the second group: (B, N, 2 C)."""

    def __init__(self, first: nn.Sequential, second: nn.Sequential) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, tokens: Tensor) -> Tensor:
        middle = self.first(tokens)
        return torch.cat([middle, self.second(middle)], dim=2)


class TokenNorm(nn.LayerNorm):
    """The final norm of a transformer, for the tokens of any block; then L2 normalisation.

    The squared distance of two normalised tokens is twice their cosine distance. Without the norm, a few channels with large
    values would decide distances, ridges and random projections.
    """

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__(shape.width, eps=shape.norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalises tokens (B, N, G * C) in G groups of C channels. Returns float32."""
        groups = tokens.unflatten(2, (-1, self.normalized_shape[0]))
        return F.normalize(super().forward(groups).float(), dim=3).flatten(2)


def build_transformer_layers(
    shape: TransformerShape, last_blocks: tuple[int, ...]
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Builds layers 1 to 3 of a vision transformer with random weights; layer 1 also embeds the images.

    Args:
        last_blocks: number of the last block of each layer, from 0. With four numbers, layer 3 returns the tokens after the
            third and after the fourth number, joined along the channels.
    """
    groups = []
    for start, stop in zip((-1, *last_blocks), last_blocks, strict=False):
        groups.append(nn.Sequential(*(_TransformerBlock(shape) for _ in range(start, stop))))
    first = nn.Sequential(_TokenEmbedding(shape), *groups[0])
    return first, groups[1], groups[2] if len(groups) == 3 else _TwoOutputs(groups[2], groups[3])
