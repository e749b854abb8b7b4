"""The interface of an experiment tracker. A tracker keeps runs; each run has parameters, tags, metrics, curves and pictures.

A new tracker is a file with a subclass of `Tracker` and a line in `focus_ray.tracking.registry.TRACKERS`. The file imports the
package of the tracker inside functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from focus_ray.errors import ConfigError, DataError
from focus_ray.storage.files import check_access, join
from focus_ray.tracking.settings import TrackerConfig

ParameterValue = str | int | float | bool
MAX_PARAMETER_CHARS = 500  # some trackers limit the length of a parameter


@dataclass(frozen=True)
class RunDescription:
    """The description of one run in a tracker: of a category of a training, of a trial, or of a whole training or sweep.

    Attributes:
        key: Unique key. It stays the same when a training is resumed or evaluated, so that the tracker continues the run.
        name: Name that the tracker shows.
        group: The run of the whole training or sweep; None for this run itself.
        parameters: Dotted key of each setting -> value.
        tags: Name -> text. Users search for runs by tags.
    """

    key: str
    name: str
    group: RunDescription | None = None
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """A picture for a tracker.

    Attributes:
        name: File name without suffix.
        caption: Text that the tracker shows.
        jpeg: The encoded picture.
    """

    name: str
    caption: str
    jpeg: bytes


class TrackerRun(Protocol):
    """A begun run in a tracker. The recorder catches every exception of these methods."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Adds tags. Replaces existing tags of the same name."""

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds metrics to curves at a step, usually an epoch. An earlier process may have logged the same values."""

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Sets metrics that have one value per run."""

    def log_pictures(self, pictures: Sequence[Picture]) -> None:
        """Adds pictures. A picture with an existing name replaces the old one."""

    def end(self, failed: bool) -> None:
        """Ends the run as finished or as failed. The run may be begun again later."""


class Tracker(Protocol):
    """A kind of tracker; an instance is an opened tracker. `focus_ray.tracking.registry.TRACKERS` lists all kinds."""

    @classmethod
    def check(cls, settings: TrackerConfig, storage: str) -> str:
        """Checks that the tracker can be used, without heavy imports.

        Args:
            settings: Settings of this tracker.
            storage: Storage of the runs; a tracker writes below it if its settings name no other place.

        Returns:
            The folder or address where the tracker records.

        Raises:
            MissingPackageError: The extra of the tracker is not installed.
            ConfigError: The folder cannot be written, the server cannot be reached, or a key is missing.
        """

    def __init__(self, settings: TrackerConfig, storage: str) -> None:
        """Opens the tracker. `check` was called with the same arguments before."""

    def has_run(self, run: RunDescription) -> bool:
        """Returns True if the tracker already has this run. Some trackers see only the runs of this machine."""

    def begin_run(self, run: RunDescription) -> TrackerRun:
        """Returns the existing run with this key, or creates a new run with its parameters and tags inside its group's run."""


def local_folder(kind: str, settings: TrackerConfig, storage: str) -> str:
    """Returns the folder for a tracker's files. Writes a test file first, to check the access.

    Raises:
        ConfigError: The folder is not on this machine, or cannot be written.
    """
    folder = settings.uri or join(storage, "trackers", kind)
    try:
        if "://" in folder:
            raise DataError("it is not on this machine")
        check_access(folder)
    except (DataError, OSError) as error:
        raise ConfigError(
            f"trackers.{kind}: cannot write to the folder {folder} ({error}): set trackers.{kind}.uri to another folder, or "
            f"remove trackers.{kind}"
        ) from error
    return folder


def flatten_dict(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of all values in nested mappings."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten_dict(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def flatten_parameters(tree: Mapping[str, Any]) -> dict[str, ParameterValue]:
    """Returns dotted key -> value for all settings that are not None.

    Lists become JSON text, texts are shortened to MAX_PARAMETER_CHARS, and URIs are cleaned by `without_secrets`.
    """
    parameters: dict[str, ParameterValue] = {}
    for key, value in flatten_dict(tree):
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)):
            text = value if isinstance(value, str) else json.dumps(value)
            value = without_secrets(text)[:MAX_PARAMETER_CHARS]
        parameters[key] = value
    return parameters


def without_secrets(text: str) -> str:
    """Returns the text with user, password and query removed from every URI: a signed URI lets everyone read its object."""
    return re.sub(r"(://)(?:[^/\s\"]*@)?([^\s\"?]*)(?:\?[^\s\"]*)?", r"\1\2", text)
