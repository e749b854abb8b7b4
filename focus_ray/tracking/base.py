"""What a tracker is: it keeps one run a subject, and takes parameters, tags, figures, curves and pictures of it.

A new tracker is a file with a `TrackerKind`, and its line in `focus_ray.kinds.TRACKERS`. It imports its package inside functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from focus_ray.config import TrackerConfig
from focus_ray.errors import ConfigError, DataError
from focus_ray.storage import check_access, is_s3, join

Value = str | int | float | bool
LONGEST = 500  # characters of a parameter, which some trackers bound


@dataclass(frozen=True)
class Subject:
    """What a tracker keeps one run of: a category of a training, a trial, or all of them together.

    key: the same for whatever goes on with it; no other has it.  name: for people.  group: what it is a part of.
    parameters: dotted key -> value.  tags: what it is found again by.
    """

    key: str
    name: str
    group: Subject | None = None
    parameters: Mapping[str, Value] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """name: fit for a file, without an ending.  caption: for people."""

    name: str
    caption: str
    jpeg: bytes


class Tracked(Protocol):
    """A subject's run in a tracker. Whatever these raise, the recorder catches."""

    def tag(self, tags: Mapping[str, str]) -> None:
        """Adds tags, or replaces them."""

    def curve(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures at a step, epochs usually; a step that is there already may be told again."""

    def figures(self, figures: Mapping[str, float]) -> None:
        """Figures that have one value."""

    def pictures(self, pictures: Sequence[Picture]) -> None:
        """Replaces those of the same name."""

    def end(self, failed: bool) -> None:
        """Ends it, until it is begun again."""


class Tracker(Protocol):
    def has(self, subject: Subject) -> bool:
        """Whether it has a run of the subject already, as far as it can tell from here."""

    def begin(self, subject: Subject) -> Tracked:
        """Its run: the one that it has, or a new one, with parameters and tags, in its group's."""


class TrackerKind(Protocol):
    """What `focus_ray.kinds.TRACKERS` names. storage: of the runs, below which a tracker keeps its files unless told."""

    def check(self, settings: TrackerConfig, storage: str) -> str:
        """Returns: its place. Imports nothing heavy.

        Raises: MissingPackageError: its extra is not installed.  ConfigError: the place cannot be written or reached.
        """

    def open(self, settings: TrackerConfig, storage: str) -> Tracker:
        """Of settings that were checked."""


def local_folder(kind: str, settings: TrackerConfig, storage: str) -> str:
    """The folder that a tracker writes to, probed. Raises: ConfigError: it is none of this machine's, or cannot be written."""
    folder = settings.uri or join(storage, "trackers", kind)
    if is_s3(folder) or "://" in folder:
        asked = "" if settings.uri else ", since storage is none"
        raise ConfigError(
            f"trackers.{kind}: {folder} is no folder of this machine: set trackers.{kind}.uri to one{asked}"
        )
    try:
        check_access(folder)
    except (DataError, OSError) as error:
        raise ConfigError(
            f"trackers.{kind}: {folder} cannot be written ({error}): set trackers.{kind}.uri to another folder, or leave "
            f"trackers.{kind} out"
        ) from error
    return folder


def flatten_dict(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested mappings."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten_dict(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parameters_of(tree: Mapping[str, Any]) -> dict[str, Value]:
    """Dotted key -> value, lists as JSON; what nothing is set for is left out, URIs `without_secrets`."""
    found: dict[str, Value] = {}
    for key, value in flatten_dict(tree):
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)):
            text = value if isinstance(value, str) else json.dumps(value)
            value = without_secrets(text)[:LONGEST]
        found[key] = value
    return found


def without_secrets(text: str) -> str:
    """URIs in a text without user, password and query: whoever has a signed one can read what it names."""
    return re.sub(r"(://)(?:[^/\s\"]*@)?([^\s\"?]*)(?:\?[^\s\"]*)?", r"\1\2", text)
