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
from focus_ray.kinds import BACKBONES, DENSITIES, GEOMETRIES, TRACKERS, Geometry
from focus_ray.names import NAME

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

    uri: str = Field(description="Root of an ingested Parquet data set: a local path or an s3:// URI.")
    categories: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="Categories to train, one model each; null takes all."
    )
    holdout_fraction: float = Field(
        default=0.2,
        ge=0.0,
        lt=1.0,
        description="Share of the normal training images kept out of training and density, for calibration [ours].",
    )
    memory_budget_mb: float = Field(
        default=4096.0,
        ge=0.0,
        description="Decoded images are kept in a worker's memory up to this many MiB and streamed beyond it.",
    )
    regions: dict[str, str | tuple[Polygon, ...]] = Field(
        default={},
        description="Category -> what of its images is inspected; nothing is scored elsewhere. Polygons, each a list of [x, y] "
        "as shares of the image's width and height, or a mask image, white where inspected: a path or URI.",
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

    group: Group = Field(default="rotation_translation", description="Transforms that the aligner may use.")
    method: Literal["congealing", "localisation"] = Field(
        default="congealing",
        description="congealing: theta is searched against a learnt mean image [ours]. localisation: a net reads theta "
        "off the image and is trained by the pairwise loss [paper]; it does not find large rotations.",
    )
    min_drop: float = Field(
        default=0.25,
        ge=0.0,
        le=1.0,
        description="congealing: align only if that lowers the pairwise L2 of held-out normal images by this share.",
    )
    max_images: int = Field(default=512, ge=4, description="congealing: learns its mean image from so many at most.")
    max_translation: float = Field(
        default=0.4, gt=0.0, le=1.0, description="Largest shift, in half image widths (bounded group [ours])."
    )
    max_scale: float = Field(
        default=1.15, gt=1.0, le=2.0, description="Largest zoom in or out; bounds the known zoom-in optimum [ours]."
    )
    padding: Literal["border", "reflection"] = Field(
        default="reflection", description="What an aligned image shows outside its frame; never scored [ours]."
    )


class FeatureAlignmentConfig(Section):
    """FCA: a spatial transformer after each of layers 1 to 3, trained by the fine loss alone [paper]."""

    layer1: Group = Field(default="none", description="Transforms after layer 1.")
    layer2: Group = Field(default="none", description="Transforms after layer 2.")
    layer3: Group = Field(default="none", description="Transforms after layer 3.")
    max_translation: float = Field(
        default=0.15, gt=0.0, le=1.0, description="Largest shift, in half map widths [ours]."
    )
    max_scale: float = Field(default=1.15, gt=1.0, le=2.0, description="Largest zoom in or out [ours].")
    max_rotation_deg: float = Field(default=15.0, gt=0.0, le=180.0, description="Largest turn, degrees [ours].")


class TilingConfig(Section):
    """Tiles, each as large as the network's input, in which a large photograph is scored [ours]."""

    grid: tuple[Annotated[int, Field(ge=1, le=32)], Annotated[int, Field(ge=1, le=32)]] = Field(
        description="[rows, columns] of tiles. The photograph is brought to the size that they cover, whatever its own: so a "
        "tile shows the same part of every image."
    )
    overlap: float = Field(
        default=0.125,
        ge=0.0,
        le=0.5,
        description="Share of a tile's side that it has in common with the next: there the maps of both are blended.",
    )
    density: Literal["per_tile", "shared"] = Field(
        default="per_tile",
        description="per_tile: each tile has places of its own, for parts that lie alike in all images. shared: all tiles are "
        "compared with the places of any, for textures; takes less memory.",
    )


class ModelConfig(Section):
    """The network: alignment, backbone, projector (the paper's encoder f) and predictor (g)."""

    backbone: BackboneName = Field(
        default="resnet18",
        description="What computes features: an ImageNet CNN [paper] or a vision transformer, of which three layers are used.",
    )
    weights: str = Field(
        default="default",
        min_length=1,
        description="'default' (the backbone's ImageNet weights by name), 'random', a file path or a URI "
        "(file://, s3://, https://).",
    )
    weights_sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{8,64}$", description="Refuse a weights file whose SHA-256 starts otherwise."
    )
    image_size_px: int = Field(
        default=224,
        ge=32,
        le=2048,
        description="Side of the network's input, a square [kin: 224]: a multiple of 16, of 14 for DINOv2.",
    )
    resize: Literal["stretch", "pad"] = Field(
        default="stretch",
        description="stretch: images are stretched to the network's input. pad: they keep their shape, and mirrored filler, "
        "which is not scored, takes the rest [ours].",
    )
    tiling: TilingConfig | None = Field(
        default=None, description="Scores large photographs in tiles of image_size_px each; null: as one."
    )
    batch_norm: Literal["frozen", "train"] = Field(
        default="frozen", description="Whether the backbone's batch norms keep their ImageNet statistics [ours]."
    )
    padding: Literal["zeros", "reflect"] = Field(
        default="reflect",
        description="What the backbone's convolutions see beyond the border. zeros: as it was trained; the places at the border "
        "then vary most among good images. reflect: the image itself [ours].",
    )
    precision: Precision = Field(
        default="auto",
        description="What the backbone computes in once it is trained. auto: bf16 on a GPU or CPU that multiplies it at once "
        "(AVX512-BF16, AMX), fp32 elsewhere. fp32: the same on every machine, to the last digits.",
    )
    image_alignment: ImageAlignmentConfig = ImageAlignmentConfig()
    feature_alignment: FeatureAlignmentConfig = FeatureAlignmentConfig()
    projector_width: int = Field(default=256, ge=8, le=4096, description="Channels of f's 1x1 convolutions [kin: 256].")
    predictor: bool = Field(default=True, description="Whether g stands after f [paper]; off is an ablation.")
    predictor_width: int = Field(
        default=256, ge=4, le=4096, description="Hidden channels of g [kin: 256 in RegAD, a quarter in SimSiam]."
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
    def geometry(self) -> Geometry:
        """Of the backbone."""
        return GEOMETRIES.get(self.backbone, Geometry())

    @field_validator("image_size_px")
    @classmethod
    def _divisible(cls, value: int, known: ValidationInfo) -> int:
        backbone = known.data.get("backbone", "")  # not there where it was refused
        step = GEOMETRIES.get(backbone, Geometry()).strides[2]
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
        smallest = self.geometry.smallest_reflected_px
        if self.padding == "reflect" and self.image_size_px < smallest:
            raise ValueError(
                f"padding=reflect with {self.backbone} needs an image_size_px of at least {smallest}, got {self.image_size_px}: "
                "raise it, or set padding=zeros"
            )
        return self

    @model_validator(mode="after")
    def _aligns_maps(self) -> ModelConfig:
        moving = [key for key in get_args(Layer) if getattr(self.feature_alignment, key) != "none"]
        if moving and not self.geometry.hands_on_maps:
            raise ValueError(
                f"{self.backbone} hands tokens from layer to layer, which cannot be aligned as maps: set "
                f"{', '.join(f'model.feature_alignment.{key}=none' for key in moving)}, or take another backbone"
            )
        return self


class TrainConfig(Section):
    """Optimisation. SGD with momentum and a cosine schedule [kin]; the paper's values are not known."""

    epochs: int = Field(default=0, ge=0, le=10_000, description="Passes over the training images; 0 trains nothing.")
    batch_size_per_worker: int = Field(default=32, ge=2, le=4096, description="Images a worker takes a step [kin: 32].")
    learning_rate: float = Field(default=1e-4, gt=0.0, le=10.0, description="Backbone [kin: 1e-4].")
    learning_rate_head: float = Field(
        default=0.05,
        gt=0.0,
        le=10.0,
        description="Projector and predictor: they start at random and are dropped after training, so they learn at "
        "SimSiam's rate [kin: 0.05] while the backbone is only tuned [ours].",
    )
    learning_rate_image_alignment: float = Field(default=1e-2, gt=0.0, le=10.0, description="ICA [kin: 0.01].")
    learning_rate_feature_alignment: float = Field(
        default=0.05,
        gt=0.0,
        le=10.0,
        description="FCA: its aligners start at zero and do not move at the backbone's rate [ours].",
    )
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0, description="Of SGD [kin: 0.9].")
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0, description="Of SGD, on every parameter.")
    warmup_epochs: float = Field(default=0.0, ge=0.0, description="Linear warm-up before the cosine schedule [ours].")
    lambda_ica: float = Field(default=1.0, ge=0.0, description="Weight of the image alignment loss.")
    lambda_fine: float = Field(default=1.0, ge=0.0, description="Weight of the fine loss.")
    stop_gradient: bool = Field(default=True, description="Stop-gradient on the shuffled branch [paper].")
    symmetric: bool = Field(default=False, description="Average the fine loss over both directions of a pair.")
    precision: Precision = Field(
        default="auto", description="auto: bf16 autocast on a GPU that has it, fp32 elsewhere."
    )
    gradient_clip_norm: float | None = Field(
        default=None, gt=0.0, description="Gradients of a larger norm are scaled down to it; null leaves them."
    )
    checkpoint_every_epochs: int = Field(
        default=1, ge=1, description="Epochs between two checkpoints, from which a lost run goes on."
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**31,
        description="Of whatever is drawn: held-out images, weights, order, channels, defects.",
    )


class DensityConfig(Section):
    """One density per location over the embeddings of normal images."""

    kind: DensityName = Field(
        default="nearest",
        description="gaussian: one a location [kin, PaDiM]. nearest: distance to the nearest normal embedding of the "
        "location, whitened by the pooled covariance [ours].",
    )
    layers: tuple[Layer, ...] = Field(
        default=("layer1", "layer2", "layer3"),
        min_length=1,
        description="Layers whose embeddings are joined, in order [paper].",
    )
    map_stride_px: Literal[4, 8] = Field(
        default=8,
        description="Input pixels a location stands for. 4: layers are brought to layer 1's places by nearest neighbour "
        "[kin, PaDiM]. 8: to layer 2's, layer 1 by averaging, layer 3 bilinearly [ours]. DINOv2: its patches of 14 pixels either way.",
    )
    smooth_layers: tuple[Layer, ...] = Field(
        default=("layer2", "layer3"), description="Layers averaged over 3x3 of their own places first [kin, PatchCore]."
    )
    reduction: Literal["random", "semi_orthogonal", "none", "discriminant"] = Field(
        default="discriminant",
        description="How channels are reduced [kin: 100 random channels in PaDiM]. discriminant: to the directions in which "
        "synthetic defects differ from their nearest normal neighbours and normal images do not, learnt in closed form "
        "[ours]; nearest then compares in it as it is.",
    )
    num_channels: int = Field(default=100, ge=1, le=4096, description="Channels kept by the reduction [kin: 100].")
    metric: str | None = Field(
        default=None,
        description="discriminant: a path or URI of a metric learnt over other categories, as `focus-ray metric` writes it, "
        "in place of one of the category's own [ours].",
    )
    shrinkage: float = Field(
        default=2.0, gt=0.0, le=1000.0, description="Ridge on the covariance's diagonal, in shrinkage_unit."
    )
    shrinkage_unit: Literal["mean_variance", "absolute"] = Field(
        default="mean_variance",
        description="mean_variance: multiples of the embeddings' mean variance within locations, so that it suits any "
        "backbone [ours]. absolute: as it is [kin: 0.01].",
    )
    pooling: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="gaussian: weight of the covariance pooled over locations against a location's own [ours].",
    )
    window: Literal[1, 3, 5] = Field(
        default=3, description="nearest: compares with the normal embeddings of window x window places around [ours]."
    )
    max_images: int = Field(
        default=512, ge=2, description="nearest: keeps the embeddings of so many images at most, evenly chosen."
    )
    per_place: int | None = Field(
        default=128,
        ge=2,
        description="nearest: of those, a place keeps so many at most, chosen greedily so that every other is near one [ours]; "
        "times the tiles where they share places. null: all.",
    )
    precision: Precision = Field(
        default="auto",
        description="nearest: what the memory of places is held and searched in; as model.precision. bf16 takes half the memory.",
    )
    coreset: int = Field(
        default=1024,
        ge=0,
        le=65536,
        description="nearest: patches of a memory without places, chosen greedily from all images, whose distance is averaged "
        "with that of the places' own memory [kin, PatchCore]. 0: none.",
    )
    coreset_channels: int = Field(
        default=128,
        ge=1,
        le=4096,
        description="Channels of layers 2 and 3 for the coreset, at most: a random projection.",
    )
    keep_moments: bool = Field(
        default=True, description="Keep the moments in the bundle, so that images can be added or taken out later."
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
        default=4.0, ge=0.0, le=64.0, description="Gaussian smoothing of the map, at the network's input size [kin: 4]."
    )
    image_score: Literal["maximum", "profile"] = Field(
        default="profile",
        description="maximum: of the map [kin]. profile: how far the map's highest values lie above those of good images, "
        "each place counted by what is usual there [ours]; where a density keeps no embeddings, the maximum.",
    )


class SelectionConfig(Section):
    """Choosing by normal images alone: whether to align, and which epoch's network to keep [ours].

    Candidates are scored on normal images held out for this, against the same images with synthetic defects.
    """

    enabled: bool = Field(
        default=False, description="Costs a share of the training images and a density pass a candidate."
    )
    fraction: float = Field(
        default=0.1,
        gt=0.0,
        lt=1.0,
        description="Share of the normal training images to judge on; they join the density when all is chosen.",
    )
    max_images: int = Field(default=64, ge=2, description="Judges on so many at most.")
    every_epochs: int = Field(default=1, ge=1, description="Epochs between two validations.")
    margin: float = Field(
        default=0.01, ge=0.0, le=1.0, description="What a later epoch's score must gain on the kept one's."
    )


class CalibrationConfig(Section):
    """Thresholds and p-values from normal images that the density has not seen, or is made not to see."""

    method: Literal["auto", "split", "cross", "leave_one_out"] = Field(
        default="auto",
        description="split: a held-out share (data.holdout_fraction). leave_one_out: every training image, scored with its own "
        "embedding left out of the density. cross: every training image, scored without its fold. auto: split where it holds "
        "out enough images for a steady threshold, 5 / target_fpr, or where train.epochs is above 0; else leave_one_out.",
    )
    num_folds: int = Field(default=5, ge=2, le=100, description="Folds of the cross method.")
    max_images: int = Field(
        default=4096,
        ge=1,
        description="Calibrates with so many images at most: split holds no more out, cross scores no more, evenly chosen. 4096 "
        "bring the rate of a threshold for 0.05 between 0.044 and 0.056 in 9 of 10 cases; a worker keeps up to 10 % of each "
        "one's map.",
    )
    target_fpr: float = Field(default=0.05, gt=0.0, lt=1.0, description="Share of good images that may be called bad.")
    target_pixel_fpr: float = Field(default=0.001, gt=0.0, lt=1.0, description="Share of good pixels called bad.")


class ClusterConfig(Section):
    """What a run asks of Ray, and for whom."""

    team: str | None = Field(
        default=None, pattern=NAME, description="Whose run it is: part of its namespace and of a name made up for it."
    )
    priority: str | None = Field(
        default=None,
        pattern=NAME,
        description="Kueue's priority class of the job, noted with it (configs/cluster); Ray itself has no priorities.",
    )
    namespace: str | None = Field(
        default=None, pattern=NAME, description="Ray namespace; null: one of the team's, or one of the run's own."
    )
    labels: dict[str, str] = Field(
        default={}, description="Workers run on nodes with these labels: value, !value, in(a,b) or !in(a,b)."
    )
    local: bool | Literal["auto"] = Field(
        default="auto",
        description="Train in the command's own process, without Ray, one category after the other. auto: with one worker, and "
        "no RAY_ADDRESS, labels or max_concurrent_categories.",
    )
    num_workers: int = Field(
        default=1,
        ge=1,
        le=4096,
        description="Workers that train one category together, with DDP where there are several.",
    )
    min_workers: int | None = Field(
        default=None,
        ge=1,
        description="With fewer than num_workers, and as few as that, a training begins or goes on where machines are short, "
        "and takes more when they come, from its last checkpoint on; null: it waits for all. Results then hang on when "
        "machines came and went.",
    )
    use_gpu: bool | Literal["auto"] = Field(
        default="auto", description="auto: a GPU a worker when the cluster has any."
    )
    cpus_per_worker: float = Field(default=1.0, gt=0.0, description="CPUs that Ray keeps for a worker.")
    gpus_per_worker: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="GPUs that Ray keeps for a worker that uses them; below 1, single workers of several categories share one.",
    )
    memory_gib_per_worker: float | None = Field(
        default=None, gt=0.0, description="Memory that Ray keeps for a worker; null keeps none."
    )
    max_cpus: float | None = Field(
        default=None,
        ge=0.0,
        description="CPUs the cluster can grow to; null: what its autoscaler tells, or what is there.",
    )
    max_gpus: float | None = Field(default=None, ge=0.0, description="GPUs the cluster can grow to; null as max_cpus.")
    max_failures: int = Field(default=3, ge=0, description="Restarts from the last checkpoint after a lost worker.")
    max_concurrent_categories: int | None = Field(
        default=None, ge=1, description="Categories trained side by side; null fits them to the cluster."
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
        pattern=NAME,
        description="Names the run's folder; 'auto' makes one up that no other run has: team, date and a random part.",
    )
    storage: str = Field(default="runs", min_length=1, description="Root of run folders: a local path or s3:// URI.")
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
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error}") from error
    return mapping_of(text, str(path))


def mapping_of(text: str, source: str) -> dict[str, Any]:
    """YAML's top mapping. Raises: ConfigError: it is none, or no YAML."""
    try:
        tree = yaml.safe_load(text)
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
        value = yaml.safe_load(raw) if raw else ""
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
    message = item["msg"].removeprefix("Value error, ")
    shown = "" if item["type"] == "value_error" else f" (got {item['input']!r})"
    return f"{where}: {message}{shown}"


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
