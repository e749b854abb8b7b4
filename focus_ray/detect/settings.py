"""Module for the settings of the anomaly map, the image score and the thresholds.

Each default names its source: [paper] arXiv 2110.04538, [kin] the paper's published relatives (RegAD, SimSiam, PaDiM), [ours] a
choice of this project.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from focus_ray.settings.sections import ConfigSection


class ScoringConfig(ConfigSection):
    """How distances become a map and a score."""

    FIXED: ClassVar[Mapping[str, Any]] = {"smoothing_sigma_px": 4.0}
    FIXED_FOR_SCORES = frozenset(FIXED)

    image_score: Literal["maximum", "highest_percent", "profile"] = Field(
        default="profile",
        description="How the score of an image is made from its map. maximum: the highest value [kin]. highest_percent: the "
        "mean of the highest 1 % of the map [kin, RAD]. profile: how "
        "far the highest values lie above those of good images, with a weight for each place, so that 1 "
        "is a typical good image [ours]; a density without embeddings uses the maximum.",
    )


class CalibrationConfig(ConfigSection):
    """Thresholds and p-values, from good images that are held out of the density or scored by leave-one-out."""

    FIXED: ClassVar[Mapping[str, Any]] = {"num_folds": 5, "max_images": 4096}

    method: Literal["auto", "split", "cross", "leave_one_out"] = Field(
        default="auto",
        description="Which good images set the thresholds. split: a held-out share (data.holdout_fraction). "
        "leave_one_out: every training image, scored with its own embeddings left out of the density. "
        "cross: every training image, scored without its fold. auto: split if it holds out enough images "
        "for a steady threshold (5 / target_fpr), or if train.steps is above 0; otherwise leave_one_out.",
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

    @field_validator("target_fpr", "target_pixel_fpr", mode="before")
    @classmethod
    def _refuse_percentage(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses a percentage in place of a share. Raises: ValueError: the value is a number from 1 to 100."""
        if isinstance(value, (int, float)) and 1 <= value <= 100:
            raise ValueError(f"{info.field_name} is a share below 1: {value:g} % is {value / 100:g}")
        return value
