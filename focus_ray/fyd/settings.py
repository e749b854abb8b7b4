"""Settings of the FYD training.

Each default names its source: [paper] arXiv 2110.04538, [kin] the paper's published relatives (RegAD, SimSiam, PaDiM), [ours] a
choice of this project.
"""

from __future__ import annotations

from pydantic import Field

from focus_ray.settings.sections import Precision, Section


class TrainConfig(Section):
    """Optimisation by SGD with momentum and a cosine schedule [kin]. The paper does not give its values."""

    epochs: int = Field(
        default=0,
        ge=0,
        le=10_000,
        description="Passes over the training images in which the network learns by gradient. 0 trains nothing: the "
        "backbone does not change.",
    )
    batch_size_per_worker: int = Field(
        default=32,
        ge=2,
        le=4096,
        description="Images in a batch of one worker, in training steps and in passes [kin: 32].",
    )
    learning_rate: float = Field(
        default=1e-4, gt=0.0, le=10.0, description="Learning rate of the backbone [kin: 1e-4]."
    )
    learning_rate_head: float = Field(
        default=0.05,
        gt=0.0,
        le=10.0,
        description="Learning rate of the projector and predictor. They start at random and are dropped after "
        "training. So they learn at SimSiam's rate [kin: 0.05], while the backbone is only fine-tuned "
        "[ours].",
    )
    learning_rate_image_alignment: float = Field(
        default=1e-2,
        gt=0.0,
        le=10.0,
        description="Learning rate of the image aligner, for image_alignment.method=localisation [kin: 0.01].",
    )
    learning_rate_feature_alignment: float = Field(
        default=0.05,
        gt=0.0,
        le=10.0,
        description="Learning rate of the feature aligners. They start at zero and would not move at the backbone's "
        "rate [ours].",
    )
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0, description="Momentum of SGD [kin: 0.9].")
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0, description="Weight decay of SGD, on every parameter.")
    warmup_epochs: float = Field(
        default=0.0,
        ge=0.0,
        description="Epochs in which the learning rates rise linearly. Then they fall by a cosine schedule [ours].",
    )
    lambda_ica: float = Field(default=1.0, ge=0.0, description="Weight of the image alignment loss.")
    lambda_fine: float = Field(default=1.0, ge=0.0, description="Weight of the fine loss.")
    stop_gradient: bool = Field(
        default=True, description="Whether no gradient flows through the shuffled branch of the fine loss [paper]."
    )
    symmetric: bool = Field(
        default=False, description="Whether the fine loss is averaged over both directions of a pair."
    )
    precision: Precision = Field(
        default="auto",
        description="The number format of training. auto: bf16 autocast on a GPU that has it, fp32 elsewhere.",
    )
    gradient_clip_norm: float | None = Field(
        default=None,
        gt=0.0,
        description="Gradients with a larger norm are scaled down to this norm. null does not scale.",
    )
    checkpoint_every_epochs: int = Field(
        default=1,
        ge=1,
        description="Epochs between two checkpoints. An interrupted training continues from its last checkpoint.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**31,
        description="Seed of everything random: held-out images, weights, order, channels, synthetic defects. The "
        "same seed gives the same model.",
    )
