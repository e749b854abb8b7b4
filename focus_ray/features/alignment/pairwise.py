"""Module for the distance between aligned images, which measures how good an alignment is."""

from __future__ import annotations

import torch
from torch import Tensor


def measure_pairwise_l2(aligned: Tensor, valid: Tensor | None = None, num_pairs: int = 2000, seed: int = 0) -> float:
    """Computes how different images are: the L2 distance between pixels, averaged over pixels and random pairs of images.

    The FYD paper calls this distance L_ICA.

    Args:
        aligned: (N, C, H, W), images, usually after alignment.
        valid: (N, H, W) bool; a pixel must be valid in both images of a pair. None: all are valid.
        num_pairs, seed: number of pairs, and seed of their choice.

    Raises: ValueError: fewer than two images.
    """
    if len(aligned) < 2:
        raise ValueError(f"pairs need at least 2 images, got {len(aligned)}")
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(aligned), (num_pairs,), generator=generator)
    second = (first + torch.randint(1, len(aligned), (num_pairs,), generator=generator)) % len(aligned)
    total = 0.0
    for a, b in zip(first.split(64), second.split(64), strict=True):
        norm = (aligned[a] - aligned[b]).square().sum(dim=1).sqrt()
        if valid is None:
            total += norm.mean(dim=(1, 2)).sum().item()
        else:
            is_valid = (valid[a] & valid[b]).to(norm.dtype)
            total += ((norm * is_valid).sum(dim=(1, 2)) / is_valid.sum(dim=(1, 2)).clamp_min(1)).sum().item()
    return total / num_pairs
