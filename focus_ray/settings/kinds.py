"""Tables of the available densities, backbones, importers, metrics and trackers. A new one needs one file and one line here."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from focus_ray.names import suggest_name

if TYPE_CHECKING:
    from focus_ray.data.importers.base import Importer
    from focus_ray.density.kinds.base import DensityKind
    from focus_ray.features.backbones.spec import BackboneSpec
    from focus_ray.metrics.metrics import Metric
    from focus_ray.tracking.base import Tracker

T = TypeVar("T")


class Kinds(Generic[T]):
    """A table of the kinds of one component (density, backbone, importer ...), by name. A kind is imported when it is looked up.

    The files of densities and backbones import torch only inside functions, so that a configuration can be checked without torch.
    """

    def __init__(self, component: str, import_paths: dict[str, str]) -> None:
        """
        Args:
            component: name of the component for error messages, as in "density".
            import_paths: name of the kind -> "module:attribute".
        """
        self.component, self.import_paths = component, import_paths

    def __iter__(self) -> Iterator[str]:
        return iter(self.import_paths)

    def check(self, name: str) -> str:
        """Returns the name unchanged.

        Raises: ValueError: there is no kind of this name. The message lists the available names.
        """
        if name not in self.import_paths:
            hints = (suggest_name(name, self.import_paths), f"choose one of {', '.join(self.import_paths)}")
            raise ValueError(f"{self.component} {name!r} is not known: {' '.join(hint for hint in hints if hint)}")
        return name

    def __getitem__(self, name: str) -> T:
        """Imports and returns the kind of this name. Raises: ValueError: there is no kind of this name."""
        module, _, attribute = self.import_paths[self.check(name)].partition(":")
        return cast(T, getattr(importlib.import_module(module), attribute))


DENSITIES: Kinds[DensityKind[Any]] = Kinds(
    "density",
    {
        "gaussian": "focus_ray.density.kinds.gaussian:GAUSSIAN",
        "nearest": "focus_ray.density.kinds.nearest:NEAREST",
    },
)

BACKBONES: Kinds[BackboneSpec] = Kinds(
    "backbone",
    {
        "resnet18": "focus_ray.features.backbones.resnet:RESNET18",
        "resnet34": "focus_ray.features.backbones.resnet:RESNET34",
        "resnet50": "focus_ray.features.backbones.resnet:RESNET50",
        "wide_resnet50_2": "focus_ray.features.backbones.resnet:WIDE_RESNET50_2",
        "convnext_tiny": "focus_ray.features.backbones.convnext:CONVNEXT_TINY",
        "efficientnet_lite0": "focus_ray.features.backbones.efficientnet_lite:LITE0",
        "efficientnet_lite1": "focus_ray.features.backbones.efficientnet_lite:LITE1",
        "efficientnet_lite2": "focus_ray.features.backbones.efficientnet_lite:LITE2",
        "dinov2_vits14": "focus_ray.features.backbones.dinov2:VITS14",
        "dinov2_vitb14": "focus_ray.features.backbones.dinov2:VITB14",
        "dinov2_vits14_reg": "focus_ray.features.backbones.dinov2:VITS14_REG",
        "dinov2_vitb14_reg": "focus_ray.features.backbones.dinov2:VITB14_REG",
    },
)


# in the order in which they are compared with a folder
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
        "image_auroc": "focus_ray.metrics.metrics:IMAGE_AUROC",
        "image_average_precision": "focus_ray.metrics.metrics:IMAGE_AVERAGE_PRECISION",
        "image_f1_max": "focus_ray.metrics.metrics:IMAGE_F1_MAX",
        "pixel_auroc": "focus_ray.metrics.metrics:PIXEL_AUROC",
        "pixel_average_precision": "focus_ray.metrics.metrics:PIXEL_AVERAGE_PRECISION",
        "aupro_0.3": "focus_ray.metrics.metrics:AUPRO_03",
        "aupro_0.05": "focus_ray.metrics.metrics:AUPRO_005",
        "false_positive_rate": "focus_ray.metrics.metrics:FALSE_POSITIVE_RATE",
        "recall": "focus_ray.metrics.metrics:RECALL",
    },
)

TRACKERS: Kinds[type[Tracker]] = Kinds(
    "tracker",
    {
        "mlflow": "focus_ray.tracking.mlflow:MLflow",
        "tensorboard": "focus_ray.tracking.tensorboard:TensorBoard",
        "wandb": "focus_ray.tracking.wandb:WeightsAndBiases",
    },
)
