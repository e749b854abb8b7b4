"""Module for the settings of the FYD training (arXiv 2110.04538).

Each default names its source: [paper] arXiv 2110.04538, [kin] the paper's published relatives (RegAD, SimSiam, PaDiM), [ours] a
choice of this project.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from focus_ray.settings.sections import ConfigSection


class TrainConfig(ConfigSection):
    """Optimisation by SGD with momentum and a cosine schedule [kin]. The paper does not give its values."""

    FIXED: ClassVar[Mapping[str, Any]] = {
        "learning_rate_head": None,  # None: `learning_rate`
        "learning_rate_image_alignment": 1e-2,
        "learning_rate_feature_alignment": None,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "stop_gradient": True,
        "symmetric": True,
        "precision": "auto",
        "gradient_clip_norm": None,
        "warmup_epochs": 0.0,
        "checkpoint_every_epochs": 1,
    }

    steps: int = Field(
        default=0,
        ge=0,
        le=10_000_000,
        description="Optimiser steps in which the network learns by gradient. 0 trains nothing: the backbone does not "
        "change.",
    )
    scope: Literal["category", "plant"] = Field(
        default="category",
        description="category: each category trains its own network. plant: all categories train one network together; "
        "each batch has images of one category.",
    )
    batch_size: int = Field(
        default=32,
        ge=2,
        le=1_000_000,
        description="Images in an optimiser step, of all workers together [kin: 32]. A category with fewer images "
        "uses all its images in each step.",
    )
    learning_rate: float = Field(
        default=3e-3,
        gt=0.0,
        le=10.0,
        description="Learning rate of all parts but the image aligner [ours]. It belongs to the batch size: scale it "
        "yourself if you change batch_size.",
    )
    lambda_ica: float = Field(default=1.0, ge=0.0, description="Weight of the image alignment loss.")
    lambda_fine: float = Field(default=1.0, ge=0.0, description="Weight of the fine loss.")
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**31,
        description="Seed of everything random: held-out images, weights, order, channels, synthetic defects. The "
        "same seed gives the same model.",
    )

    @property
    def trains_each_category(self) -> bool:
        """Whether each category trains a network of its own."""
        return self.steps > 0 and self.scope == "category"

    @property
    def trains_plant(self) -> bool:
        """Whether all categories train one network together."""
        return self.steps > 0 and self.scope == "plant"
