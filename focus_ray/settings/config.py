"""The configuration of a run: frozen models that refuse unknown keys. Reads YAML, writes resolved YAML or JSON.

The file is long because it has every setting of a run in one place.

Each default names its source: [paper] arXiv 2110.04538, [kin] the paper's published relatives (RegAD, SimSiam, PaDiM), [ours] a
choice of this project.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from focus_ray.errors import ConfigError
from focus_ray.names import NAME_PATTERN, suggest_name
from focus_ray.settings.kinds import BACKBONES, TRACKERS
from focus_ray.settings.section import Layer, Precision, Section
from focus_ray.settings.yaml_text import load_yaml

if TYPE_CHECKING:
    from focus_ray.features.backbones.spec import BackboneSpec
    from focus_ray.settings.density import DensityConfig
else:
    from focus_ray.settings.density import combine_settings

    DensityConfig = combine_settings()

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
BackboneName = Annotated[str, AfterValidator(BACKBONES.check)]
TrackerName = Annotated[str, AfterValidator(TRACKERS.check)]
Polygon = tuple[tuple[float, float], ...]


def _is_polygon(region: Any) -> bool:
    """Whether a region is one polygon (a list of points), and not a list of polygons."""
    try:
        numbers = [number for point in region for number in point]
        return bool(numbers) and all(isinstance(number, (int, float)) for number in numbers)
    except TypeError:
        return False


M = TypeVar("M", bound=BaseModel)


class DataConfig(Section):
    """Path of the images, categories, held-out share, and regions of interest."""

    uri: str = Field(description="Root of a data set that `focus-ray ingest` made: a local path or an s3:// URI.")
    categories: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="The categories to train; each gets its own model. null trains all categories of the data set.",
    )
    holdout_fraction: float = Field(
        default=0.2,
        ge=0.0,
        lt=1.0,
        description="Share of the normal training images that is held out for calibration. These images neither train "
        "nor enter the density [ours]. Only calibration.method=split uses it.",
    )
    memory_budget_mb: float = Field(
        default=4096.0,
        ge=0.0,
        description="MiB of decoded images that a worker keeps in memory. If its images need more, it streams them "
        "again in each pass.",
    )
    regions: dict[str, str | tuple[Polygon, ...]] = Field(
        default={},
        description="Region of interest of each category; nothing is scored outside. A region is a polygon, a list of "
        "polygons, or the path or URI of a mask image that is white in the inspected area. A polygon is a "
        "list of points [x, y], given as shares of the image's width and height.",
    )

    @field_validator("regions", mode="before")
    @classmethod
    def _polygons(cls, value: Any) -> Any:
        """Puts a single polygon into a list."""
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
        description="Movements that the aligner may undo, for instance rotation and translation; none switches "
        "alignment off.",
    )
    method: Literal["congealing", "localisation"] = Field(
        default="congealing",
        description="How the movement of an image is found. congealing: by a search against a mean image, which is "
        "learnt from the training images [ours]. localisation: by a network that is trained with the "
        "pairwise loss [paper]; it does not find large rotations.",
    )
    min_drop: float = Field(
        default=0.25,
        ge=0.0,
        le=1.0,
        description="congealing: alignment is used only if it lowers the pairwise L2 distance of held-out normal "
        "images by at least this share.",
    )
    max_images: int = Field(default=512, ge=4, description="congealing: largest number of images for the mean image.")
    max_translation: float = Field(
        default=0.4,
        gt=0.0,
        le=1.0,
        description="Largest shift that alignment undoes, in half image widths (bounded group [ours]).",
    )
    max_scale: float = Field(
        default=1.15,
        gt=1.0,
        le=2.0,
        description="Largest zoom, in or out, that alignment undoes. Without a bound, zooming in lowers the loss "
        "[ours].",
    )
    padding: Literal["border", "reflection"] = Field(
        default="reflection",
        description="Content of the area that an aligned image leaves empty; this area is never scored [ours].",
    )


class FeatureAlignmentConfig(Section):
    """FCA: a spatial transformer after each of layers 1 to 3, trained by the fine loss alone [paper]."""

    layer1: Group = Field(default="none", description="Movements that the aligner after layer 1 may undo.")
    layer2: Group = Field(default="none", description="Movements that the aligner after layer 2 may undo.")
    layer3: Group = Field(default="none", description="Movements that the aligner after layer 3 may undo.")
    max_translation: float = Field(
        default=0.15, gt=0.0, le=1.0, description="Largest shift that alignment undoes, in half map widths [ours]."
    )
    max_scale: float = Field(
        default=1.15, gt=1.0, le=2.0, description="Largest zoom, in or out, that alignment undoes [ours]."
    )
    max_rotation_deg: float = Field(
        default=15.0, gt=0.0, le=180.0, description="Largest rotation that alignment undoes, in degrees [ours]."
    )


class TilingConfig(Section):
    """Tiles of the size of the network's input, in which a large photograph is scored [ours]."""

    grid: tuple[Annotated[int, Field(ge=1, le=32)], Annotated[int, Field(ge=1, le=32)]] = Field(
        description="[rows, columns] of tiles. Every photograph is resized to the area of the tiles, so that a tile "
        "shows the same feature of every part."
    )
    overlap: float = Field(
        default=0.125,
        ge=0.0,
        le=0.5,
        description="Share of a tile's side that overlaps with the neighbouring tile. The maps of both tiles are "
        "blended there.",
    )
    density: Literal["per_tile", "shared"] = Field(
        default="per_tile",
        description="per_tile: each tile has its own places, for parts in the same position in all images. shared: "
        "every tile is compared with the places of all tiles, for textures; this takes less memory.",
    )


class ModelConfig(Section):
    """The network: alignment, backbone, projector (the paper's encoder f) and predictor (g)."""

    backbone: BackboneName = Field(
        default="resnet18",
        description="The pretrained network that turns images into features (ImageNet or DINOv2). Its layers 1 to 3 "
        "are used [paper].",
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
    projector_width: int = Field(
        default=256,
        ge=8,
        le=4096,
        description="Channels of the projector f: three 1x1 convolutions that only training uses [kin: 256].",
    )
    predictor: bool = Field(
        default=True,
        description="Whether the predictor g follows the projector f [paper]. false is an ablation.",
    )
    predictor_width: int = Field(
        default=256,
        ge=4,
        le=4096,
        description="Hidden channels of the predictor g [kin: 256 in RegAD, a quarter in SimSiam].",
    )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles; (1, 1) without tiling."""
        return self.tiling.grid if self.tiling is not None else (1, 1)

    def place_px(self, density: DensityConfig) -> int:
        """Side of a place of the density's map, in pixels of the network's input."""
        return self.backbone_spec.strides[density.map_layer]

    @property
    def shared_grid(self) -> tuple[int, int]:
        """Rows and columns of the tiles that share one density's places."""
        return self.grid if self.tiling is not None and self.tiling.density == "shared" else (1, 1)

    @property
    def overlap_px(self) -> int:
        """Overlap of neighbouring tiles, in pixels."""
        return round(self.tiling.overlap * self.image_size_px) if self.tiling is not None else 0

    @property
    def tiles(self) -> tuple[int, int, int, int]:
        """Rows and columns of tiles, their side and their overlap in pixels: the arguments of `density.tiles.Tiles`."""
        return *self.grid, self.image_size_px, self.overlap_px

    @property
    def frame_px(self) -> tuple[int, int]:
        """Height and width to which images are resized: the area of all tiles."""
        step = self.image_size_px - self.overlap_px
        return self.grid[0] * step + self.overlap_px, self.grid[1] * step + self.overlap_px

    @property
    def backbone_spec(self) -> BackboneSpec:
        """Channels, strides and limits of the backbone."""
        return BACKBONES[self.backbone]

    @field_validator("image_size_px")
    @classmethod
    def _divisible(cls, value: int, info: ValidationInfo) -> int:
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
        smallest = self.backbone_spec.min_reflected_px
        if self.padding == "reflect" and self.image_size_px < smallest:
            raise ValueError(
                f"padding=reflect with {self.backbone} needs an image_size_px of at least {smallest}, got {self.image_size_px}: "
                "raise it, or set padding=zeros"
            )
        return self

    @model_validator(mode="after")
    def _aligns_maps(self) -> ModelConfig:
        moving = [key for key in get_args(Layer) if getattr(self.feature_alignment, key) != "none"]
        if moving and not self.backbone_spec.passes_feature_maps:
            raise ValueError(
                f"{self.backbone} hands tokens from layer to layer, which cannot be aligned as maps: set "
                f"{', '.join(f'model.feature_alignment.{key}=none' for key in moving)}, or take another backbone"
            )
        return self


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


class SelectionConfig(Section):
    """Choice of alignment and epoch from normal images alone [ours].

    Held-out normal images and copies with synthetic defects judge the candidates.
    """

    enabled: bool = Field(
        default=False,
        description="Whether synthetic defects choose alignment and epoch. This costs a share of the training images, "
        "and a density pass for each candidate.",
    )
    fraction: float = Field(
        default=0.1,
        gt=0.0,
        lt=1.0,
        description="Share of the normal training images that judge the candidates. They join the density after the "
        "choice.",
    )
    max_images: int = Field(default=64, ge=2, description="Largest number of images that judge the candidates.")
    every_epochs: int = Field(default=1, ge=1, description="Epochs between two judgements.")
    margin: float = Field(
        default=0.01,
        ge=0.0,
        le=1.0,
        description="Smallest gain in score for which a later epoch replaces the best epoch so far.",
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


class ClusterConfig(Section):
    """Workers and resources that a run requests from Ray, and the owner of the run."""

    team: str | None = Field(
        default=None,
        pattern=NAME_PATTERN,
        description="Owner of the run. It becomes part of the run's namespace, and of the name with name=auto.",
    )
    priority: str | None = Field(
        default=None,
        pattern=NAME_PATTERN,
        description="Kueue's priority class of the job, recorded with the job (configs/cluster). Ray itself has no "
        "priorities.",
    )
    namespace: str | None = Field(
        default=None,
        pattern=NAME_PATTERN,
        description="Ray namespace of the run's actors. null uses the team's namespace, or one for this run.",
    )
    labels: dict[str, str] = Field(
        default={},
        description="Labels of the nodes on which workers may run, each a value, !value, in(a,b) or !in(a,b).",
    )
    local: bool | Literal["auto"] = Field(
        default="auto",
        description="Whether categories are trained in the command's own process, one after the other, without Ray. "
        "auto: true with one worker and without RAY_ADDRESS, labels and max_concurrent_categories.",
    )
    num_workers: int = Field(
        default=1,
        ge=1,
        le=4096,
        description="Workers that train one category together. With several workers, gradients are averaged (DDP).",
    )
    min_workers: int | None = Field(
        default=None,
        ge=1,
        description="Smallest number of workers with which a training starts or continues if machines are missing. It "
        "adds workers when machines return, from its last checkpoint. Results then depend on the times at "
        "which machines come and go. null waits for all num_workers.",
    )
    use_gpu: bool | Literal["auto"] = Field(
        default="auto",
        description="Whether workers use GPUs. auto: true if the cluster has a GPU, one for each worker.",
    )
    cpus_per_worker: float = Field(
        default=1.0,
        gt=0.0,
        description="CPUs that Ray reserves for a worker. The same number of threads decodes images.",
    )
    gpus_per_worker: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="GPUs that Ray reserves for a worker that uses GPUs. Below 1, workers of several categories share "
        "a GPU.",
    )
    memory_gib_per_worker: float | None = Field(
        default=None, gt=0.0, description="Memory that Ray reserves for a worker, in GiB. null reserves none."
    )
    max_cpus: float | None = Field(
        default=None,
        ge=0.0,
        description="CPUs to which the cluster can grow. null: the limit of its autoscaler, or its present CPUs.",
    )
    max_gpus: float | None = Field(
        default=None, ge=0.0, description="GPUs to which the cluster can grow. null as in max_cpus."
    )
    max_failures: int = Field(
        default=3,
        ge=0,
        description="Number of retries of a category after a lost worker, from its last checkpoint if it has one.",
    )
    max_concurrent_categories: int | None = Field(
        default=None,
        ge=1,
        description="Categories that are trained side by side. null trains as many as the cluster has room for.",
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
    """An experiment tracker, which records settings, metrics and heat maps (docs/use/trackers.md)."""

    uri: str | None = Field(
        default=None,
        min_length=1,
        description="A local folder, or for mlflow a tracking server, as http://host:5000, or the URI of a database. "
        "null: for mlflow the value of MLFLOW_TRACKING_URI, otherwise trackers/KEY below storage. A "
        "password is refused: trackers read it from their own environment variables.",
    )
    project: str = Field(
        default="focus-ray", min_length=1, max_length=128, description="MLflow's experiment, W&B's project."
    )
    mode: Literal["auto", "online", "offline"] = Field(
        default="auto",
        description="wandb: offline writes files, which `wandb sync` uploads. auto: the value of WANDB_MODE; without "
        "it, online if WANDB_API_KEY is set, otherwise offline.",
    )
    num_images: int = Field(
        default=6, ge=0, le=12, description="Heat maps of test images that an evaluation records for each category."
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
    """All settings of a run."""

    name: str = Field(
        default="focus-ray",
        pattern=NAME_PATTERN,
        description="Name of the run's folder. 'auto' makes a unique name from team, date and a random part.",
    )
    storage: str = Field(
        default="runs",
        min_length=1,
        description="Folder of the runs, each in a folder of its name: a local path or an s3:// URI.",
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
        description="Experiment trackers, each with its settings: trackers.mlflow={} uses the defaults, trackers={} "
        "switches all off.",
    )

    @field_validator("trackers", mode="before")
    @classmethod
    def _by_defaults(cls, value: Any) -> Any:
        """Gives a tracker without settings the defaults."""
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
    """Returns the mapping that `load_config` validates: the file with the overrides applied. Raises: ConfigError: see there."""
    return override_tree(read_mapping(path), overrides)


def override_tree(tree: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Applies ``key.sub=value`` overrides in place and returns the tree. Raises: ConfigError: an override has another form."""
    for override in overrides:
        apply_override(tree, override)
    return tree


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Reads the top mapping of a YAML file. Raises: ConfigError: the file cannot be read, or has no mapping at the top."""
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error}") from error
    return mapping_of(text, str(path))


def mapping_of(text: str, source: str) -> dict[str, Any]:
    """Parses the top mapping of a YAML text. Raises: ConfigError: the text is not YAML, or has no mapping at the top."""
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
    """Validates a plain mapping. Raises: ConfigError: a value is wrong; the error names key, value and expected values."""
    return parse_model(Config, tree, source)


def parse_model(model: type[M], tree: Any, source: str) -> M:
    """Validates a plain mapping against any model, as `parse_config` does for a run."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(item, model) for item in error.errors())) from None


def config_to_yaml(config: BaseModel) -> str:
    """Returns the resolved configuration as YAML, with every default."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Applies one ``key.sub=value`` to a plain mapping, in place. Raises: ConfigError: the override has another form."""
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
            tree[part] = {}  # an empty section of the file is null
        child = tree[part]
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {part!r} holds a value, not a section")
        tree = child
    tree[parts[-1]] = value


def _explain(item: Any, model: type[BaseModel]) -> str:
    """Returns an error of pydantic as one sentence with key, problem and remedy."""
    where = ".".join(str(part) for part in item["loc"]) or "configuration"
    if item["type"] == "extra_forbidden":
        field_names = _fields_beside(item["loc"], model)
        hint = suggest_name(str(item["loc"][-1]), field_names) or f"known keys: {', '.join(field_names)}"
        return f"{where}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{where}: missing; set it"
    if item["type"] == "string_type" and not isinstance(item["input"], (dict, list)):
        return f"{where}: {_quoting_hint(item['loc'], item['input'])}"
    message = item["msg"].removeprefix("Value error, ")
    shown = "" if item["type"] == "value_error" else f" (got {item['input']!r})"
    return f"{where}: {message}{shown}"


def _quoting_hint(loc: tuple[Any, ...], value: Any) -> str:
    """Says how to quote text that YAML reads as another type. value: the value that YAML read."""
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
    """Returns the valid keys of the section in which an unknown key was found."""
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
