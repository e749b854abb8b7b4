"""The metrics by name. A new metric is defined in `metrics.metrics` and has one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from focus_ray.settings.kinds import LazyRegistry

if TYPE_CHECKING:
    from focus_ray.metrics.metrics import Metric

# in the order in which reports show them
METRICS: LazyRegistry[Metric] = LazyRegistry(
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
