"""Module for the two losses of FYD, the pairs of images that the image alignment compares, and metrics that show a collapse.

Features have collapsed if they are nearly equal at all locations. [paper] is arXiv 2110.04538; [ours] marks our choices.
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


def sum_directions(projected: Tensor) -> Tensor:
    """Sums the L2-normalised projected features (B, C, H, W) of images, without gradient. Returns (C, H, W), float32."""
    return F.normalize(projected.detach().float(), dim=1).sum(dim=0)


def compute_fine_feature_loss(predicted: Tensor, projected: Tensor, directions: Tensor, batch_size: int) -> Tensor:
    """Computes L_fine: negative cosine similarity to the features of all other images, averaged over all locations [paper].

    Every ordered pair of different images of the global batch counts once, so the loss is symmetric. No gradient flows through
    the features of the other images (stop-gradient, SimSiam, arXiv 2011.10566).

    Args:
        predicted: (b, C, H, W), g(f(x)): output of the predictor g for this worker's images x.
        projected: (b, C, H, W), f(x): output of the projector f for the same images.
        directions: (C, H, W), `sum_directions` of the projected features of all images of the global batch.
        batch_size: images of the global batch, at least 2.

    Returns: scalar in -1..1; -1 means that the predictions have the same directions as the features of all other images.
    """
    own_directions = F.normalize(projected.detach().float(), dim=1)
    # the mean of cosines is a product with the mean of unit vectors, so all pairs cost as much as one
    other_directions = (directions - own_directions) / (batch_size - 1)
    return -(F.normalize(predicted.float(), dim=1) * other_directions).sum(dim=1).mean()


@torch.no_grad()
def compute_location_std(features: Tensor) -> Tensor:
    """Computes how much features differ between locations: about 1 if evenly distributed, 0 after a collapse.

    This is the standard deviation over the locations of L2-normalised features, averaged over images and channels, times
    sqrt(C). SimSiam (section 4.1) uses the batch in place of the locations. That would be the wrong measure here [ours]: the
    fine loss makes images equal at each location on purpose. A network whose locations are equal cannot find a defect.

    Args: features: (B, C, H, W).

    Returns: scalar.
    """
    normalised = F.normalize(features.float(), dim=1).flatten(2)
    return normalised.std(dim=2, correction=0).mean() * features.shape[1] ** 0.5


@torch.no_grad()
def compute_effective_rank(features: Tensor) -> Tensor:
    """Computes the effective rank of features (B, C, H, W): about how many directions they use (Roy and Vetterli, 2007).

    It is exp(entropy) of the normalised eigenvalues of the covariance over batch and locations.

    Returns: scalar in 1..C; 1 for equal features.
    """
    # in single precision, the eigenvalues once did not converge (ResNet-18 with frozen batch norms, 1,500 steps)
    samples = features.double().permute(0, 2, 3, 1).flatten(0, 2)
    samples = samples - samples.mean(dim=0)
    with disable_autocast(features):
        spectrum = torch.linalg.eigvalsh(samples.T @ samples).clamp_min(0)
    weights = spectrum / spectrum.sum().clamp_min(torch.finfo(spectrum.dtype).tiny)
    return torch.exp(-torch.xlogy(weights, weights).sum())
