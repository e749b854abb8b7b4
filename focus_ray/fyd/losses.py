"""Module for the two losses of FYD, the pairs of images that the losses compare, and metrics that show collapsed features.

Features have collapsed if they are nearly equal for different images. [paper] is arXiv 2110.04538; [ours] marks our choices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from focus_ray.features.alignment.theta import disable_autocast


def draw_image_pairs(batch_size: int, generator: torch.Generator | None = None) -> Tensor:
    """Draws a partner for each of B images: a random permutation (B,) in which no image is its own partner [ours].

    Raises: ValueError: fewer than two images.
    """
    if batch_size < 2:
        raise ValueError(f"pairs need at least 2 images per batch, got {batch_size}: raise train.batch_size")
    order = torch.randperm(batch_size, generator=generator)
    pairs = torch.empty_like(order)
    pairs[order] = order.roll(1)  # one random cycle through the batch
    return pairs


def compute_image_alignment_loss(aligned: Tensor, partners: Tensor, valid: Tensor | None = None) -> Tensor:
    """Computes the image alignment loss L_ICA: the L2 distance between pixels of paired aligned images [paper], averaged [ours].

    Every pair has the same weight, however many valid pixels it has. So the mean over workers, weighted by their images, equals
    the mean over the global batch.

    Args:
        aligned: (B, 3, H, W), images after image alignment.
        partners: (B, 3, H, W), the aligned partner of each image.
        valid: (B, H, W), True at pixels that come from inside both images; other pixels are ignored [ours]. None: all are valid.

    Returns: scalar, >= 0.
    """
    difference = aligned - partners
    # 1e-12 keeps the gradient of the root finite where two pixels are equal
    distance = (difference.square().sum(dim=1) + 1e-12).sqrt()
    if valid is None:
        return distance.mean()
    is_valid = valid.to(distance.dtype)
    return ((distance * is_valid).sum(dim=(1, 2)) / is_valid.sum(dim=(1, 2)).clamp_min(1.0)).mean()


def compute_fine_feature_loss(predicted: Tensor, partners: Tensor) -> Tensor:
    """Computes L_fine: negative cosine similarity to the features of the partner image, averaged over all locations [paper].

    No gradient flows through the features of the other image (stop-gradient, SimSiam, arXiv 2011.10566).

    Args:
        predicted: (B, C, H, W), g(f(x)): output of the predictor g for images x.
        partners: (B, C, H, W), output of the projector f for the partner of each image.

    Returns: scalar in -1..1; -1 means that the predictions have the same directions as the projected features of the partners.
    """
    return -F.cosine_similarity(predicted, partners.detach(), dim=1).mean()


@torch.no_grad()
def compute_feature_std(features: Tensor) -> Tensor:
    """Computes how much features differ between images: about 1 for evenly distributed features, 0 after a full collapse.

    This is the standard deviation over the batch of L2-normalised features, averaged over channels and locations, times sqrt(C)
    (SimSiam, section 4.1, uses it without the factor).

    Args: features: (B, C, H, W).

    Returns: scalar.
    """
    normalised = F.normalize(features.float(), dim=1)
    return normalised.std(dim=0, correction=0).mean() * features.shape[1] ** 0.5


@torch.no_grad()
def compute_effective_rank(features: Tensor) -> Tensor:
    """Computes the effective rank of features (B, C, H, W): about how many directions they use (Roy and Vetterli, 2007).

    It is exp(entropy) of the normalised eigenvalues of the covariance over batch and locations.

    Returns: scalar in 1..C; 1 for equal features.
    """
    samples = features.float().permute(0, 2, 3, 1).flatten(0, 2)
    samples = samples - samples.mean(dim=0)
    with disable_autocast(features):
        spectrum = torch.linalg.eigvalsh(samples.T @ samples).clamp_min(0)
    weights = spectrum / spectrum.sum().clamp_min(torch.finfo(spectrum.dtype).tiny)
    return torch.exp(-torch.xlogy(weights, weights).sum())
