"""The two losses of FYD, the pairs they are taken over, and the numbers that show a collapse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from focus_ray.model.alignment.theta import full_precision


def random_pairs(batch_size: int, generator: torch.Generator | None = None) -> Tensor:
    """A permutation pi (B,) without fixed points [ours]: image b is paired with another image, pi(b).

    Raises: ValueError: fewer than two images.
    """
    if batch_size < 2:
        raise ValueError(
            f"pairs need at least 2 images in a batch, got {batch_size}: raise train.batch_size_per_worker"
        )
    order = torch.randperm(batch_size, generator=generator)
    pairs = torch.empty_like(order)
    pairs[order] = order.roll(1)  # one random cycle through the batch
    return pairs


def coarse_loss(aligned: Tensor, pairs: Tensor, valid: Tensor | None = None) -> Tensor:
    """L_ICA: the L2 distance of the pixels of paired aligned images [paper], averaged [ours].

    Every pair weighs alike, however many of its pixels count, so the mean over workers is that over the joined batch.

    Args:
        aligned: (B, 3, H, W).  pairs: (B,), from `random_pairs`.
        valid: (B, H, W), True where a pixel comes from inside the image; others are not matched [ours].

    Returns: scalar, >= 0.
    """
    difference = aligned - aligned[pairs]
    # the small number keeps the root's gradient finite where two pixels agree
    distance = (difference.square().sum(dim=1) + 1e-12).sqrt()
    if valid is None:
        return distance.mean()
    both = (valid & valid[pairs]).to(distance.dtype)
    return ((distance * both).sum(dim=(1, 2)) / both.sum(dim=(1, 2)).clamp_min(1.0)).mean()


def fine_loss(
    predicted: Tensor, projected: Tensor, pairs: Tensor, stop_gradient: bool = True, symmetric: bool = False
) -> Tensor:
    """L_fine: negative cosine similarity at every location to the features of another normal image [paper].

    Args:
        predicted: (B, C, H, W), g(f(x)).  projected: (B, C, H, W), f(x).  pairs: (B,), from `random_pairs`.
        stop_gradient: the second operand is a constant (SimSiam, arXiv 2011.10566); off is an ablation.
        symmetric: also take every pair the other way round.

    Returns: scalar in -1..1; -1 means that all images agree at every location.
    """
    target = projected.detach() if stop_gradient else projected
    loss = -F.cosine_similarity(predicted, target[pairs], dim=1).mean()
    if symmetric:
        loss = (loss - F.cosine_similarity(predicted[pairs], target, dim=1).mean()) / 2
    return loss


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Standard deviation over the batch of the L2-normalised features, times sqrt(C), mean over places; scalar.

    About 1 for features that spread evenly, 0 for a full collapse (SimSiam, section 4.1, there 1 / sqrt(C)).
    """
    normalised = F.normalize(features.float(), dim=1)
    return normalised.std(dim=0, correction=0).mean() * features.shape[1] ** 0.5


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the spectrum of the covariance over batch and places, in 1..C (Roy and Vetterli, 2007)."""
    samples = features.float().permute(0, 2, 3, 1).flatten(0, 2)
    samples = samples - samples.mean(dim=0)
    with full_precision(features):
        spectrum = torch.linalg.eigvalsh(samples.T @ samples).clamp_min(0)
    weights = spectrum / spectrum.sum().clamp_min(torch.finfo(spectrum.dtype).tiny)
    return torch.exp(-torch.xlogy(weights, weights).sum())


def pairwise_l2(aligned: Tensor, valid: Tensor | None = None, num_pairs: int = 2000, seed: int = 0) -> float:
    """L_ICA of a set: mean over random pairs of the mean over pixels of the L2 norm over channels of the difference.

    Args:
        aligned: (N, C, H, W).  valid: (N, H, W) bool; pixels outside either image's mask are not counted.

    Raises: ValueError: fewer than two images.
    """
    if len(aligned) < 2:
        raise ValueError(f"pairs need at least 2 images, got {len(aligned)}")
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(aligned), (num_pairs,), generator=generator)
    second = (first + torch.randint(1, len(aligned), (num_pairs,), generator=generator)) % len(aligned)
    total = 0.0
    for one, other in zip(first.split(64), second.split(64), strict=True):
        norm = (aligned[one] - aligned[other]).square().sum(dim=1).sqrt()
        if valid is None:
            total += norm.mean(dim=(1, 2)).sum().item()
        else:
            both = (valid[one] & valid[other]).to(norm.dtype)
            total += ((norm * both).sum(dim=(1, 2)) / both.sum(dim=(1, 2)).clamp_min(1)).sum().item()
    return total / num_pairs
