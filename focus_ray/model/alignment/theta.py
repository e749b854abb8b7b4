"""Coarse alignment by spatial transformers: transform groups, theta, warps and their inverses, localisation nets.

theta (B, 2, 3) follows torch's affine_grid with align_corners=False: it maps coordinates of the aligned frame, in -1..1,
to coordinates of the frame before, so that `warp(images, theta)` is the aligned image.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = (
    "none",
    "rotation",
    "translation",
    "scale",
    "rotation_scale",
    "rotation_translation",
    "similarity",
    "affine",
)
# what each group moves: r rotation, s scale, a anisotropy and shear, t translation
USES = {
    "none": "",
    "rotation": "r",
    "translation": "t",
    "scale": "s",
    "rotation_scale": "rs",
    "rotation_translation": "rt",
    "similarity": "rst",
    "affine": "rsat",
}
_WIDTHS = {"r": 1, "s": 1, "a": 2, "t": 2}


class Bounds(NamedTuple):
    """How far a transform may go: the known degenerate optimum zooms into a flat patch [ours]."""

    max_rotation_rad: float = math.pi
    max_translation: float = 0.3  # in half widths of the frame
    max_scale: float = 1.25  # zoom in or out; also bounds the anisotropy and shear of `affine`


def num_parameters(group: str) -> int:
    """Unconstrained numbers that a localisation net must give for a group."""
    if group not in USES:
        raise ValueError(f"transform group {group!r} is not known: choose one of {', '.join(GROUPS)}")
    return sum(_WIDTHS[use] for use in USES[group])


def theta_from_parameters(parameters: Tensor, group: str, bounds: Bounds) -> Tensor:
    """Bounded transforms from unconstrained numbers; zero is the identity.

    Args:
        parameters: (B, num_parameters(group)).

    Returns: (B, 2, 3).

    Raises: ValueError: the width does not fit the group.
    """
    width = num_parameters(group)
    if parameters.ndim != 2 or parameters.shape[1] != width:
        raise ValueError(f"group {group!r} takes (B, {width}) parameters, got {tuple(parameters.shape)}")
    parts = dict(zip(USES[group], parameters.tanh().split([_WIDTHS[use] for use in USES[group]], dim=1), strict=True))
    zero = parameters.new_zeros(parameters.shape[0])
    angle = parts["r"][:, 0] * bounds.max_rotation_rad if "r" in parts else zero
    log_scale = math.log(bounds.max_scale)
    scale = (parts["s"][:, 0] * log_scale).exp() if "s" in parts else zero + 1
    anisotropy = (parts["a"][:, 0] * log_scale / 2).exp() if "a" in parts else zero + 1
    shear = parts["a"][:, 1] * log_scale if "a" in parts else zero
    shift = parts["t"] * bounds.max_translation if "t" in parts else zero[:, None].expand(-1, 2)
    return make_theta(angle, scale, shift, anisotropy, shear)


def make_theta(
    angle: Tensor, scale: Tensor, shift: Tensor, anisotropy: Tensor | None = None, shear: Tensor | None = None
) -> Tensor:
    """Rotation by angle (B,), radians, times scale (B,), then shift (B, 2) in half widths -> (B, 2, 3)."""
    cos, sin = angle.cos(), angle.sin()
    across = scale if anisotropy is None else scale * anisotropy
    along = scale if anisotropy is None else scale / anisotropy
    slant = torch.zeros_like(angle) if shear is None else shear
    first = torch.stack([cos * across, cos * slant - sin * along, shift[:, 0]], dim=1)
    second = torch.stack([sin * across, sin * slant + cos * along, shift[:, 1]], dim=1)
    return torch.stack([first, second], dim=1)


def identity_theta(like: Tensor) -> Tensor:
    """(B, ...) -> (B, 2, 3), in float32 on the same device."""
    theta = torch.eye(2, 3, device=like.device, dtype=torch.float32)
    return theta.expand(like.shape[0], 2, 3)


def compose_theta(outer: Tensor, inner: Tensor) -> Tensor:
    """The one transform that equals warping by `outer` and then warping the result by `inner`; all (B, 2, 3)."""
    with full_precision(outer):
        linear = outer[:, :, :2] @ inner[:, :, :2]
        shift = outer[:, :, :2] @ inner[:, :, 2:] + outer[:, :, 2:]
    return torch.cat([linear, shift], dim=2)


def invert_theta(theta: Tensor) -> Tensor:
    """(B, 2, 3) -> (B, 2, 3), so that composing the two is the identity.

    Raises: ValueError: a transform is singular.
    """
    a, b, c, d = theta[:, 0, 0], theta[:, 0, 1], theta[:, 1, 0], theta[:, 1, 1]
    determinant = a * d - b * c
    if not torch.compiler.is_exporting() and bool((determinant.abs() < 1e-8).any()):
        raise ValueError("a transform is singular and has no inverse: bound the transform group")
    linear = torch.stack([torch.stack([d, -b], 1), torch.stack([-c, a], 1)], 1) / determinant[:, None, None]
    with full_precision(theta):
        shift = -linear @ theta[:, :, 2:]
    return torch.cat([linear, shift], dim=2)


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """No autocast: in bf16 a coordinate of a 256 px frame is off by up to half a pixel."""
    return nullcontext() if torch.compiler.is_exporting() else torch.autocast(like.device.type, enabled=False)


def shrink(images: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, C, size, size), bilinear and antialiased; in an exported graph as products, which every runtime has."""
    if not torch.compiler.is_exporting():
        return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    down, across = (_shrinking(int(length), size).to(images.device) for length in images.shape[2:])
    return down @ images @ across.t()


def _shrinking(length: int, size: int) -> Tensor:
    """(size, length), the weights of `shrink` along one side."""
    step = length / size
    centres = (np.arange(size)[:, None] + 0.5) * step
    weights = np.maximum(0, 1 - np.abs(np.arange(length) + 0.5 - centres) / max(step, 1.0))
    return torch.from_numpy((weights / weights.sum(axis=1, keepdims=True)).astype(np.float32))


def warp(images: Tensor, theta: Tensor, padding: str = "border", size: tuple[int, int] | None = None) -> Tensor:
    """Bilinear resampling: (B, C, H, W), (B, 2, 3) -> (B, C, *size), by default the size it came with, in the images' type.

    Where to look is worked out in float32 at least, whatever the images' type and under autocast too.

    Args:
        padding: 'border', 'reflection' or 'zeros': what stands outside the frame.
    """
    shape = [images.shape[0], images.shape[1], *(size or images.shape[2:])]
    exact = torch.promote_types(images.dtype, torch.float32)
    with full_precision(images):
        grid = F.affine_grid(theta.to(exact), shape, align_corners=False)
        sampled = F.grid_sample(images.to(exact), grid, mode="bilinear", padding_mode=padding, align_corners=False)
    return sampled.to(images.dtype)


def angle_of(theta: Tensor) -> Tensor:
    """(..., 2, 3) -> (...,): the angle, in radians, of the rotation nearest to each linear part."""
    return torch.atan2(theta[..., 1, 0] - theta[..., 0, 1], theta[..., 0, 0] + theta[..., 1, 1])


def valid_mask(theta: Tensor, height: int, width: int) -> Tensor:
    """Which pixels of the aligned frame come from inside the frame before: (B, 2, 3) -> (B, H, W) bool."""
    with full_precision(theta):
        exact = theta.to(torch.promote_types(theta.dtype, torch.float32))
        grid = F.affine_grid(exact, [theta.shape[0], 1, height, width], align_corners=False)
    return (grid.abs() <= 1).all(dim=3)


def wrap_angle(angle: Tensor) -> Tensor:
    """Radians, brought to -pi..pi."""
    return torch.atan2(angle.sin(), angle.cos())


def turn(angle: Tensor, shift: Tensor | None = None) -> Tensor:
    """(..., ) radians and (..., 2) shifts in half widths -> (..., 2, 3)."""
    flat = angle.reshape(-1)
    moves = flat.new_zeros(flat.shape[0], 2) if shift is None else shift.reshape(-1, 2)
    return make_theta(flat, torch.ones_like(flat), moves).reshape(*angle.shape, 2, 3)
