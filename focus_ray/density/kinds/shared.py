"""Module for the settings that all densities share.

Each default names its source: [paper] arXiv 2110.04538, [kin] the paper's published relatives (RegAD, SimSiam, PaDiM), [ours] a
choice of this project.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from focus_ray.density.registry import DENSITIES
from focus_ray.settings.sections import ConfigSection, Layer, Precision

DensityName = Annotated[str, AfterValidator(DENSITIES.check_name)]


def _parse_shrinkage(value: Any) -> float | str:
    """Returns a number, or a number with the unit "absolute". Raises: ValueError: the value has another form."""
    number, _, unit = str(value).partition(" ")
    try:
        is_in_range = 0 < float(number) <= 1000
    except ValueError:
        is_in_range = False
    if not is_in_range or unit not in ("", "absolute"):
        raise ValueError(f"expected a number above 0, up to 1000, as in 2.0 or '0.01 absolute' (got {value!r})")
    return f"{number} absolute" if unit else float(number)


class SharedDensitySettings(ConfigSection):
    """The density of normal embeddings, one for each place of the map."""

    # layers: the paper uses these three [paper].
    # `smooth_layers` are averaged over 3 x 3 locations on the grid of layer 2, as in PatchCore; PaDiM uses the grid of layer 1
    # and averages nothing
    # precision: number format of the place memory and its search; it follows model.precision (`fitting.settings.Config`).
    # keep_moments: whether the bundle keeps the data with which `focus-ray update` adds or removes images later.
    STORED = frozenset({"layers", "smooth_layers", "precision", "keep_moments"})

    kind: DensityName = Field(
        default="nearest",
        description="What the model remembers of normal images. nearest: their embeddings; the distance at a place is "
        "the distance to the nearest normal embedding around it, whitened by the pooled covariance if no "
        "discriminant projection is learnt [ours]. gaussian: a mean and a covariance for each place [kin, "
        "PaDiM].",
    )
    layers: tuple[Layer, ...] = Field(default=("layer1", "layer2", "layer3"), min_length=1)
    map_stride_px: Literal[4, 8] = Field(
        default=8,
        description="Side of a place of the map, in pixels of the network's input. 4: all layers are brought to layer "
        "1's places by nearest neighbour [kin, PaDiM]. 8: to layer 2's places, layer 1 by averaging, "
        "layer 3 bilinearly [ours]. DINOv2: a patch of 14 pixels in both cases.",
    )
    smooth_layers: tuple[Layer, ...] = ("layer2", "layer3")
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
    shrinkage: Annotated[float | str, BeforeValidator(_parse_shrinkage)] = Field(
        default=2.0,
        description="Ridge that is added to the covariance's diagonal, above 0, up to 1000: a multiple of the embeddings' "
        "mean variance within places, which suits any backbone [ours], as in 2.0; or a value in the features' own unit, as "
        "in '0.01 absolute' [kin].",
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
    precision: Precision = "auto"
    keep_moments: bool = True

    @classmethod
    def derive_stored_values(cls, tree: Mapping[str, Any]) -> dict[str, Any]:
        """See `ConfigSection.derive_stored_values`: returns name -> value, here for `precision` and `smooth_layers` too."""
        values = super().derive_stored_values(tree)
        values["precision"] = tree.get("precision", "auto")
        if tree.get("map_stride_px") == 4:
            values["smooth_layers"] = ()
        return values

    @model_validator(mode="before")
    @classmethod
    def _convert_shrinkage_unit(cls, value: Any) -> Any:
        """Joins `shrinkage_unit` of an earlier version with `shrinkage`."""
        if not isinstance(value, dict) or value.get("shrinkage_unit") not in ("absolute", "mean_variance"):
            return value
        tree = {key: setting for key, setting in value.items() if key != "shrinkage_unit"}
        if value["shrinkage_unit"] == "absolute":
            tree["shrinkage"] = f"{value.get('shrinkage', 2.0)} absolute"
        return tree

    @property
    def map_layer(self) -> int:
        """Index of the backbone layer whose grid the density uses: 0 for layer1 (map_stride_px 4), 1 for layer2 (8)."""
        return 0 if self.map_stride_px == 4 else 1
