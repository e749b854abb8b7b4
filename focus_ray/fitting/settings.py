"""Module for all settings of a run: the sections of the packages in one configuration.

Each default names its source: [paper] arXiv 2110.04538, [kin] the paper's published relatives (RegAD, SimSiam, PaDiM), [ours] a
choice of this project.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator, model_validator

from focus_ray.cluster.settings import ClusterConfig
from focus_ray.data.settings import DataConfig
from focus_ray.density.settings import DensityConfig
from focus_ray.detect.settings import CalibrationConfig, ScoringConfig
from focus_ray.errors import ConfigError
from focus_ray.features.settings import ModelConfig
from focus_ray.fyd.settings import TrainConfig
from focus_ray.names import NAME_PATTERN, suggest_similar_name
from focus_ray.settings.sections import ConfigSection, iterate_setting_keys, read_config_tree, validate_section
from focus_ray.tracking.settings import TrackerConfig, TrackerName

DEFAULT_SELECTION_SHARE = (
    0.1  # of the normal training images, where a command needs a choice and the user gives no share
)


_OLD_BATCH_SIZE = "batch_size_per_worker"


class SelectionConfig(ConfigSection):
    """Choice of alignment and training length from normal images alone [ours].

    Held-out normal images and copies with synthetic defects judge the candidates.
    """

    FIXED: ClassVar[Mapping[str, Any]] = {"max_images": 64, "every_epochs": 1, "margin": 0.01}

    fraction: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Share of the normal training images that judge the candidates, for instance 0.1. They join the "
        "density after the choice, which costs a density pass for each candidate. 0 chooses nothing.",
    )

    @property
    def enabled(self) -> bool:
        """Whether synthetic defects choose alignment and training length."""
        return self.fraction > 0

    @model_validator(mode="before")
    @classmethod
    def _convert_enabled(cls, value: Any) -> Any:
        """Converts `enabled` of an earlier version to a share: 0 if it is false, otherwise `fraction`, by default 0.1."""
        if not isinstance(value, dict) or "enabled" not in value:
            return value
        share = value.get("fraction", DEFAULT_SELECTION_SHARE) if value["enabled"] else 0.0
        return {**{key: setting for key, setting in value.items() if key != "enabled"}, "fraction": share}


class Config(ConfigSection):
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
    def _replace_none_by_defaults(cls, value: Any) -> Any:
        """Replaces None, the settings of a tracker without settings, by an empty dictionary, which gives the defaults."""
        if not isinstance(value, dict):
            return value
        return {name: {} if settings is None else settings for name, settings in value.items()}

    @model_validator(mode="before")
    @classmethod
    def _use_model_precision(cls, value: Any, info: ValidationInfo) -> Any:
        """Sets density.precision to model.precision. A bundle keeps its own value.

        Raises: ValueError: density.precision has another value.
        """
        if not isinstance(value, dict) or (info.context and info.context.get("is_fitted")):
            return value
        model, density = value.get("model", {}), value.get("density", {})
        if not isinstance(model, dict) or not isinstance(density, dict):
            return value
        precision = model.get("precision", "auto")
        if density.get("precision", precision) != precision:
            raise ValueError(
                f"density.precision is always model.precision, {precision} (got {density['precision']!r}): leave it out"
            )
        return {**value, "density": {**density, "precision": precision}}

    @model_validator(mode="before")
    @classmethod
    def _convert_batch_size(cls, value: Any, info: ValidationInfo) -> Any:
        """Converts the training settings of a bundle of an earlier version, see `convert_earlier_settings`.

        Raises: ValueError: a user sets the batch size or a number of epochs of an earlier version.
        """
        if not isinstance(value, dict) or (converted := convert_earlier_settings(value)) == value:
            return value
        if info.context and info.context.get("is_fitted"):
            return converted
        if epochs := value["train"].get("epochs"):
            raise ValueError(
                f"train.epochs={epochs} is now train.steps, the number of optimiser steps: set train.steps to epochs x images / "
                "train.batch_size, for instance train.steps=500"
            )
        if _OLD_BATCH_SIZE in value["train"]:
            old_size, size = value["train"][_OLD_BATCH_SIZE], converted["train"]["batch_size"]
            raise ValueError(
                f"train.{_OLD_BATCH_SIZE}={old_size} is now train.batch_size, the images of all workers in one step: set "
                f"train.batch_size={size} instead, for {old_size} images of each of {size // old_size} worker(s)"
            )
        return converted

    @model_validator(mode="after")
    def _check_consistency(self) -> Config:
        """Checks settings that depend on each other.

        Raises: ValueError: calibration.method is split, and no images are held out; or more workers train than a batch has
            images.
        """
        if self.train.steps and self.train.batch_size < self.cluster.num_workers:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} has no image for some of the workers, "
                f"cluster.num_workers={self.cluster.num_workers}: raise train.batch_size or lower cluster.num_workers"
            )
        if self.calibration.method == "split" and self.data.holdout_fraction == 0.0:
            raise ValueError(
                "calibration.method=split needs held-out images: set data.holdout_fraction above 0, "
                "or calibration.method=leave_one_out"
            )
        return self


def convert_earlier_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the stored settings of a run with the names of this version.

    Earlier versions had train.batch_size_per_worker. Its product with cluster.num_workers is train.batch_size. They also had
    train.epochs; an epoch had at least one step, so the number of epochs becomes train.steps.
    """
    train, cluster = tree.get("train"), tree.get("cluster")
    if isinstance(train, Mapping) and isinstance(train.get("epochs"), int):
        train = {"steps": train["epochs"], **{key: value for key, value in train.items() if key != "epochs"}}
        tree = {**tree, "train": train}
    if not isinstance(train, Mapping) or not isinstance(train.get(_OLD_BATCH_SIZE), int):
        return dict(tree)
    num_workers = cluster.get("num_workers", 1) if isinstance(cluster, Mapping) else 1
    size = train[_OLD_BATCH_SIZE] * (num_workers if isinstance(num_workers, int) else 1)
    other_settings = {key: value for key, value in train.items() if key != _OLD_BATCH_SIZE}
    return {**tree, "train": {"batch_size": size, **other_settings}}


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a configuration from a YAML file and applies overrides.

    Args: overrides: texts like "train.steps=3", or "steps=3" if only one key ends with "steps"; the value is YAML.

    Raises: ConfigError: the file or an override cannot be read, or a value does not fit its field.
    """
    return parse_config(read_config_tree(path, list(map(_expand_short_key, overrides))), source=str(path))


def _expand_short_key(override: str) -> str:
    """Replaces a key without a dot by the full key. Raises: ConfigError: no key, or several keys, have this last part."""
    key, separator, value = override.partition("=")
    if not separator or not key.strip() or "." in key:
        return override
    return f"{find_setting_key(key.strip())}={value}"


def find_setting_key(name: str) -> str:
    """Returns the full key of a setting, for its full key or for its last part if only one key ends with it.

    Raises: ConfigError: no key, or several keys, have this last part.
    """
    keys = list(dict.fromkeys(iterate_setting_keys(Config, with_sections=True)))
    if name in keys:
        return name
    matching = [key for key in keys if key.endswith(f".{name}")]
    if len(matching) == 1:
        return matching[0]
    if matching:
        python_name = matching[0].replace(".", "__")
        raise ConfigError(f"{name}: matches {' and '.join(matching)}: write {matching[0]} (in Python {python_name})")
    last_parts = {key.rpartition(".")[2] for key in keys}
    hint = suggest_similar_name(name.rpartition(".")[2], last_parts) or "`focus-ray config explain` lists them"
    raise ConfigError(f"{name}: no such setting; {hint}")


def parse_config(tree: dict[str, Any], source: str = "configuration", is_fitted: bool = False) -> Config:
    """Makes a configuration from a plain dictionary.

    Args:
        tree: section or setting -> value.
        source: where the dictionary comes from, for error messages.
        is_fitted: see `validate_section`.

    Raises: ConfigError: a value is wrong or missing, or a key is unknown.
    """
    return validate_section(Config, tree, source, is_fitted)
