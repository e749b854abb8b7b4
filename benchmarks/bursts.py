"""Simulated photographs of the same part (bursts), and crops of a strip that is photographed step by step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from focus_ray.seeds import derive_seed


def simulate_photographs(
    images: Tensor, count: int, seed: int, shift_px: int = 1, noise: float = 2.0, brightness: float = 0.0
) -> Tensor:
    """Photographs each image `count` times: a random shift, a random brightness and random noise for each photograph.

    Args:
        images: (N, H, W, C) uint8.
        shift_px: largest shift in x and in y, whole pixels, so that no photograph is blurred by interpolation. Pixels that
            come from beyond the border are mirrored.
        noise: standard deviation of the Gaussian noise, in grey levels; independent for each pixel and channel.
        brightness: largest relative change of all grey levels; 0.05 multiplies them by a factor between 0.95 and 1.05.

    Returns:
        (N * count, H, W, C) uint8. The photographs of one image follow each other: photograph i shows image i // count.

    Raises:
        ValueError: count is less than 1, or shift_px, noise or brightness is negative.
    """
    if count < 1 or min(shift_px, noise, brightness) < 0:
        raise ValueError(
            f"count={count}, shift_px={shift_px}, noise={noise}, brightness={brightness}: count must be at least 1 and the "
            "other three must not be negative"
        )
    generator = torch.Generator().manual_seed(derive_seed(seed, "photograph"))
    photographs = images.new_empty(len(images) * count, *images.shape[1:])
    height, width = images.shape[1:3]
    for number in range(len(photographs)):
        image = images[number // count].permute(2, 0, 1).float()
        top, left = torch.randint(0, 2 * shift_px + 1, (2,), generator=generator).tolist()
        factor = 1 + brightness * (2 * torch.rand((), generator=generator) - 1)
        padded = F.pad(image[None], (shift_px,) * 4, mode="reflect")[0]
        shifted = factor * padded[:, top : top + height, left : left + width]
        noisy = shifted + noise * torch.randn(shifted.shape, generator=generator)
        photographs[number] = noisy.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return photographs


def crop_in_steps(images: Tensor, side_px: int, step_px: int) -> Tensor:
    """Crops each image along its middle, from left to right, as a strip is photographed step by step.

    Args:
        images: (N, H, W, C).
        side_px: side of a crop, H and W at most.
        step_px: distance between a crop and the next; they overlap where this is less than side_px.

    Returns:
        (N * count, side_px, side_px, C) with count = (W - side_px) // step_px + 1. The crops of one image follow each other.
    """
    top = (images.shape[1] - side_px) // 2
    starts = range(0, images.shape[2] - side_px + 1, step_px)
    crops = [images[:, top : top + side_px, left : left + side_px] for left in starts]
    return torch.stack(crops, dim=1).flatten(0, 1)


def crop_at_random(images: Tensor, side_px: int, seed: int) -> Tensor:
    """Crops each image once, at a random place along its middle: (N, H, W, C) -> (N, side_px, side_px, C)."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "crop"))
    top = (images.shape[1] - side_px) // 2
    lefts = torch.randint(0, images.shape[2] - side_px + 1, (len(images),), generator=generator).tolist()
    crops = [image[top : top + side_px, left : left + side_px] for image, left in zip(images, lefts, strict=True)]
    return torch.stack(crops)
