"""The two losses of FYD, the pairs of images that they compare, and figures that show a collapse of the features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from focus_ray.features.alignment.theta import disable_autocast


def draw_pairs(batch_size: int, generator: torch.Generator | None = None) -> Tensor:
    """Draws a permutation pi (B,) without fixed points [ours]: image b is paired with another image, pi(b).

    Raises: ValueError: fewer than two images.
    """
    if batch_size < 2:
        raise ValueError(f"pairs need at least 2 images per batch, got {batch_size}: raise train.batch_size_per_worker")
    order = torch.randperm(batch_size, generator=generator)
    pairs = torch.empty_like(order)
    pairs[order] = order.roll(1)  # one random cycle through the batch
    return pairs


def coarse_loss(aligned: Tensor, pairs: Tensor, valid: Tensor | None = None) -> Tensor:
    """Computes L_ICA: the L2 distance between the pixels of paired aligned images [paper], averaged [ours].

    Every pair has the same weight, however many valid pixels it has. So the mean over workers equals the mean over the joined
    batch.

    Args:
        aligned: (B, 3, H, W).
        pairs: (B,), from `draw_pairs`.
        valid: (B, H, W), True at pixels that come from inside the image; other pixels are ignored [ours]. None: all are valid.

    Returns: scalar, >= 0.
    """
    difference = aligned - aligned[pairs]
    # 1e-12 keeps the gradient of the root finite where two pixels are equal
    distance = (difference.square().sum(dim=1) + 1e-12).sqrt()
    if valid is None:
        return distance.mean()
    is_valid = (valid & valid[pairs]).to(distance.dtype)
    return ((distance * is_valid).sum(dim=(1, 2)) / is_valid.sum(dim=(1, 2)).clamp_min(1.0)).mean()


def fine_loss(predicted: Tensor, projected: Tensor, pairs: Tensor) -> Tensor:
    """Computes L_fine: negative cosine similarity to another normal image's features, averaged over locations [paper].

    No gradient flows through the features of the other image (stop-gradient, SimSiam, arXiv 2011.10566).

    Args:
        predicted: (B, C, H, W), g(f(x)).
        projected: (B, C, H, W), f(x).
        pairs: (B,), from `draw_pairs`.

    Returns: scalar in -1..1; -1 means that all images have the same features at every location.
    """
    return -F.cosine_similarity(predicted, projected.detach()[pairs], dim=1).mean()


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Computes the standard deviation over the batch of L2-normalised features (B, C, H, W), times sqrt(C), averaged; a scalar.

    It is about 1 for evenly distributed features, and 0 after a full collapse (SimSiam, section 4.1, without the factor).
    """
    normalised = F.normalize(features.float(), dim=1)
    return normalised.std(dim=0, correction=0).mean() * features.shape[1] ** 0.5


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """Computes the effective rank, in 1..C, of features (B, C, H, W) (Roy and Vetterli, 2007).

    It is exp of the entropy of the spectrum of the covariance over batch and locations.
    """
    samples = features.float().permute(0, 2, 3, 1).flatten(0, 2)
    samples = samples - samples.mean(dim=0)
    with disable_autocast(features):
        spectrum = torch.linalg.eigvalsh(samples.T @ samples).clamp_min(0)
    weights = spectrum / spectrum.sum().clamp_min(torch.finfo(spectrum.dtype).tiny)
    return torch.exp(-torch.xlogy(weights, weights).sum())
