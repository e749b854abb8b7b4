"""Module for the bank: the stored embeddings (N, L, C) of N normal images at L locations.

If each location keeps only a coreset (a subset of representative embeddings), a bundle stores the coresets in one file and the
remaining embeddings in another file.
"""

from __future__ import annotations

import torch
from torch import Tensor


def convert_to_bank_rows(embedding: Tensor) -> Tensor:
    """Converts an embedding (B, C, H, W) to rows of a bank (B, L, C), float16 on the CPU."""
    batch, channels, height, width = embedding.shape
    return embedding.permute(0, 2, 3, 1).reshape(batch, height * width, channels).to("cpu", torch.float16)


def select_embeddings_outside_coresets(bank: Tensor, images: Tensor) -> Tensor:
    """Returns the embeddings of a bank that are not in the coreset of their location.

    Args:
        bank: (N, L, C), embeddings of N images at L locations.
        images: (M, L), for each location the positions in the bank of the M images whose embeddings are in the coreset.

    Returns: (L * (N - M), C), in the order of the bank: image by image.
    """
    return bank[_mask_unused_embeddings(len(bank), images)]


def restore_bank_from_coresets(coreset: Tensor, images: Tensor, unused: Tensor) -> Tensor:
    """Rebuilds a whole bank from the coresets of all locations and the remaining embeddings.

    Args:
        coreset: (M, L, C), the M embeddings in the coreset of each location.
        images: (M, L), position in the bank of the image of each embedding in `coreset`.
        unused: (L * (N - M), C), the result of `select_embeddings_outside_coresets`.

    Returns: (N, L, C), in the original order of the images.
    """
    size, num_locations, channels = coreset.shape
    bank = coreset.new_empty(size + len(unused) // num_locations, num_locations, channels)
    bank[images.long(), torch.arange(num_locations)] = coreset
    bank[_mask_unused_embeddings(len(bank), images)] = unused
    return bank


def _mask_unused_embeddings(num_images: int, images: Tensor) -> Tensor:
    """Returns a mask (N, L) that is False where the embedding of image n is in the coreset of location l.

    Args: images: (M, L), for each location the positions in the bank of the images whose embeddings are in the coreset.
    """
    return torch.ones(num_images, images.shape[1], dtype=torch.bool).scatter_(0, images.long(), False)
