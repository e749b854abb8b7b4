"""Module for the settings that all densities share.

Each default names its source: [paper] arXiv 2110.04538, [kin] the paper's published relatives (RegAD, SimSiam, PaDiM), [ours] a
choice of this project.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from focus_ray.density.registry import DENSITIES
from focus_ray.settings.sections import ConfigSection, Layer, Precision

DensityName = Annotated[str, AfterValidator(DENSITIES.check_name)]


class SharedDensitySettings(ConfigSection):
    """The density of normal embeddings, one for each place of the map."""

    kind: DensityName = Field(
        default="nearest",
        description="What the model remembers of normal images. nearest: their embeddings; the distance at a place is "
        "the distance to the nearest normal embedding around it, whitened by the pooled covariance if no "
        "discriminant projection is learnt [ours]. gaussian: a mean and a covariance for each place [kin, "
        "PaDiM].",
    )
    layers: tuple[Layer, ...] = Field(
        default=("layer1", "layer2", "layer3"),
        min_length=1,
        description="Layers of the backbone whose features are joined to an embedding, in order [paper].",
    )
    map_stride_px: Literal[4, 8] = Field(
        default=8,
        description="Side of a place of the map, in pixels of the network's input. 4: all layers are brought to layer "
        "1's places by nearest neighbour [kin, PaDiM]. 8: to layer 2's places, layer 1 by averaging, "
        "layer 3 bilinearly [ours]. DINOv2: a patch of 14 pixels in both cases.",
    )
    smooth_layers: tuple[Layer, ...] = Field(
        default=("layer2", "layer3"),
        description="Layers whose features are first averaged over 3x3 places [kin, PatchCore].",
    )
    reduction: Literal["random", "semi_orthogonal", "none", "discriminant"] = Field(
        default="discriminant",
        description="How the channels of an embedding are reduced to num_channels [kin: 100 random channels in "
        "PaDiM]. discriminant: by a projection, learnt in closed form, to directions in which synthetic "
        "defects differ from normal images [ours]; nearest then compares without whitening. "
        "semi_orthogonal: by a random projection. random: to randomly chosen channels. none: no "
        "reduction.",
    )
    num_channels: int = Field(default=100, ge=1, le=4096, description="Channels after the reduction [kin: 100].")
    metric: str | None = Field(
        default=None,
        description="discriminant: path or URI of a discriminant projection that was learnt on other categories "
        "(`focus-ray metric` writes it). null learns the category's own projection [ours].",
    )
    shrinkage: float = Field(
        default=2.0,
        gt=0.0,
        le=1000.0,
        description="Ridge that is added to the covariance's diagonal, in shrinkage_unit.",
    )
    shrinkage_unit: Literal["mean_variance", "absolute"] = Field(
        default="mean_variance",
        description="The unit of shrinkage. mean_variance: multiples of the embeddings' mean variance within places, "
        "which suits any backbone [ours]. absolute: the value itself [kin: 0.01].",
    )
    window: Literal[1, 3, 5] = Field(
        default=3,
        description="nearest: a place is compared with the normal embeddings of window x window places around it [ours].",
    )
    max_images: int = Field(
        default=512,
        ge=2,
        description="nearest: largest number of images whose embeddings are kept, chosen at even steps. gaussian uses "
        "all images.",
    )
    precision: Precision = Field(
        default="auto",
        description="nearest: the number format of the place memory and its search, as in model.precision. bf16 takes "
        "half the memory.",
    )
    keep_moments: bool = Field(
        default=True,
        description="Whether the bundle keeps the data with which `focus-ray update` adds or removes images later. "
        "This is the largest file of the bundle.",
    )

    @property
    def map_layer(self) -> int:
        """Index of the backbone layer whose grid the density uses: 0 for layer1 (map_stride_px 4), 1 for layer2 (8)."""
        return 0 if self.map_stride_px == 4 else 1

    @field_validator("layers")
    @classmethod
    def _check_layer_order(cls, value: tuple[Layer, ...]) -> tuple[Layer, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError(
                f"layers must be in order and named once, for instance [layer1, layer2]: got {list(value)}"
            )
        return value
