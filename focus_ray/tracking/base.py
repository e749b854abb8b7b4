"""The interface of an experiment tracker, a program such as MLflow that stores and shows the results of experiments.

A tracker stores runs; each run has parameters, tags, metrics, curves and pictures. A new tracker is a file with a subclass of
`Tracker` and a line in `focus_ray.tracking.registry.TRACKERS`. The file imports the package of the tracker inside functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from focus_ray.errors import ConfigError, DataError
from focus_ray.storage.files import check_folder_access, join_path
from focus_ray.tracking.settings import TrackerConfig

ParameterValue = str | int | float | bool
MAX_PARAMETER_CHARS = 500  # some trackers limit the length of a parameter


@dataclass(frozen=True)
class RunDescription:
    """The description of one run in a tracker: a run for a category, for a trial of a sweep, or for a whole training or sweep.

    Attributes:
        key: Unique key. It stays the same when a training is resumed or evaluated, so that the tracker continues the run.
        name: Name that the tracker shows.
        parent: Description of the run of the whole training or sweep; None if this run has no run above it.
        parameters: Dotted key of a setting, such as "model.image_size_px" -> value.
        tags: Name -> text. Users search for runs by tags.
    """

    key: str
    name: str
    parent: RunDescription | None = None
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CaptionedPicture:
    """A JPEG picture with name and caption, for a run in a tracker.

    Attributes:
        name: File name without suffix.
        caption: Text that the tracker shows with the picture.
        jpeg: Bytes of the JPEG file.
    """

    name: str
    caption: str
    jpeg: bytes


class TrackerRun(Protocol):
    """Interface of an open run in a tracker, to which metrics, tags and pictures are written.

    The methods may raise any exception: `BackgroundRecorder` catches it.
    """

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Adds tags. Replaces existing tags of the same name."""

    def log_step_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the value of each metric to its curve at a step, the number of finished optimiser steps.

        An earlier process may have logged the same step already.
        """

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Sets metrics that have one value per run."""

    def log_pictures(self, pictures: Sequence[CaptionedPicture]) -> None:
        """Adds pictures. A picture with an existing name replaces the old one."""

    def end(self, failed: bool) -> None:
        """Ends the run as finished or as failed. `Tracker.begin_run` may continue the run later."""


class Tracker(Protocol):
    """Interface of a kind of tracker; an instance is an opened tracker. `tracking.registry.TRACKERS` lists all kinds."""

    @classmethod
    def check_usable(cls, settings: TrackerConfig, storage: str) -> str:
        """Checks that the tracker can be used. Does not import the package of the tracker.

        Args:
            settings: Settings of this tracker.
            storage: Folder of all training runs; a tracker writes below it if its settings name no other place.

        Returns:
            The folder or address where the tracker stores its data, as text for people.

        Raises:
            MissingPackageError: The package extra of the tracker is not installed.
            ConfigError: The folder cannot be written, the server cannot be reached, or a key is missing.
        """

    def __init__(self, settings: TrackerConfig, storage: str) -> None:
        """Opens the tracker. `check_usable` was called with the same arguments before."""

    def has_run(self, run: RunDescription) -> bool:
        """Returns True if the tracker already has this run. Some trackers see only the runs of this machine."""

    def begin_run(self, run: RunDescription) -> TrackerRun:
        """Opens the existing run with the key `run.key`, or creates it with parameters and tags below its parent run."""


def find_writable_folder(kind: str, settings: TrackerConfig, storage: str) -> str:
    """Returns the folder for a tracker's files: `settings.uri`, or <storage>/trackers/<kind> without it.

    Writes and deletes a test file in the folder, to check the access.

    Raises:
        ConfigError: The folder is not on this machine, or cannot be written.
    """
    folder = settings.uri or join_path(storage, "trackers", kind)
    try:
        if "://" in folder:
            raise DataError("it is not on this machine")
        check_folder_access(folder)
    except (DataError, OSError) as error:
        raise ConfigError(
            f"trackers.{kind}: cannot write to the folder {folder} ({error}): set trackers.{kind}.uri to another folder, or "
            f"remove trackers.{kind}"
        ) from error
    return folder


def flatten_dict(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Generator: yields (dotted key, value) for every value in nested mappings, such as ("model.padding", "zeros").

    Args:
        tree: Nested mappings.
        prefix: Text before every key.
    """
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten_dict(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def flatten_parameters(tree: Mapping[str, Any]) -> dict[str, ParameterValue]:
    """Returns dotted key -> value for all values in nested mappings that are not None.

    Lists become JSON text. All texts lose secrets in URIs (`remove_uri_secrets`) and are cut to MAX_PARAMETER_CHARS characters.
    """
    parameters: dict[str, ParameterValue] = {}
    for key, value in flatten_dict(tree):
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)):
            text = value if isinstance(value, str) else json.dumps(value)
            value = remove_uri_secrets(text)[:MAX_PARAMETER_CHARS]
        parameters[key] = value
    return parameters


def remove_uri_secrets(text: str) -> str:
    """Returns a text with user, password and query removed from every URI in it.

    The query may be a signature, with which everyone can read the object.
    """
    return re.sub(r"(://)(?:[^/\s\"]*@)?([^\s\"?]*)(?:\?[^\s\"]*)?", r"\1\2", text)
