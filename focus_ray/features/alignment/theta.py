"""Module for geometric transforms of images: transform groups, theta, composition, inverse, and warping.

theta (B, 2, 3) follows torch's affine_grid with align_corners=False: it maps coordinates of the aligned frame, in -1..1,
to coordinates of the original frame, so that `warp_images(images, theta)` returns the aligned images. A frame is the coordinate
system of an image: x and y run from -1 to 1, and lengths are in half widths. A group names which movements are allowed.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# components of each group: r rotation, s scale, z scales along x and along y, a anisotropy and shear, t translation
GROUP_COMPONENTS = {
    "none": "",
    "rotation": "r",
    "translation": "t",
    "scale": "s",
    "rotation_scale": "rs",
    "rotation_two_scales": "rz",
    "rotation_translation": "rt",
    "similarity": "rst",
    "affine": "rsat",
}
_PARAMETERS_PER_COMPONENT = {"r": 1, "s": 1, "z": 2, "a": 2, "t": 2}


class TransformBounds(NamedTuple):
    """The largest allowed transform. Without bounds, training would zoom into a flat area, where images are equal [ours]."""

    max_rotation_rad: float = math.pi
    max_translation: float = 0.3  # in half widths of the frame
    max_scale: float = 1.25  # zoom in or out; also bounds the anisotropy and shear of the group affine


def count_transform_parameters(group: str) -> int:
    """Returns how many parameters a transform of this group has; 0 for the group none."""
    return sum(_PARAMETERS_PER_COMPONENT[component] for component in GROUP_COMPONENTS[group])


def split_parameters_by_component(parameters: Tensor, group: str) -> dict[str, Tensor]:
    """Splits parameters (B, count_transform_parameters(group)): letter in `GROUP_COMPONENTS` -> parameters (B, n)."""
    components = GROUP_COMPONENTS[group]
    parts = parameters.split([_PARAMETERS_PER_COMPONENT[component] for component in components], dim=1)
    return dict(zip(components, parts, strict=True))


def compute_theta_from_parameters(parameters: Tensor, group: str, bounds: TransformBounds) -> Tensor:
    """Computes bounded transforms (B, 2, 3) from unconstrained parameters; parameters of zero give the identity.

    Args:
        parameters: (B, count_transform_parameters(group)).
        group: transform group, a key of `GROUP_COMPONENTS`.
        bounds: the largest transform; tanh keeps every parameter inside its bound.
    """
    parts = split_parameters_by_component(parameters.tanh(), group)
    zero = parameters.new_zeros(parameters.shape[0])
    angle = parts["r"][:, 0] * bounds.max_rotation_rad if "r" in parts else zero
    log_scale = math.log(bounds.max_scale)
    scale = (parts["s"][:, 0] * log_scale).exp() if "s" in parts else zero + 1
    anisotropy = (parts["a"][:, 0] * log_scale / 2).exp() if "a" in parts else zero + 1
    if "z" in parts:
        log_scales = parts["z"] * log_scale  # along x and along y
        scale, anisotropy = log_scales.mean(dim=1).exp(), ((log_scales[:, 0] - log_scales[:, 1]) / 2).exp()
    shear = parts["a"][:, 1] * log_scale if "a" in parts else zero
    shift = parts["t"] * bounds.max_translation if "t" in parts else zero[:, None].expand(-1, 2)
    return build_theta_from_components(angle, scale, shift, anisotropy, shear)


def build_theta_from_components(
    angle: Tensor, scale: Tensor, shift: Tensor, anisotropy: Tensor | None = None, shear: Tensor | None = None
) -> Tensor:
    """Builds transforms (B, 2, 3) from their components.

    Args:
        angle: (B,), rotation in radians.
        scale: (B,), factor.
        shift: (B, 2), in half widths, x before y.
        anisotropy: (B,), factor; None: 1.
        shear: (B,); None: 0.
    """
    cos, sin = angle.cos(), angle.sin()
    across, along = (scale, scale) if anisotropy is None else (scale * anisotropy, scale / anisotropy)
    slant = torch.zeros_like(angle) if shear is None else shear
    first = torch.stack([cos * across, cos * slant - sin * along, shift[:, 0]], dim=1)
    second = torch.stack([sin * across, sin * slant + cos * along, shift[:, 1]], dim=1)
    return torch.stack([first, second], dim=1)


def build_identity_theta(like: Tensor) -> Tensor:
    """Returns identity transforms (B, 2, 3), float32, where B and the device come from `like` (B, ...)."""
    theta = torch.eye(2, 3, device=like.device, dtype=torch.float32)
    return theta.expand(like.shape[0], 2, 3)


def compose_theta(outer: Tensor, inner: Tensor) -> Tensor:
    """Composes two transforms (B, 2, 3): warping by the result equals warping by `outer` and then by `inner`."""
    with disable_autocast(outer):
        linear = outer[:, :, :2] @ inner[:, :, :2]
        shift = outer[:, :, :2] @ inner[:, :, 2:] + outer[:, :, 2:]
    return torch.cat([linear, shift], dim=2)


def invert_theta(theta: Tensor) -> Tensor:
    """Inverts transforms (B, 2, 3).

    Raises: ValueError: a transform is singular; this is not checked while a network is exported.
    """
    a, b, c, d = theta[:, 0, 0], theta[:, 0, 1], theta[:, 1, 0], theta[:, 1, 1]
    determinant = a * d - b * c
    if not torch.compiler.is_exporting() and bool((determinant.abs() < 1e-8).any()):
        raise ValueError("a transform is singular and has no inverse: lower max_scale of the alignment")
    linear = torch.stack([torch.stack([d, -b], 1), torch.stack([-c, a], 1)], 1) / determinant[:, None, None]
    with disable_autocast(theta):
        shift = -linear @ theta[:, :, 2:]
    return torch.cat([linear, shift], dim=2)


def disable_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Returns a context manager that turns off autocast on the device of `like`; it has no effect in an export.

    In bfloat16, a coordinate of an image of 256 px would be wrong by up to half a pixel.
    """
    return nullcontext() if torch.compiler.is_exporting() else torch.autocast(like.device.type, enabled=False)


def downsample_antialiased(images: Tensor, size: int) -> Tensor:
    """Resizes images (B, C, H, W) to (B, C, size, size), bilinear with antialiasing.

    In an exported network, matrix products compute the same, because every runtime supports them.
    """
    if not torch.compiler.is_exporting():
        return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    down, across = (_build_downsampling_matrix(int(length), size).to(images.device) for length in images.shape[2:])
    return down @ images @ across.t()


def _build_downsampling_matrix(length: int, size: int) -> Tensor:
    """Returns the matrix (size, length) that resizes one side of an image from `length` to `size` pixels."""
    step = length / size
    centres = (np.arange(size)[:, None] + 0.5) * step
    weights = np.maximum(0, 1 - np.abs(np.arange(length) + 0.5 - centres) / max(step, 1.0))
    return torch.from_numpy((weights / weights.sum(axis=1, keepdims=True)).astype(np.float32))


def warp_images(images: Tensor, theta: Tensor, padding: str = "border") -> Tensor:
    """Aligns images by theta: reads each output pixel bilinearly at the input coordinates to which theta maps it.

    Coordinates are computed in float32 or higher precision for every type of image, also under autocast.

    Args:
        images: (B, C, H, W).
        theta: (B, 2, 3), maps output coordinates to input coordinates; see the top of this file.
        padding: values outside the frame: 'border', 'reflection' or 'zeros'.

    Returns: (B, C, H, W), in the images' type.
    """
    exact = torch.promote_types(images.dtype, torch.float32)
    with disable_autocast(images):
        grid = F.affine_grid(theta.to(exact), list(images.shape), align_corners=False)
        sampled = F.grid_sample(images.to(exact), grid, mode="bilinear", padding_mode=padding, align_corners=False)
    return sampled.to(images.dtype)


def compute_rotation_angle(theta: Tensor) -> Tensor:
    """Returns the angle (...,), in radians, of the rotation that is nearest to each theta (..., 2, 3) or its linear part."""
    return torch.atan2(theta[..., 1, 0] - theta[..., 0, 1], theta[..., 0, 0] + theta[..., 1, 1])


def compute_valid_mask(theta: Tensor, height: int, width: int) -> Tensor:
    """Returns which pixels of aligned images come from inside the original image.

    Args: theta: (B, 2, 3), transforms of the alignment.

    Returns: (B, height, width) bool.
    """
    with disable_autocast(theta):
        exact = theta.to(torch.promote_types(theta.dtype, torch.float32))
        grid = F.affine_grid(exact, [theta.shape[0], 1, height, width], align_corners=False)
    return (grid.abs() <= 1).all(dim=3)


def wrap_angle(angle: Tensor) -> Tensor:
    """Adds multiples of 2 pi to angles in radians, so that they are in -pi..pi."""
    return torch.atan2(angle.sin(), angle.cos())


def build_rotation_theta(angle: Tensor, shift: Tensor | None = None) -> Tensor:
    """Builds transforms (..., 2, 3) from rotation angles (...,) in radians and shifts (..., 2) in half widths (None: 0)."""
    flat = angle.reshape(-1)
    moves = flat.new_zeros(flat.shape[0], 2) if shift is None else shift.reshape(-1, 2)
    return build_theta_from_components(flat, torch.ones_like(flat), moves).reshape(*angle.shape, 2, 3)
