"""The whole scorer of a bundle as one module: an image in; score, p-value, verdict and anomaly map out."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from focus_ray.bundle.bundle import Bundle
from focus_ray.density.tiles import Tiles
from focus_ray.evaluation.calibration import TIE, Calibration
from focus_ray.export.densities import as_module
from focus_ray.export.resize import ToFrame
from focus_ray.fitting.profile import zero_unscored
from focus_ray.fitting.scoring import score_if_inspected, shown_locations
from focus_ray.model.alignment.congealing import CongealingAligner
from focus_ray.model.alignment.theta import invert_theta, warp
from focus_ray.model.batch_norm import fuse_batch_norms
from focus_ray.model.network import AlignedFeatures, warp_to_common_frame

OUTPUTS = ("score", "p_value", "anomalous", "anomaly_map")
BOX = "box"  # one more, of images that keep their shape


class Scorer(nn.Module):
    """uint8 images (B, H, W, 3), RGB, of any one size -> what `OUTPUTS` names.

    score, p_value: (B,) float; nan if no place of the image is inspected.  anomalous: (B,) bool.
    anomaly_map: (B, height, width) float, of the frame.  box: of `ToFrame`.

    Takes a bundle that was read with precision fp32, and is its only user from then on: its network is prepared for inference.
    """

    def __init__(self, bundle: Bundle, half: bool = False) -> None:
        """half: backbone and memories in float16; whatever is between, and what comes of them, stays float32."""
        super().__init__()
        detector = bundle.detector
        self.to_frame = ToFrame(bundle.frame)
        self.net, self.reduction = detector.net, detector.reduction
        self.padding = detector.net.config.image_alignment.padding
        aligner = detector.net.image_aligner
        self.aligns = aligner is not None
        if isinstance(aligner, CongealingAligner):
            self.aligns = bool(aligner.enabled)
            aligner._search_bank()  # worked out now, and not in every call
        fuse_batch_norms(detector.net.backbone)
        if half:
            detector.net.backbone.half()
        self.tiles = Tiles.from_config(detector.net.config)
        self.density = as_module(detector.density, half)
        self.spread, self.profile, self.seen = detector.map_generator, detector.profile, detector.seen_mask
        self.verdict = Verdict(bundle.calibration)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        pixels, shown, box = self.to_frame(images)
        theta = self._theta(pixels)
        aligned = pixels if theta is None else warp(pixels, theta, self.padding)
        levels, thetas = self.net.features(_cut(aligned, self.tiles))
        found, total = warp_to_common_frame(AlignedFeatures(levels, thetas, aligned, theta))
        distance = self.density(self.tiles.join(self.reduction(found)))
        inspected = torch.ones_like(distance)
        if shown is not None:
            every = shown.expand(images.shape[0], *shown.shape)
            inspected = shown_locations(every, total, self.tiles, distance.shape[1:]).to(distance.dtype)
            distance = distance * inspected
        distance = zero_unscored(distance, total, self.seen)
        anomaly_map = self.spread(distance)
        highest = anomaly_map.flatten(1).amax
        score = highest(dim=1) if self.profile is None else self.profile.score(distance, self.spread)
        if total is not None:
            anomaly_map = warp(anomaly_map[:, None], invert_theta(total), "zeros")[:, 0]
        if shown is not None:
            anomaly_map = anomaly_map * shown
        if shown is not None or total is not None:
            score = score_if_inspected(score, zero_unscored(inspected, total, self.seen))
        p_value, anomalous = self.verdict(score)
        outputs = (score, p_value, anomalous, anomaly_map)
        return outputs if box is None else (*outputs, box)

    def _theta(self, pixels: Tensor) -> Tensor | None:
        if not self.aligns:
            return None
        aligner = self.net.image_aligner
        if isinstance(aligner, CongealingAligner):
            return aligner.align(aligner.prepare(pixels))[0]
        assert aligner is not None
        found: Tensor = aligner(pixels)
        return found


class Verdict(nn.Module):
    """Scores (B,) -> p-values and verdicts, as `Calibration` says; a score that is no number counts as anomalous."""

    def __init__(self, calibration: Calibration) -> None:
        super().__init__()
        self.known: Tensor
        self.register_buffer("known", torch.tensor(calibration.image_scores, dtype=torch.float32))
        self.threshold, self.tail = calibration.image_threshold, calibration.tail
        self.num_independent = calibration.num_independent
        self.weight = calibration.num_independent / calibration.num_images
        # as float32, so that p <= the level, however it is compared, if and only if the image is anomalous
        level = np.float32(calibration.effective_fpr)
        if float(level) > calibration.effective_fpr:
            level = np.nextafter(level, np.float32(0))
        self.at_most, self.at_least = float(level), float(np.nextafter(level, np.float32(2)))

    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        certain = scores - TIE * scores.abs()
        at_least = (self.known >= certain[:, None]).sum(dim=1).to(torch.float32)
        p_value = (1 + at_least * self.weight) / (1 + self.num_independent)
        if self.tail is not None:
            excess = (certain - self.tail.start).clamp_min(0)
            beyond = self.tail.share * torch.pow(1 + self.tail.shape * excess / self.tail.scale, -1 / self.tail.shape)
            p_value = torch.where(certain > self.tail.start, beyond, p_value)
        normal = certain <= self.threshold
        p_value = torch.where(normal, p_value.clamp_min(self.at_least), p_value.clamp_max(self.at_most))
        return p_value, normal.logical_not()


def _cut(images: Tensor, tiles: Tiles) -> Tensor:
    """`Tiles.cut`, by slices."""
    if tiles.num_tiles == 1:
        return images
    side, step = tiles.side_px, tiles.side_px - tiles.overlap_px
    parts = [
        images[:, :, row * step : row * step + side, column * step : column * step + side]
        for row in range(tiles.rows)
        for column in range(tiles.columns)
    ]
    return torch.stack(parts, dim=1).flatten(0, 1)


def longest_side(height: int, width: int) -> int:
    """Pixels that a side of an image may have for a frame of that size, so that whole numbers of 32 bits hold its weights."""
    return int(math.sqrt(2**24 * min(height, width)))
