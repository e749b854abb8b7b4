"""Settings of an experiment tracker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, field_validator

from focus_ray.settings.sections import ConfigSection
from focus_ray.tracking.registry import TRACKERS

TrackerName = Annotated[str, AfterValidator(TRACKERS.check_name)]


PROJECT = "focus-ray"  # experiment of MLflow and project of W&B, unless MLFLOW_EXPERIMENT_NAME or WANDB_PROJECT is set


class TrackerConfig(ConfigSection):
    """An experiment tracker, which records settings, metrics and heat maps (docs/use/trackers.md)."""

    FIXED: ClassVar[Mapping[str, Any]] = {"mode": "auto", "num_images": 6, "project": PROJECT}

    uri: str | None = Field(
        default=None,
        min_length=1,
        description="A local folder, or for mlflow a tracking server, as http://host:5000, or the URI of a database. "
        "null: for mlflow the value of MLFLOW_TRACKING_URI, otherwise trackers/KEY below storage. A "
        "password is refused: trackers read it from their own environment variables.",
    )

    @field_validator("uri")
    @classmethod
    def _refuse_password(cls, value: str | None) -> str | None:
        """Returns the URI unchanged. Raises: ValueError: the URI has a user or a password."""
        if value is not None and "@" in value.partition("://")[2].partition("/")[0]:
            shown = f"{value.partition('://')[0]}://...@{value.rpartition('@')[2]}"
            raise ValueError(
                f"{shown} holds a user or password, which would be written into every bundle: leave it out, and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI in uri's place"
            )
        return value
