"""The configuration of a run: frozen models that refuse unknown keys; YAML in, resolved YAML or JSON out.

Long, so that every setting of a run can be read in one place.

Paper constants and their kin are defaults here, each with its source: [paper] arXiv 2110.04538, [kin] its published
relatives (RegAD, SimSiam, PaDiM), [ours] a choice of this project.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from focus_ray.errors import ConfigError
from focus_ray.kinds import BACKBONES, DENSITIES, GEOMETRIES, TRACKERS, BackboneGeometry
from focus_ray.names import NAME_PATTERN
from focus_ray.yaml_text import load_yaml

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
Layer = Literal["layer1", "layer2", "layer3"]
Precision = Literal["auto", "fp32", "bf16"]
BackboneName = Annotated[str, AfterValidator(BACKBONES.check)]
DensityName = Annotated[str, AfterValidator(DENSITIES.check)]
TrackerName = Annotated[str, AfterValidator(TRACKERS.check)]
Polygon = tuple[tuple[float, float], ...]


def _is_polygon(region: Any) -> bool:
    """Whether it is one list of points, and not a list of such lists."""
    try:
        numbers = [number for point in region for number in point]
        return bool(numbers) and all(isinstance(number, (int, float)) for number in numbers)
    except TypeError:
        return False


class Section(BaseModel):
    """Base of configurations: frozen, and no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


M = TypeVar("M", bound=BaseModel)


class DataConfig(Section):
    """Where the images are and which of them are held out."""

    uri: str = Field(
        description="Where the images are: the root of a data set that `focus-ray ingest` made, a local path or an s3:// "
        "URI."
    )
    categories: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="The categories to train; each gets a model of its own. null takes all that the data set has.",
    )
    holdout_fraction: float = Field(
        default=0.2,
        ge=0.0,
        lt=1.0,
        description="Share of the normal training images that is held out to calibrate, so that it neither trains nor enters "
        "the density [ours]. It counts for calibration.method=split.",
    )
    memory_budget_mb: float = Field(
        default=4096.0,
        ge=0.0,
        description="A worker keeps its decoded images in memory up to this many MiB. If they are more, it streams them anew "
        "in each pass.",
    )
    regions: dict[str, str | tuple[Polygon, ...]] = Field(
        default={},
        description="Which part of the images is inspected, by category; nothing is scored outside. A region is a polygon or "
        "a list of polygons, each a list of [x, y] as shares of the image's width and height, or the path or URI "
        "of a mask image that is white where parts are inspected.",
    )

    @field_validator("regions", mode="before")
    @classmethod
    def _polygons(cls, value: Any) -> Any:
        """One polygon may stand without a list around it."""
        if not isinstance(value, dict):
            return value
        return {name: [region] if _is_polygon(region) else region for name, region in value.items()}

    @field_validator("regions")
    @classmethod
    def _drawable(cls, value: dict[str, str | tuple[Polygon, ...]]) -> dict[str, str | tuple[Polygon, ...]]:
        for name, region in value.items():
            if not region:
                raise ValueError(f"{name}: it is empty: give polygons or the path of a mask, or leave the category out")
            for polygon in () if isinstance(region, str) else region:
                if len(polygon) < 3:
                    raise ValueError(f"{name}: a polygon has {len(polygon)} points: give 3 at least")
                outside = [list(point) for point in polygon if not (0 <= point[0] <= 1 and 0 <= point[1] <= 1)]
                if outside:
                    raise ValueError(
                        f"{name}: the point {outside[0]} lies outside the image: points are [x, y], shares from 0 to 1 of its "
                        "width and height"
                    )
        return value

    @field_validator("categories", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("categories")
    @classmethod
    def _unique(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and len(set(value)) != len(value):
            raise ValueError(f"categories lists a name twice: {list(value)}")
        return value


class ImageAlignmentConfig(Section):
    """ICA: a spatial transformer on the image, before the backbone [paper]."""

    group: Group = Field(
        default="rotation_translation",
        description="Which movements the aligner may undo, for instance turns and shifts; none leaves images as they are.",
    )
    method: Literal["congealing", "localisation"] = Field(
        default="congealing",
        description="How the movement of an image is found. congealing: it is searched against a mean image that is learnt "
        "from the training images [ours]. localisation: a network reads it off the image and is trained by the "
        "pairwise loss [paper]; it does not find large rotations.",
    )
    min_drop: float = Field(
        default=0.25,
        ge=0.0,
        le=1.0,
        description="congealing: alignment is used only if it lowers the pairwise L2 distance of held-out normal images by "
        "at least this share.",
    )
    max_images: int = Field(
        default=512, ge=4, description="congealing: the mean image is learnt from at most this many images."
    )
    max_translation: float = Field(
        default=0.4,
        gt=0.0,
        le=1.0,
        description="Largest shift that is undone, in half image widths (bounded group [ours]).",
    )
    max_scale: float = Field(
        default=1.15,
        gt=1.0,
        le=2.0,
        description="Largest zoom in or out that is undone; it bounds the known zoom-in optimum [ours].",
    )
    padding: Literal["border", "reflection"] = Field(
        default="reflection",
        description="What an aligned image shows where it has moved out of its frame; this is never scored [ours].",
    )


class FeatureAlignmentConfig(Section):
    """FCA: a spatial transformer after each of layers 1 to 3, trained by the fine loss alone [paper]."""

    layer1: Group = Field(default="none", description="Which movements the aligner after layer 1 may undo.")
    layer2: Group = Field(default="none", description="Which movements the aligner after layer 2 may undo.")
    layer3: Group = Field(default="none", description="Which movements the aligner after layer 3 may undo.")
    max_translation: float = Field(
        default=0.15, gt=0.0, le=1.0, description="Largest shift that is undone, in half map widths [ours]."
    )
    max_scale: float = Field(default=1.15, gt=1.0, le=2.0, description="Largest zoom in or out that is undone [ours].")
    max_rotation_deg: float = Field(
        default=15.0, gt=0.0, le=180.0, description="Largest turn that is undone, in degrees [ours]."
    )


class TilingConfig(Section):
    """Tiles, each as large as the network's input, in which a large photograph is scored [ours]."""

    grid: tuple[Annotated[int, Field(ge=1, le=32)], Annotated[int, Field(ge=1, le=32)]] = Field(
        description="[rows, columns] of tiles. Every photograph is brought to the size that the tiles cover, whatever its "
        "own, so that a tile shows the same part of every image."
    )
    overlap: float = Field(
        default=0.125,
        ge=0.0,
        le=0.5,
        description="Share of a tile's side that it has in common with its neighbour; there the maps of both are blended.",
    )
    density: Literal["per_tile", "shared"] = Field(
        default="per_tile",
        description="per_tile: each tile has places of its own, for parts that lie alike in all images. shared: every tile "
        "is compared with the places of all tiles, for textures; this takes less memory.",
    )


class ModelConfig(Section):
    """The network: alignment, backbone, projector (the paper's encoder f) and predictor (g)."""

    backbone: BackboneName = Field(
        default="resnet18",
        description="The network, trained on ImageNet or in the way of DINOv2, that turns images into features; its layers 1 "
        "to 3 are used [paper].",
    )
    weights: str = Field(
        default="default",
        min_length=1,
        description="Where the backbone's weights come from: 'default' (its ImageNet weights by name, downloaded or from a "
        "package), 'random', or a file's path or URI (file://, s3://, https://).",
    )
    weights_sha256: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{8,64}$",
        description="The beginning of the SHA-256 that the weights file must have; another file is refused. null takes any.",
    )
    image_size_px: int = Field(
        default=224,
        ge=32,
        le=2048,
        description="Side of the square that images are brought to before the network sees them [kin: 224]: a multiple of 16, or "
        "of 14 for DINOv2. Larger finds smaller defects, and takes more time and memory.",
    )
    resize: Literal["stretch", "pad"] = Field(
        default="stretch",
        description="How an image becomes a square. stretch: it is stretched. pad: it keeps its shape, and the rest is "
        "filled with its mirror image, which is not scored [ours].",
    )
    tiling: TilingConfig | None = Field(
        default=None,
        description="Scores large photographs in tiles, each of image_size_px; null scores a photograph as one.",
    )
    batch_norm: Literal["frozen", "train"] = Field(
        default="frozen",
        description="Whether the backbone's batch norms keep their ImageNet statistics (frozen) or learn new ones (train) "
        "[ours].",
    )
    padding: Literal["zeros", "reflect"] = Field(
        default="reflect",
        description="What the backbone's convolutions see beyond the border of the image. zeros: as it was trained; places "
        "at the border then vary most among good images. reflect: the image's own mirror image [ours].",
    )
    precision: Precision = Field(
        default="auto",
        description="The number format that the backbone computes in once it is trained. auto: bf16 on a GPU or CPU that "
        "multiplies it by instructions of its own (AVX512-BF16, AMX), fp32 elsewhere. fp32: the same results on "
        "every machine, to the last digits.",
    )
    image_alignment: ImageAlignmentConfig = ImageAlignmentConfig()
    feature_alignment: FeatureAlignmentConfig = FeatureAlignmentConfig()
    projector_width: int = Field(
        default=256,
        ge=8,
        le=4096,
        description="Channels of the projector f, three 1x1 convolutions that only training uses [kin: 256].",
    )
    predictor: bool = Field(
        default=True,
        description="Whether the predictor g stands after the projector f [paper]; without it is an ablation.",
    )
    predictor_width: int = Field(
        default=256,
        ge=4,
        le=4096,
        description="Hidden channels of the predictor g [kin: 256 in RegAD, a quarter in SimSiam].",
    )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return self.tiling.grid if self.tiling is not None else (1, 1)

    def place_px(self, density: DensityConfig) -> int:
        """Side of what a place of the density's map stands for, in the network's input."""
        return self.geometry.strides[density.map_layer]

    @property
    def shared_grid(self) -> tuple[int, int]:
        """Rows and columns of the tiles that share one density's places."""
        return self.grid if self.tiling is not None and self.tiling.density == "shared" else (1, 1)

    @property
    def overlap_px(self) -> int:
        """What neighbouring tiles have in common."""
        return round(self.tiling.overlap * self.image_size_px) if self.tiling is not None else 0

    @property
    def frame_px(self) -> tuple[int, int]:
        """Height and width that images are brought to: those of all tiles together."""
        step = self.image_size_px - self.overlap_px
        return self.grid[0] * step + self.overlap_px, self.grid[1] * step + self.overlap_px

    @property
    def geometry(self) -> BackboneGeometry:
        """Of the backbone."""
        return GEOMETRIES.get(self.backbone, BackboneGeometry())

    @field_validator("image_size_px")
    @classmethod
    def _divisible(cls, value: int, known: ValidationInfo) -> int:
        backbone = known.data.get("backbone", "")  # not there where it was refused
        step = GEOMETRIES.get(backbone, BackboneGeometry()).strides[2]
        if value % step:
            below = value - value % step
            raise ValueError(
                f"image_size_px={value} must be a multiple of {step}, the stride of layer 3 of {backbone}: the nearest are "
                f"{below} and {below + step}"
            )
        return value

    @model_validator(mode="after")
    def _tiles_do_not_move(self) -> ModelConfig:
        aligned = {"model.image_alignment.group": self.image_alignment.group}
        aligned.update(
            {f"model.feature_alignment.{key}": getattr(self.feature_alignment, key) for key in get_args(Layer)}
        )
        moving = [f"{key}=none" for key, group in aligned.items() if group != "none"]
        if self.tiling is not None and moving:
            raise ValueError(
                f"tiling does not go with alignment, which would move each tile by itself: set {', '.join(moving)}, or leave "
                "tiling out"
            )
        return self

    @model_validator(mode="after")
    def _large_enough(self) -> ModelConfig:
        smallest = self.geometry.min_reflected_px
        if self.padding == "reflect" and self.image_size_px < smallest:
            raise ValueError(
                f"padding=reflect with {self.backbone} needs an image_size_px of at least {smallest}, got {self.image_size_px}: "
                "raise it, or set padding=zeros"
            )
        return self

    @model_validator(mode="after")
    def _aligns_maps(self) -> ModelConfig:
        moving = [key for key in get_args(Layer) if getattr(self.feature_alignment, key) != "none"]
        if moving and not self.geometry.passes_feature_maps:
            raise ValueError(
                f"{self.backbone} hands tokens from layer to layer, which cannot be aligned as maps: set "
                f"{', '.join(f'model.feature_alignment.{key}=none' for key in moving)}, or take another backbone"
            )
        return self


class TrainConfig(Section):
    """Optimisation. SGD with momentum and a cosine schedule [kin]; the paper's values are not known."""

    epochs: int = Field(
        default=0,
        ge=0,
        le=10_000,
        description="Passes over the training images in which the network learns by gradient. 0 trains nothing: the backbone "
        "stays as it is.",
    )
    batch_size_per_worker: int = Field(
        default=32,
        ge=2,
        le=4096,
        description="Images that a worker takes at a time, in training steps and in passes [kin: 32].",
    )
    learning_rate: float = Field(
        default=1e-4, gt=0.0, le=10.0, description="Learning rate of the backbone [kin: 1e-4]."
    )
    learning_rate_head: float = Field(
        default=0.05,
        gt=0.0,
        le=10.0,
        description="Learning rate of the projector and predictor. They start at random and are dropped after training, so "
        "they learn at SimSiam's rate [kin: 0.05] while the backbone is only tuned [ours].",
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
        description="Learning rate of the feature aligners. They start at zero and do not move at the backbone's rate "
        "[ours].",
    )
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0, description="Momentum of SGD [kin: 0.9].")
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0, description="Weight decay of SGD, on every parameter.")
    warmup_epochs: float = Field(
        default=0.0,
        ge=0.0,
        description="Epochs in which the learning rates rise linearly, before they fall by a cosine schedule [ours].",
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
        default=None, gt=0.0, description="Gradients of a larger norm are scaled down to it; null leaves them."
    )
    checkpoint_every_epochs: int = Field(
        default=1, ge=1, description="Epochs between two checkpoints, from which a training that was lost goes on."
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**31,
        description="Seed of whatever is drawn: held-out images, weights, order, channels, synthetic defects. The same seed "
        "gives the same model.",
    )


class DensityConfig(Section):
    """One density per location over the embeddings of normal images."""

    kind: DensityName = Field(
        default="nearest",
        description="What is remembered of normal images. nearest: their embeddings; a place's distance is that to the "
        "nearest normal embedding around it, whitened by the pooled covariance where no metric is learnt [ours]. "
        "gaussian: a mean and a covariance for each place [kin, PaDiM].",
    )
    layers: tuple[Layer, ...] = Field(
        default=("layer1", "layer2", "layer3"),
        min_length=1,
        description="Layers of the backbone whose features are joined to an embedding, in order [paper].",
    )
    map_stride_px: Literal[4, 8] = Field(
        default=8,
        description="Pixels of the input, along a side, that a place of the map stands for. 4: all layers are brought to "
        "layer 1's places by nearest neighbour [kin, PaDiM]. 8: to layer 2's, layer 1 by averaging, layer 3 "
        "bilinearly [ours]. DINOv2: a patch of 14 pixels either way.",
    )
    smooth_layers: tuple[Layer, ...] = Field(
        default=("layer2", "layer3"),
        description="Layers whose features are first averaged over 3x3 places [kin, PatchCore].",
    )
    reduction: Literal["random", "semi_orthogonal", "none", "discriminant"] = Field(
        default="discriminant",
        description="How an embedding's channels are reduced to num_channels [kin: 100 random channels in PaDiM]. "
        "discriminant: to the directions in which synthetic defects differ from their nearest normal neighbours "
        "and normal images do not, learnt in closed form [ours]; nearest then compares in it as it is. "
        "semi_orthogonal: by a random projection. random: to randomly chosen channels. none: not at all.",
    )
    num_channels: int = Field(
        default=100, ge=1, le=4096, description="Channels that are left after the reduction [kin: 100]."
    )
    metric: str | None = Field(
        default=None,
        description="discriminant: path or URI of a metric that was learnt over other categories, as `focus-ray metric` "
        "writes it, in place of one of the category's own [ours].",
    )
    shrinkage: float = Field(
        default=2.0,
        gt=0.0,
        le=1000.0,
        description="Ridge that is added to the covariance's diagonal, in shrinkage_unit.",
    )
    shrinkage_unit: Literal["mean_variance", "absolute"] = Field(
        default="mean_variance",
        description="The unit of shrinkage. mean_variance: multiples of the embeddings' mean variance within places, so that "
        "it suits any backbone [ours]. absolute: as it is [kin: 0.01].",
    )
    pooling: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="gaussian: weight of the covariance pooled over all places against a place's own; 0 is its own alone "
        "[ours].",
    )
    window: Literal[1, 3, 5] = Field(
        default=3,
        description="nearest: a place is compared with the normal embeddings of window x window places around it [ours].",
    )
    max_images: int = Field(
        default=512,
        ge=2,
        description="nearest: embeddings of at most this many images are kept, evenly chosen. A Gaussian takes all.",
    )
    per_place: int | None = Field(
        default=128,
        ge=2,
        description="nearest: of these, a place keeps at most this many, chosen greedily so that every embedding that is "
        "left out is near one that is kept [ours]; times the number of tiles where they share places. null keeps "
        "all.",
    )
    precision: Precision = Field(
        default="auto",
        description="nearest: the number format in which the memory of places is held and searched, as model.precision. bf16 "
        "takes half the memory.",
    )
    coreset: int = Field(
        default=1024,
        ge=0,
        le=65536,
        description="nearest: size of a second memory that knows no places: patches chosen greedily from all images. Its "
        "distance is averaged with that of the memory of places [kin, PatchCore]. 0 does without.",
    )
    coreset_channels: int = Field(
        default=128,
        ge=1,
        le=4096,
        description="Channels of layers 2 and 3 that the coreset compares, at most: a random projection.",
    )
    gaussian_share: float = Field(
        default=0.9,
        ge=0.0,
        le=1.0,
        description="nearest, with a coreset: the distance of a patch is at most this share of its distance to a Gaussian of "
        "its place, both as multiples of what good images show. Places where good parts change, as a printed number "
        "does, then count less [ours]. 0 does without; so do fewer than 16 images, tiles that share places, and maps of "
        "more than about 3300 places.",
    )
    keep_moments: bool = Field(
        default=True,
        description="Whether the bundle keeps what `focus-ray update` needs to add images or take them out later; it is the "
        "largest of its files.",
    )

    @property
    def map_layer(self) -> int:
        """Index of the layer at whose places the map is."""
        return 0 if self.map_stride_px == 4 else 1

    @property
    def keeps_coreset(self) -> bool:
        return self.kind == "nearest" and self.coreset > 0

    @field_validator("layers")
    @classmethod
    def _ordered(cls, value: tuple[Layer, ...]) -> tuple[Layer, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError(
                f"layers must be in order and named once, for instance [layer1, layer2]: got {list(value)}"
            )
        return value


class ScoringConfig(Section):
    """From distances to a map and a score."""

    smoothing_sigma_px: float = Field(
        default=4.0,
        ge=0.0,
        le=64.0,
        description="How much the map is smoothed: the Gaussian's standard deviation, at the network's input size [kin: 4].",
    )
    image_score: Literal["maximum", "profile"] = Field(
        default="profile",
        description="How an image's score is made of its map. maximum: the highest value [kin]. profile: how far the highest "
        "values lie above those of good images, each place counted by what is usual there, so that 1 is a "
        "typical good image [ours]; where a density keeps no embeddings, the maximum.",
    )


class SelectionConfig(Section):
    """Choosing by normal images alone: whether to align, and which epoch's network to keep [ours].

    Candidates are scored on normal images held out for this, against the same images with synthetic defects.
    """

    enabled: bool = Field(
        default=False,
        description="Whether alignment and epoch are chosen so. It costs a share of the training images, and a density pass "
        "for each candidate.",
    )
    fraction: float = Field(
        default=0.1,
        gt=0.0,
        lt=1.0,
        description="Share of the normal training images that candidates are judged on; they join the density when all is "
        "chosen.",
    )
    max_images: int = Field(default=64, ge=2, description="Candidates are judged on at most this many images.")
    every_epochs: int = Field(default=1, ge=1, description="Epochs between two judgements.")
    margin: float = Field(
        default=0.01,
        ge=0.0,
        le=1.0,
        description="How much a later epoch's score must gain on that of the epoch kept so far.",
    )


class CalibrationConfig(Section):
    """Thresholds and p-values from normal images that the density has not seen, or is made not to see."""

    method: Literal["auto", "split", "cross", "leave_one_out"] = Field(
        default="auto",
        description="Which good images set the thresholds. split: a held-out share (data.holdout_fraction). leave_one_out: "
        "every training image, scored with its own embedding left out of the density. cross: every training "
        "image, scored without its fold. auto: split where it holds out enough images for a steady threshold, 5 "
        "/ target_fpr, or where train.epochs is above 0; else leave_one_out.",
    )
    num_folds: int = Field(default=5, ge=2, le=100, description="cross: into how many folds the images are divided.")
    max_images: int = Field(
        default=4096,
        ge=1,
        description="At most this many images calibrate: split holds no more out, cross scores no more, evenly chosen. 4096 "
        "bring the rate of a threshold for 0.05 between 0.044 and 0.056 in 9 of 10 cases; a worker keeps up to "
        "10 % of each one's map.",
    )
    target_fpr: float = Field(
        default=0.05,
        gt=0.0,
        lt=1.0,
        description="Share of good images that may be called bad. Lower lets more defects through.",
    )
    target_pixel_fpr: float = Field(
        default=0.001, gt=0.0, lt=1.0, description="Share of the pixels of good images that may be marked."
    )


class ClusterConfig(Section):
    """What a run asks of Ray, and for whom."""

    team: str | None = Field(
        default=None,
        pattern=NAME_PATTERN,
        description="Whose run it is; it becomes part of the run's namespace and of a name that is made up for it.",
    )
    priority: str | None = Field(
        default=None,
        pattern=NAME_PATTERN,
        description="Kueue's priority class of the job, noted with it (configs/cluster); Ray itself has no priorities.",
    )
    namespace: str | None = Field(
        default=None,
        pattern=NAME_PATTERN,
        description="Ray namespace of the run's actors; null takes the team's, or one of the run's own.",
    )
    labels: dict[str, str] = Field(
        default={},
        description="Labels of the nodes that workers may run on, each a value, !value, in(a,b) or !in(a,b).",
    )
    local: bool | Literal["auto"] = Field(
        default="auto",
        description="Whether categories are trained in the command's own process, one after the other, without Ray. auto: "
        "yes with one worker, and no RAY_ADDRESS, labels or max_concurrent_categories.",
    )
    num_workers: int = Field(
        default=1,
        ge=1,
        le=4096,
        description="Workers that train one category together. With several, gradients are averaged over them (DDP).",
    )
    min_workers: int | None = Field(
        default=None,
        ge=1,
        description="Lets a training begin or go on with as few workers as this where machines are short, and take more when "
        "they come, from its last checkpoint on. Results then depend on when machines came and went. null waits "
        "for all num_workers.",
    )
    use_gpu: bool | Literal["auto"] = Field(
        default="auto",
        description="Whether workers use GPUs. auto: yes where the cluster has any, one for each worker.",
    )
    cpus_per_worker: float = Field(
        default=1.0, gt=0.0, description="CPUs that Ray keeps for a worker; as many threads decode images."
    )
    gpus_per_worker: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="GPUs that Ray keeps for a worker that uses them. Below 1, workers of several categories share a GPU.",
    )
    memory_gib_per_worker: float | None = Field(
        default=None, gt=0.0, description="Memory that Ray keeps for a worker, in GiB; null keeps none."
    )
    max_cpus: float | None = Field(
        default=None,
        ge=0.0,
        description="CPUs that the cluster can grow to. null: what its autoscaler tells, or what is there.",
    )
    max_gpus: float | None = Field(
        default=None, ge=0.0, description="GPUs that the cluster can grow to; null as in max_cpus."
    )
    max_failures: int = Field(
        default=3,
        ge=0,
        description="How often a category is tried again after a worker was lost, from its last checkpoint where it has one.",
    )
    max_concurrent_categories: int | None = Field(
        default=None,
        ge=1,
        description="Categories that are trained side by side; null takes as many as the cluster has room for.",
    )

    @property
    def fewest_workers(self) -> int:
        return self.num_workers if self.min_workers is None else self.min_workers

    @model_validator(mode="after")
    def _consistent(self) -> ClusterConfig:
        if self.fewest_workers > self.num_workers:
            raise ValueError(f"min_workers={self.min_workers} is more than num_workers={self.num_workers}")
        if self.gpus_per_worker < 1 and self.num_workers > 1:
            raise ValueError(
                f"gpus_per_worker={self.gpus_per_worker:g} with num_workers={self.num_workers}: workers of one category "
                "cannot share a GPU; set one of the two to 1"
            )
        return self


class TrackerConfig(Section):
    """An experiment tracker that is told settings, figures and heat maps (docs/use/trackers.md)."""

    uri: str | None = Field(
        default=None,
        min_length=1,
        description="A local folder, or for mlflow a tracking server, as http://host:5000, or a database's URI. null: what "
        "MLFLOW_TRACKING_URI says, for mlflow; else trackers/KEY below storage. Never with a password: trackers take theirs from "
        "environment variables of their own.",
    )
    project: str = Field(
        default="focus-ray", min_length=1, max_length=128, description="MLflow's experiment, W&B's project."
    )
    mode: Literal["auto", "online", "offline"] = Field(
        default="auto",
        description="wandb: offline writes files, which `wandb sync` uploads. auto: what WANDB_MODE says; else online where "
        "WANDB_API_KEY is set, and offline where it is not.",
    )
    num_images: int = Field(
        default=6, ge=0, le=12, description="Heat maps of test images that an evaluation hands over, a category."
    )

    @field_validator("uri")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        if value is not None and "@" in value.partition("://")[2].partition("/")[0]:
            shown = f"{value.partition('://')[0]}://...@{value.rpartition('@')[2]}"
            raise ValueError(
                f"{shown} holds a user or password, which would be written into every bundle: leave it out, and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI in uri's place"
            )
        return value


class Config(Section):
    """Everything that decides what a run makes."""

    name: str = Field(
        default="focus-ray",
        pattern=NAME_PATTERN,
        description="Name of the run's folder; 'auto' makes one up that no other run has, from team, date and a random part.",
    )
    storage: str = Field(
        default="runs",
        min_length=1,
        description="Folder in which runs are made, each below its name: a local path or an s3:// URI.",
    )
    data: DataConfig
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    density: DensityConfig = DensityConfig()
    scoring: ScoringConfig = ScoringConfig()
    selection: SelectionConfig = SelectionConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    cluster: ClusterConfig = ClusterConfig()
    trackers: dict[TrackerName, TrackerConfig] = Field(
        default={},
        description="Experiment trackers, each with its settings: trackers.mlflow={} takes its defaults, trackers={} is none.",
    )

    @field_validator("trackers", mode="before")
    @classmethod
    def _by_defaults(cls, value: Any) -> Any:
        """A name with nothing after it takes the defaults."""
        if not isinstance(value, dict):
            return value
        return {name: {} if settings is None else settings for name, settings in value.items()}

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.calibration.method == "split" and self.data.holdout_fraction == 0.0:
            raise ValueError(
                "calibration.method=split needs held-out images: set data.holdout_fraction above 0, "
                "or calibration.method=leave_one_out"
            )
        return self


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a YAML file and applies ``key.sub=value`` overrides, whose values are YAML.

    Raises: ConfigError: the file or an override cannot be read, or a value does not fit its field.
    """
    return parse_config(read_tree(path, overrides), source=str(path))


def read_tree(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """What `load_config` validates: the file's mapping with the overrides applied. Raises: ConfigError: as there."""
    return override_tree(read_mapping(path), overrides)


def override_tree(tree: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Applies ``key.sub=value`` overrides, in place. Raises: ConfigError: one is not of that form."""
    for override in overrides:
        apply_override(tree, override)
    return tree


def read_mapping(path: str | Path) -> dict[str, Any]:
    """A YAML file's top mapping. Raises: ConfigError: it cannot be read, or is no mapping."""
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error}") from error
    return mapping_of(text, str(path))


def mapping_of(text: str, source: str) -> dict[str, Any]:
    """YAML's top mapping. Raises: ConfigError: it is none, or no YAML."""
    try:
        tree = load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected a mapping of sections at the top, got {type(tree).__name__}")
    return tree


def parse_config(tree: dict[str, Any], source: str = "configuration") -> Config:
    """Validates a plain mapping. Raises: ConfigError: naming each key, its value and what was expected."""
    return parse_model(Config, tree, source)


def parse_model(model: type[M], tree: Any, source: str) -> M:
    """`parse_config` for any model."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(item, model) for item in error.errors())) from None


def config_to_yaml(config: BaseModel) -> str:
    """The resolved configuration, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one ``key.sub=value`` in a plain mapping. Raises: ConfigError: it is not of that shape."""
    key, separator, raw = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"override {override!r}: expected key=value, for instance train.epochs=10")
    try:
        value = load_yaml(raw) if raw else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    for part in parts[:-1]:
        if tree.get(part) is None:
            tree[part] = {}  # a section that is empty in the file
        child = tree[part]
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {part!r} holds a value, not a section")
        tree = child
    tree[parts[-1]] = value


def _explain(item: Any, model: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "configuration"
    if item["type"] == "extra_forbidden":
        known = _fields_beside(item["loc"], model)
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{where}: missing; set it"
    if item["type"] == "string_type" and not isinstance(item["input"], (dict, list)):
        return f"{where}: {_quoting_hint(item['loc'], item['input'])}"
    message = item["msg"].removeprefix("Value error, ")
    shown = "" if item["type"] == "value_error" else f" (got {item['input']!r})"
    return f"{where}: {message}{shown}"


def _quoting_hint(loc: tuple[Any, ...], value: Any) -> str:
    """How to write text that YAML reads as another type. value: what YAML reads."""
    kinds = {type(None): "an empty value", bool: "true or false", int: "a number", float: "a number"}
    kind = kinds.get(type(value), f"a {type(value).__name__}")
    text = '"TEXT"' if value is None or isinstance(value, bool) else f'"{value}"'
    key, entry = ".".join(str(part) for part in loc if isinstance(part, str)), text
    if isinstance(loc[-1], int):
        entry = f"[{text}]"
    return (
        f"expected text, and YAML reads {kind} (got {value!r}): put quotes around the text, as in {entry}; in a shell "
        f"'{key}={entry}'"
    )


def _fields_beside(loc: tuple[Any, ...], model: Any) -> list[str]:
    for part in loc[:-1]:
        if isinstance(model, type) and issubclass(model, BaseModel):
            annotation: Any = model.model_fields[part].annotation if part in model.model_fields else None
        else:  # a mapping of names to models
            annotation = get_args(model)[1]
        is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        if not is_model and get_origin(annotation) is not dict:
            return []
        model = annotation
    return sorted(model.model_fields)
