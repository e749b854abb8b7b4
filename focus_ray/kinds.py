"""The kinds there are of densities, backbones, importers, metrics and trackers: a new one is a file and a line here."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar, cast

if TYPE_CHECKING:
    from focus_ray.data.importers.base import Importer
    from focus_ray.density.base import DensityKind
    from focus_ray.evaluation.metrics import Metric
    from focus_ray.model.backbones.base import BackboneSpec
    from focus_ray.tracking.base import TrackerKind

T = TypeVar("T")


class Kinds(Generic[T]):
    """The kinds there are of something (densities, backbones, importers), by name; each is imported when first asked for.

    A new kind is a file that defines it, and its line in the table. Knows no module itself, so that a configuration can be
    checked without torch.
    """

    def __init__(self, what: str, places: dict[str, str]) -> None:
        """
        Args:
            what: for messages, as in "density".  places: name -> "module:attribute".
        """
        self.what, self.places = what, places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def check(self, name: str) -> str:
        """Returns: the name. Raises: ValueError: there is no such kind; it names those there are."""
        if name not in self.places:
            close = difflib.get_close_matches(name, self.places, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"{self.what} {name!r} is not known: {hint}choose one of {', '.join(self.places)}")
        return name

    def __getitem__(self, name: str) -> T:
        """Raises: ValueError: as `check`."""
        module, _, attribute = self.places[self.check(name)].partition(":")
        return cast(T, getattr(importlib.import_module(module), attribute))


DENSITIES: Kinds[DensityKind] = Kinds(
    "density",
    {
        "gaussian": "focus_ray.density.gaussian:GAUSSIAN",
        "nearest": "focus_ray.density.nearest:NEAREST",
    },
)

BACKBONES: Kinds[BackboneSpec] = Kinds(
    "backbone",
    {
        "resnet18": "focus_ray.model.backbones.resnet:RESNET18",
        "resnet34": "focus_ray.model.backbones.resnet:RESNET34",
        "resnet50": "focus_ray.model.backbones.resnet:RESNET50",
        "wide_resnet50_2": "focus_ray.model.backbones.resnet:WIDE_RESNET50_2",
        "convnext_tiny": "focus_ray.model.backbones.convnext:CONVNEXT_TINY",
        "efficientnet_lite0": "focus_ray.model.backbones.efficientnet_lite:LITE0",
        "efficientnet_lite1": "focus_ray.model.backbones.efficientnet_lite:LITE1",
        "efficientnet_lite2": "focus_ray.model.backbones.efficientnet_lite:LITE2",
        "dinov2_vits14": "focus_ray.model.backbones.dinov2:VITS14",
        "dinov2_vitb14": "focus_ray.model.backbones.dinov2:VITB14",
        "dinov2_vits14_reg": "focus_ray.model.backbones.dinov2:VITS14_REG",
        "dinov2_vitb14_reg": "focus_ray.model.backbones.dinov2:VITB14_REG",
    },
)


class Geometry(NamedTuple):
    """What a configuration knows of a backbone, since it is checked without torch.

    strides: of layers 1, 2, 3: input pixels that a place of their maps stands for. The input's side is a multiple of the last.
    smallest_reflected_px: the smallest input with padding=reflect: no kernel mirrors more of its last map than that has.
    hands_on_maps: whether the layers take maps, which can be aligned between them; not tokens.
    """

    strides: tuple[int, int, int] = (4, 8, 16)
    smallest_reflected_px: int = 32
    hands_on_maps: bool = True


_PATCHES = Geometry((14, 14, 14), hands_on_maps=False)

# of backbones that do not have the usual one
GEOMETRIES = {
    "convnext_tiny": Geometry(smallest_reflected_px=64),  # kernels of 7x7 over 4 x 4 places
    "efficientnet_lite0": Geometry(smallest_reflected_px=48),  # of 5x5 over 3 x 3
    "efficientnet_lite1": Geometry(smallest_reflected_px=48),
    "efficientnet_lite2": Geometry(smallest_reflected_px=48),
    "dinov2_vits14": _PATCHES,
    "dinov2_vitb14": _PATCHES,
    "dinov2_vits14_reg": _PATCHES,
    "dinov2_vitb14_reg": _PATCHES,
}

# in the order in which a folder is held against them
IMPORTERS: Kinds[Importer] = Kinds(
    "format",
    {
        "visa": "focus_ray.data.importers.visa:VISA",
        "mvtec": "focus_ray.data.importers.mvtec:MVTEC",
        "btad": "focus_ray.data.importers.btad:BTAD",
        "folder": "focus_ray.data.importers.folder:FOLDER",
    },
)

# in the order in which reports show them
METRICS: Kinds[Metric] = Kinds(
    "metric",
    {
        "image_auroc": "focus_ray.evaluation.metrics:IMAGE_AUROC",
        "image_average_precision": "focus_ray.evaluation.metrics:IMAGE_AVERAGE_PRECISION",
        "image_f1_max": "focus_ray.evaluation.metrics:IMAGE_F1_MAX",
        "pixel_auroc": "focus_ray.evaluation.metrics:PIXEL_AUROC",
        "pixel_average_precision": "focus_ray.evaluation.metrics:PIXEL_AVERAGE_PRECISION",
        "aupro_0.3": "focus_ray.evaluation.metrics:AUPRO_03",
        "aupro_0.05": "focus_ray.evaluation.metrics:AUPRO_005",
        "false_positive_rate": "focus_ray.evaluation.metrics:FALSE_POSITIVE_RATE",
        "recall": "focus_ray.evaluation.metrics:RECALL",
    },
)

TRACKERS: Kinds[TrackerKind] = Kinds(
    "tracker",
    {
        "mlflow": "focus_ray.tracking.mlflow:MLFLOW",
        "tensorboard": "focus_ray.tracking.tensorboard:TENSORBOARD",
        "wandb": "focus_ray.tracking.wandb:WANDB",
    },
)
