"""Settings of the anomaly map, the image score and the thresholds.

Each default names its source: [paper] arXiv 2110.04538, [kin] the paper's published relatives (RegAD, SimSiam, PaDiM), [ours] a
choice of this project.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from focus_ray.settings.sections import Section


class ScoringConfig(Section):
    """How distances become a map and a score."""

    smoothing_sigma_px: float = Field(
        default=4.0,
        ge=0.0,
        le=64.0,
        description="Standard deviation of the Gaussian that smooths the map, in pixels of the network's input [kin: "
        "4].",
    )
    image_score: Literal["maximum", "profile"] = Field(
        default="profile",
        description="How the score of an image is made from its map. maximum: the highest value [kin]. profile: how "
        "far the highest values lie above those of good images, with a weight for each place, so that 1 "
        "is a typical good image [ours]; a density without embeddings uses the maximum.",
    )


class CalibrationConfig(Section):
    """Thresholds and p-values, from good images that are held out of the density or scored by leave-one-out."""

    method: Literal["auto", "split", "cross", "leave_one_out"] = Field(
        default="auto",
        description="Which good images set the thresholds. split: a held-out share (data.holdout_fraction). "
        "leave_one_out: every training image, scored with its own embeddings left out of the density. "
        "cross: every training image, scored without its fold. auto: split if it holds out enough images "
        "for a steady threshold (5 / target_fpr), or if train.epochs is above 0; otherwise leave_one_out.",
    )
    num_folds: int = Field(default=5, ge=2, le=100, description="cross: number of folds.")
    max_images: int = Field(
        default=4096,
        ge=1,
        description="Largest number of calibration images: split holds out no more, cross scores no more, chosen at "
        "even steps. With 4096 images, the rate of a threshold for 0.05 lies between 0.044 and 0.056 in 9 "
        "of 10 cases. A worker keeps up to 10 % of the map of each image.",
    )
    target_fpr: float = Field(
        default=0.05,
        gt=0.0,
        lt=1.0,
        description="Share of good images that may be called bad. A lower share lets more defects through.",
    )
    target_pixel_fpr: float = Field(
        default=0.001, gt=0.0, lt=1.0, description="Share of the pixels of good images that may be marked."
    )
