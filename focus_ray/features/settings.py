"""Module for the settings of the network: backbone, size of the input, tiles and alignment.

Each default names its source: [paper] arXiv 2110.04538, [kin] the paper's published relatives (RegAD, SimSiam, PaDiM), [ours] a
choice of this project.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from focus_ray.features.backbones.registry import BACKBONES
from focus_ray.features.backbones.spec import BackboneSpec
from focus_ray.settings.sections import ConfigSection, Layer, Precision

Group = Literal[
    "none",
    "rotation",
    "translation",
    "scale",
    "rotation_scale",
    "rotation_translation",
    "similarity",
    "affine",
]
FeatureGroup = Literal[Group, "rotation_two_scales"]
BackboneName = Annotated[str, AfterValidator(BACKBONES.check_name)]


class ImageAlignmentConfig(ConfigSection):
    """ICA: a spatial transformer on the image, before the backbone [paper]."""

    FIXED: ClassVar[Mapping[str, Any]] = {
        "max_images": 512,
        "max_translation": 0.4,
        "max_scale": 1.15,
        "padding": "reflection",
    }
    FIXED_FOR_SCORES = frozenset({"max_translation", "max_scale", "padding"})
    STORED = frozenset({"min_drop"})

    group: Group = Field(
        default="rotation_translation",
        description="Movements that the aligner may undo, for instance rotation and translation; none switches "
        "alignment off.",
    )
    method: Literal["congealing", "localisation"] = Field(
        default="congealing",
        description="How the movement of an image is found. congealing: by a search against a mean image, which is "
        "learnt from the training images [ours]. localisation: by a network that is trained with the "
        "pairwise loss [paper]; it does not find large rotations.",
    )
    # congealing: alignment is used only if it lowers the pairwise L2 distance of held-out normal images by at least this share
    min_drop: float = 0.25


class FeatureAlignmentConfig(ConfigSection):
    """FCA: a spatial transformer after each of layers 1 to 3, trained by the fine loss alone [paper]."""

    FIXED: ClassVar[Mapping[str, Any]] = {"max_translation": 0.15, "max_scale": 1.15, "max_rotation_deg": 15.0}
    FIXED_FOR_SCORES = frozenset(FIXED)
    STORED = frozenset({"padding"})

    layer1: FeatureGroup = Field(
        default="none",
        description="Movements that the aligner after layer 1 may undo. rotation_two_scales: a scale for each direction, and a "
        "rotation [kin, RegAD].",
    )
    layer2: FeatureGroup = Field(default="none", description="Movements that the aligner after layer 2 may undo.")
    layer3: FeatureGroup = Field(default="none", description="Movements that the aligner after layer 3 may undo.")
    # features of the area that an aligned feature map leaves empty [kin, RegAD]; it was border in earlier versions
    padding: Literal["border", "reflection"] = "reflection"


class TilingConfig(ConfigSection):
    """Tiles of the size of the network's input, in which a large photograph is scored [ours]."""

    STORED = frozenset({"overlap"})

    grid: tuple[Annotated[int, Field(ge=1, le=32)], Annotated[int, Field(ge=1, le=32)]] = Field(
        description="[rows, columns] of tiles. Every photograph is resized to the area of the tiles, so that a tile "
        "shows the same feature of every part."
    )
    # share of a tile's side that overlaps with the neighbouring tile; the maps of both tiles are blended there
    overlap: float = Field(default=0.125, ge=0.0, le=0.5)
    density: Literal["per_tile", "shared"] = Field(
        default="per_tile",
        description="per_tile: each tile has its own places, for parts in the same position in all images. shared: "
        "every tile is compared with the places of all tiles, for textures; this takes less memory.",
    )


class ModelConfig(ConfigSection):
    """The network: alignment, backbone, projector (the paper's encoder f) and predictor (g)."""

    FIXED: ClassVar[Mapping[str, Any]] = {"projector_width": 256, "predictor": True}

    backbone: BackboneName = Field(
        default="resnet18",
        description="The pretrained network that turns images into features (ImageNet, DINOv2 or DINOv3). Its layers 1 to 3 "
        "are used [paper]; of a transformer, four blocks.",
    )
    weights: str = Field(
        default="default",
        min_length=1,
        description="Source of the backbone's weights: 'default' (its ImageNet weights, downloaded or from a "
        "package), 'random', or the path or URI of a file (file://, s3://, https://).",
    )
    weights_sha256: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{8,64}$",
        description="The first digits of the SHA-256 of the weights file; another file is refused. null accepts any "
        "file.",
    )
    image_size_px: int = Field(
        default=224,
        ge=32,
        le=2048,
        description="Side of the square to which images are resized for the network [kin: 224]: a multiple of 16, or "
        "of 14 for DINOv2. A larger side finds smaller defects, and takes more time and memory.",
    )
    resize: Literal["stretch", "pad"] = Field(
        default="stretch",
        description="How an image becomes a square. stretch: it is stretched. pad: it keeps its shape, and its mirror "
        "image fills the rest, which is not scored [ours].",
    )
    tiling: TilingConfig | None = Field(
        default=None,
        description="Scores large photographs in tiles, each of image_size_px. null scores the photograph as a whole.",
    )
    batch_norm: Literal["frozen", "train"] = Field(
        default="frozen",
        description="Whether the backbone's batch norms keep their ImageNet statistics (frozen) or learn new "
        "statistics (train) [ours].",
    )
    padding: Literal["zeros", "reflect"] = Field(
        default="reflect",
        description="What the backbone's convolutions see beyond the border of the image. zeros: as in pretraining; "
        "places at the border then vary most among good images. reflect: the mirror image [ours].",
    )
    precision: Precision = Field(
        default="auto",
        description="The number format of the trained backbone. auto: bf16 on a GPU, or on a CPU with bfloat16 "
        "instructions (AVX512-BF16, AMX); fp32 elsewhere. fp32: the same results on every machine, except "
        "for the last digits.",
    )
    image_alignment: ImageAlignmentConfig = ImageAlignmentConfig()
    feature_alignment: FeatureAlignmentConfig = FeatureAlignmentConfig()
    predictor_width: int = Field(
        default=256,
        ge=4,
        le=4096,
        description="Hidden channels of the predictor g [kin: 256 in RegAD, a quarter in SimSiam].",
    )

    @property
    def tile_grid(self) -> tuple[int, int]:
        """(rows, columns) of tiles of an image; (1, 1) without tiling."""
        return self.tiling.grid if self.tiling is not None else (1, 1)

    def location_side_px(self, map_layer: int) -> int:
        """Returns the side of a location (a cell of the feature map), in pixels of the network's input.

        Args: map_layer: 0, 1 or 2 for layer 1, 2 or 3: the layer whose feature map sets the grid of locations.
        """
        return self.backbone_spec.strides[map_layer]

    @property
    def density_tile_grid(self) -> tuple[int, int]:
        """(rows, columns) of the tiles that share one density; (1, 1) without tiling, or if each tile has its own density."""
        return self.tile_grid if self.tiling is not None and self.tiling.density == "shared" else (1, 1)

    @property
    def overlap_px(self) -> int:
        """Overlap of neighbouring tiles, in pixels of the resized image; 0 without tiling."""
        return round(self.tiling.overlap * self.image_size_px) if self.tiling is not None else 0

    @property
    def tile_layout(self) -> tuple[int, int, int, int]:
        """(rows, columns, side in pixels, overlap in pixels) of the tiles: the arguments of `density.tiles.TileGrid`."""
        return *self.tile_grid, self.image_size_px, self.overlap_px

    @property
    def resized_image_px(self) -> tuple[int, int]:
        """(height, width) in pixels to which images are resized; all tiles together cover this area."""
        step = self.image_size_px - self.overlap_px
        return self.tile_grid[0] * step + self.overlap_px, self.tile_grid[1] * step + self.overlap_px

    @property
    def backbone_spec(self) -> BackboneSpec:
        """The description of the configured backbone: channels, strides, limits and how to build it."""
        return BACKBONES[self.backbone]

    @field_validator("image_size_px")
    @classmethod
    def _check_divisible_image_size(cls, value: int, info: ValidationInfo) -> int:
        backbone = info.data.get("backbone")
        step = 1 if backbone is None else BACKBONES[backbone].strides[2]  # None: the backbone was refused
        if value % step:
            below = value - value % step
            raise ValueError(
                f"image_size_px={value} must be a multiple of {step}, the stride of layer 3 of {backbone}: the nearest are "
                f"{below} and {below + step}"
            )
        return value

    @model_validator(mode="after")
    def _check_consistency(self) -> ModelConfig:
        """Checks settings that depend on each other: tiling, padding, alignment and backbone."""
        aligned_layers = [
            f"model.feature_alignment.{layer}=none"
            for layer in get_args(Layer)
            if getattr(self.feature_alignment, layer) != "none"
        ]
        aligned_image = [] if self.image_alignment.group == "none" else ["model.image_alignment.group=none"]
        spec = self.backbone_spec
        if self.tiling is not None and aligned_image + aligned_layers:
            raise ValueError(
                f"tiling does not go with alignment, which would move each tile by itself: set "
                f"{', '.join(aligned_image + aligned_layers)}, or leave tiling out"
            )
        if self.padding == "reflect" and self.image_size_px < spec.min_reflected_px:
            raise ValueError(
                f"padding=reflect with {self.backbone} needs an image_size_px of at least {spec.min_reflected_px}, got "
                f"{self.image_size_px}: raise it, or set padding=zeros"
            )
        if aligned_layers and not spec.passes_feature_maps:
            raise ValueError(
                f"{self.backbone} hands tokens from layer to layer, which cannot be aligned as maps: set "
                f"{', '.join(aligned_layers)}, or take another backbone"
            )
        return self
