"""Module for the settings of the FYD training (arXiv 2110.04538).

Each default names its source: [paper] arXiv 2110.04538, [kin] the paper's published relatives (RegAD, SimSiam, PaDiM), [ours] a
choice of this project.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from focus_ray.settings.sections import ConfigSection


class TrainConfig(ConfigSection):
    """Optimisation by SGD with momentum and a cosine schedule [kin]. The paper does not give its values."""

    FIXED: ClassVar[Mapping[str, Any]] = {
        "learning_rate_head": 0.05,
        "learning_rate_image_alignment": 1e-2,
        "learning_rate_feature_alignment": 0.05,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "warmup_epochs": 0.0,
        "stop_gradient": True,
        "symmetric": False,
        "precision": "auto",
        "gradient_clip_norm": None,
        "checkpoint_every_epochs": 1,
    }

    epochs: int = Field(
        default=0,
        ge=0,
        le=10_000,
        description="Passes over the training images in which the network learns by gradient. 0 trains nothing: the "
        "backbone does not change.",
    )
    batch_size: int = Field(
        default=32,
        ge=2,
        le=1_000_000,
        description="Images in an optimiser step, of all workers together [kin: 32]. An epoch has as many steps as it has full "
        "batches, with any number of workers.",
    )
    learning_rate: float = Field(
        default=1e-4,
        gt=0.0,
        le=10.0,
        description="Learning rate of the backbone [kin: 1e-4]. It belongs to the batch size: scale it yourself if you change "
        "batch_size.",
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
