"""The whole scorer of a bundle as one torch module: images in; scores, p-values, verdicts and anomaly maps out."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from focus_ray.bundle.bundle import Bundle
from focus_ray.density.base import build_exportable_density
from focus_ray.density.tiles import TileGrid
from focus_ray.detect.calibration import Calibration
from focus_ray.detect.detector import compute_scored_locations, set_nan_if_uninspected
from focus_ray.detect.profile import compute_image_scores, zero_unscored_locations
from focus_ray.export.resize import ResizeToFrame
from focus_ray.features.alignment.congealing import CongealingAligner
from focus_ray.features.alignment.theta import invert_theta, warp_images
from focus_ray.features.batch_norm import fuse_batch_norms
from focus_ray.features.network import ALIGNED_IMAGE_PADDING, AlignedFeatures, warp_features_to_common_frame
from focus_ray.metrics.ties import TIE

OUTPUTS = ("score", "p_value", "anomalous", "anomaly_map")
BOX = "box"  # an additional output if images keep their aspect ratio


class ExportableScorer(nn.Module):
    """Maps uint8 RGB images (B, H, W, 3) of any common size to the tensors that `OUTPUTS` names.

    score, p_value: (B,) float; NaN if no location of the image is inspected.
    anomalous: (B,) bool; True also for a NaN score.
    anomaly_map: (B, height, width) float, in the input size of the network (the frame).
    box: (4,) int32, top, left, height and width of the images in the frame; this output exists only if the frame has padding.

    The bundle must be read with precision fp32, and nothing else may use it afterwards: its network is changed for inference.
    """

    def __init__(self, bundle: Bundle, half: bool = False) -> None:
        """Takes over the network and the density of a bundle, and changes both.

        Args: half: stores the backbone and the tensors of the density, such as embeddings of normal images, in float16. All
            other steps stay in float32.
        """
        super().__init__()
        detector = bundle.detector
        self.to_frame = ResizeToFrame(bundle.frame)
        self.net, self.reduction = detector.net, detector.reduction
        aligner = detector.net.image_aligner
        self.is_aligned = aligner is not None
        if isinstance(aligner, CongealingAligner):
            self.is_aligned = bool(aligner.enabled)
            aligner._compute_correlation_terms()  # caches the search bank, so that the traced graph holds it as a constant
        fuse_batch_norms(detector.net.backbone)
        if half:
            detector.net.backbone.half()
        self.tiles = TileGrid(*detector.net.config.tile_layout)
        self.density = build_exportable_density(bundle.config.density, detector.density, half)
        self.map_generator, self.profile, self.scoring = detector.map_generator, detector.profile, detector.scoring
        self.coverage_mask = detector.coverage_mask
        self.verdict = VerdictModule(bundle.calibration)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Scores uint8 images (B, H, W, 3). Returns the outputs in the order of `OUTPUTS`.

        If the frame has padding, the last output is the box: top, left, height and width of the image within the map.
        """
        pixels, shown, box = self.to_frame(images)
        theta = self._estimate_alignment(pixels)
        aligned = pixels if theta is None else warp_images(pixels, theta, ALIGNED_IMAGE_PADDING)
        levels, thetas = self.net.compute_features(_cut_into_tiles(aligned, self.tiles))
        features, total_theta = warp_features_to_common_frame(AlignedFeatures(levels, thetas, aligned, theta))
        distance = self.density.score(self.tiles.join_tile_maps(self.reduction(features)))
        inspected = torch.ones_like(distance)
        if shown is not None:
            shown_per_image = shown.expand(images.shape[0], *shown.shape)
            inspected = compute_scored_locations(shown_per_image, total_theta, self.tiles, distance.shape[1:]).to(
                distance.dtype
            )
            distance = distance * inspected
        distance = zero_unscored_locations(distance, total_theta, self.coverage_mask)
        anomaly_map = self.map_generator(distance)
        score = compute_image_scores(self.profile, self.scoring, distance, anomaly_map, self.map_generator)
        if total_theta is not None:
            anomaly_map = warp_images(anomaly_map[:, None], invert_theta(total_theta), "zeros")[:, 0]
        if shown is not None:
            anomaly_map = anomaly_map * shown
        if shown is not None or total_theta is not None:
            score = set_nan_if_uninspected(score, zero_unscored_locations(inspected, total_theta, self.coverage_mask))
        p_value, anomalous = self.verdict(score)
        outputs = (score, p_value, anomalous, anomaly_map)
        return outputs if box is None else (*outputs, box)

    def _estimate_alignment(self, pixels: Tensor) -> Tensor | None:
        """Returns the affine transform (B, 2, 3) that aligns each image; None if the bundle does not align images."""
        if not self.is_aligned:
            return None
        aligner = self.net.image_aligner
        if isinstance(aligner, CongealingAligner):
            return aligner.estimate_transforms(aligner.standardise_images(pixels))[0]
        assert aligner is not None
        theta: Tensor = aligner(pixels)
        return theta


class VerdictModule(nn.Module):
    """A torch module that maps scores (B,) to p-values (B,) and verdicts (B,) bool, as `Calibration` does.

    True means anomalous. A NaN score counts as anomalous.
    """

    def __init__(self, calibration: Calibration) -> None:
        super().__init__()
        self.normal_scores: Tensor
        self.register_buffer("normal_scores", torch.tensor(calibration.image_scores, dtype=torch.float32))
        self.threshold, self.tail = calibration.image_threshold, calibration.tail
        self.num_independent = calibration.num_independent_samples
        self.weight = calibration.num_independent_samples / calibration.num_images
        # The level is a float32 that does not exceed the target rate. Then p <= level holds exactly for anomalous images,
        # whether a user compares in float32 or in float64.
        level = np.float32(calibration.effective_fpr)
        if float(level) > calibration.effective_fpr:
            level = np.nextafter(level, np.float32(0))
        self.highest_anomalous_p, self.lowest_normal_p = float(level), float(np.nextafter(level, np.float32(2)))

    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the p-values and the verdicts of scores."""
        certain_scores = scores - TIE * scores.abs()
        num_at_least = (self.normal_scores >= certain_scores[:, None]).sum(dim=1).to(torch.float32)
        p_value = (1 + num_at_least * self.weight) / (1 + self.num_independent)
        if self.tail is not None:
            excess = (certain_scores - self.tail.start).clamp_min(0)
            tail_p_value = self.tail.share * torch.pow(
                1 + self.tail.shape * excess / self.tail.scale, -1 / self.tail.shape
            )
            p_value = torch.where(certain_scores > self.tail.start, tail_p_value, p_value)
        is_normal = certain_scores <= self.threshold
        p_value = torch.where(
            is_normal, p_value.clamp_min(self.lowest_normal_p), p_value.clamp_max(self.highest_anomalous_p)
        )
        return p_value, is_normal.logical_not()


def _cut_into_tiles(images: Tensor, tiles: TileGrid) -> Tensor:
    """Cuts images (B, C, H, W) into tiles (B * num_tiles, C, side, side), by slices that can be traced."""
    if tiles.num_tiles == 1:
        return images
    side, step = tiles.side_px, tiles.side_px - tiles.overlap_px
    cut_images = [
        images[:, :, row * step : row * step + side, column * step : column * step + side]
        for row in range(tiles.rows)
        for column in range(tiles.columns)
    ]
    return torch.stack(cut_images, dim=1).flatten(0, 1)


def compute_max_image_side_px(height: int, width: int) -> int:
    """Returns the longest image side in pixels for which the computation of the resize weights stays within 32-bit integers."""
    return int(math.sqrt(2**24 * min(height, width)))
