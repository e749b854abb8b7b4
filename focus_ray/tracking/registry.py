"""The table of the experiment trackers: name -> class. A new tracker is one file in this folder and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from focus_ray.settings.kinds import LazyRegistry

if TYPE_CHECKING:
    from focus_ray.tracking.base import Tracker

TRACKERS: LazyRegistry[type[Tracker]] = LazyRegistry(
    "tracker",
    {
        "mlflow": "focus_ray.tracking.mlflow:MLflowTracker",
        "tensorboard": "focus_ray.tracking.tensorboard:TensorBoardTracker",
        "wandb": "focus_ray.tracking.wandb:WandbTracker",
    },
)
