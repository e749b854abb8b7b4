"""Detector: network + channel reduction + density -> anomaly maps and scores of a batch of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from focus_ray.config import ScoringConfig
from focus_ray.density.base import Density
from focus_ray.fitting.profile import Profile, scored_only
from focus_ray.model.alignment.theta import invert_theta, warp
from focus_ray.model.network import Aligned, FocusNet, common_frame, seen_mask
from focus_ray.model.reduction import ChannelReduction

# Images a forward pass on a CPU: ResNet-18 at 224 px takes 5.8 ms an image at 4 to 8, 7.1 at 16, 7.8 at 32 (two cores of
# an EPYC with 32 MiB of cache).
_CPU_IMAGES = 8


class Scored(NamedTuple):
    """score (B,): the map's maximum [kin], or against the profile of good images.

    anomaly_map (B, H, W): in the frame of the images that were given.
    """

    score: Tensor
    anomaly_map: Tensor


class Detector:
    """Everything that turns images into scores; knows nothing of files, thresholds or Ray."""

    def __init__(
        self,
        net: FocusNet,
        reduction: ChannelReduction,
        density: Density,
        scoring: ScoringConfig,
        profile: Profile | None = None,
    ) -> None:
        """profile: what image scores are held against; None: they are the map's maximum."""
        self.profile = profile
        self.net, self.reduction, self.density, self.scoring = net.eval(), reduction.eval(), density, scoring
        size = net.config.image_size_px
        self.seen = seen_mask(net, density.height, density.width)
        self.spread = upsample_and_smooth(density.height, size, scoring.smoothing_sigma_px).to(density.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Scored:
        """uint8 (B, H, W, 3) or float (B, 3, H, W) in 0..1, at the network's input size -> `Scored`."""
        return self.score_embedding(*embed(self.net, self.reduction, to_images(images, self.density.device)))

    @torch.inference_mode()
    def judge(self, aligned: Aligned) -> Scored:
        """What the network made of B images -> `Scored`."""
        levels, theta = common_frame(aligned)
        return self.score_embedding(self.reduction(levels), theta)

    @torch.inference_mode()
    def score_embedding(self, embedding: Tensor, theta: Tensor | None) -> Scored:
        """What `embed` gave -> `Scored`."""
        return self.score_distance(self.density.score(embedding), theta)

    @torch.inference_mode()
    def score_distance(self, distance: Tensor, theta: Tensor | None, profile: Profile | None = None) -> Scored:
        """What a density made of embeddings (B, H, W), and theta (B, 2, 3) or None -> `Scored`; profile: in place of its own."""
        profile = profile or self.profile
        # what lies outside the image is made up, and what training hardly saw is not known
        distance = scored_only(distance, theta, self.seen)
        aligned_map = self.spread @ distance @ self.spread.t()
        score = aligned_map.flatten(1).amax(dim=1) if profile is None else profile.score(distance, self.spread)
        if theta is not None:
            aligned_map = warp(aligned_map[:, None], invert_theta(theta), "zeros")[:, 0]
        return Scored(score, aligned_map)


def share_a_pass(first: Detector, second: Detector) -> bool:
    """Whether one backbone pass can serve both: the very same backbone, nothing moved between its layers, one size."""
    one, other = first.net, second.net
    return (
        one.backbone is other.backbone
        and not len(one.feature_aligners)
        and not len(other.feature_aligners)
        and one.config.image_size_px == other.config.image_size_px
    )


@torch.inference_mode()
def score_together(parts: Sequence[tuple[Detector, Tensor]]) -> list[Scored]:
    """Scores images of several categories in one pass through the backbone that they share.

    Each category's images are aligned by its own aligner before the pass, and reduced and judged by its own reduction
    and density after it: the results are those of each detector alone, up to rounding.

    Args:
        parts: detectors of which every two `share_a_pass`, each with its images as `Detector.__call__` takes them.

    Returns: one `Scored` a part, in order.
    """
    if len(parts) == 1:
        return [parts[0][0](parts[0][1])]
    assert all(share_a_pass(parts[0][0], detector) for detector, _ in parts)
    aligned = [detector.net.align_image(to_images(images, detector.density.device)) for detector, images in parts]
    passes = [parts[0][0].net.features(part) for part in slices(torch.cat([image for image, _ in aligned]))]
    levels, nothing = (
        tuple(torch.cat(level) for level in zip(*(found for found, _ in passes), strict=True)),
        passes[0][1],
    )
    sizes = [len(image) for image, _ in aligned]
    split = zip(*(level.split(sizes) for level in levels), strict=True)
    return [
        detector.judge(Aligned(own, nothing, image, theta))
        for (detector, _), own, (image, theta) in zip(parts, split, aligned, strict=True)
    ]


def to_images(batch: Tensor, device: torch.device | str) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in 0..1, channels-last in memory; a float batch passes as it is."""
    batch = batch.to(device, non_blocking=True)
    if batch.dtype != torch.uint8:
        return batch
    return batch.permute(0, 3, 1, 2).to(torch.float32).div_(255.0)


def embed(
    net: FocusNet, reduction: ChannelReduction, images: Tensor, singly: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Images (B, 3, H, W) in 0..1 -> embedding (B, C, H/stride, W/stride) in the aligned frame, theta (B, 2, 3) or None.

    For inference.

    Args:
        singly: one image at a time. The last digits hang on how images are batched, and what is chosen by them, a nearest
            neighbour or a coreset, is then the same with any number of workers.
    """
    embeddings: list[Tensor] = []
    thetas: list[Tensor] = []
    for part in images.split(1) if singly else slices(images):
        levels, theta = common_frame(net(part))
        embeddings.append(reduction(levels))
        if theta is not None:
            thetas.append(theta)
    return _joined(embeddings), _joined(thetas) if thetas else None


def slices(images: Tensor) -> tuple[Tensor, ...]:
    """A batch as a network takes it for inference: on a CPU a few images at a time, whose activations stay in its caches."""
    return images.split(_CPU_IMAGES) if images.device.type == "cpu" else (images,)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def upsample_and_smooth(places: int, size_px: int, sigma_px: float) -> Tensor:
    """The matrix A (size_px, places) with which A m A^T is the bilinear upsampling of a square map m, smoothed.

    Both steps are linear and separable, so one small product per axis does what two passes over the pixels would.
    Gaussian of `sigma_px`, cut at 4 sigma, mirrored at the border.
    """
    identity = torch.eye(places, dtype=torch.float64)
    upsampled = F.interpolate(identity[None], size=size_px, mode="linear", align_corners=False)[0].t()
    if sigma_px == 0:
        return upsampled.float().contiguous()
    radius = min(int(4 * sigma_px + 0.5), size_px - 1)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma_px) ** 2)
    kernel /= kernel.sum()
    columns = F.pad(upsampled.t()[:, None], (radius, radius), mode="reflect")
    return F.conv1d(columns, kernel[None, None])[:, 0].t().float().contiguous()
