"""The rules that name the group of each image. Images of a group show the same part, or belong to one burst of photographs.

A split must not separate the images of a group. `--group-by` selects a rule: name:REGEX, folder:LEVEL, table:FILE:COLUMN or
time:SECONDS.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from focus_ray.csv_tables import unescape_formula
from focus_ray.data.images import read_capture_time
from focus_ray.data.source import SourcePath, get_relative_path
from focus_ray.errors import DataError
from focus_ray.storage.files import read_bytes

RULE_FORMS = "name:REGEX, folder:LEVEL, table:FILE:COLUMN or time:SECONDS"
FILE_COLUMNS = ("file", "filename", "image", "path", "name")  # the first of these in a table contains the file names
_NUM_READERS = 16  # threads that read EXIF blocks

ImageLocation = tuple[SourcePath, str]
"""An image file, and its subfolders below the class folder (good/, scratch/), for example "part1/view2"."""


@dataclass(frozen=True)
class GroupRule(ABC):
    """A rule that names the groups of images. Images of a group show the same part, or belong to one burst of photographs.

    Attributes:
        text: the rule as the user wrote it.
        takes_subfolders: whether images in subfolders of a class folder (good/, scratch/) are ingested too.
        hint: the advice in the error message if no image gets a group.
    """

    text: str
    takes_subfolders: ClassVar[bool] = False
    hint: ClassVar[str]

    @abstractmethod
    def name_groups(self, locations: Sequence[ImageLocation]) -> list[str]:
        """Returns the group name of each image; empty for an image that is its own group.

        Args: locations: the images of one category and split.
        """

    def check_source_images(self, paths: Iterable[SourcePath]) -> None:  # noqa: B027
        """Checks that the rule fits all images of the source. Raises: DataError: the rule does not fit."""


def parse_group_rule(text: str, source: SourcePath) -> GroupRule:
    """Parses a `--group-by` value, such as folder:1, and returns the rule that names the group of each image.

    Args:
        text: the value.
        source: root of the source; paths in a table are relative to it.

    Raises: DataError: the form is unknown, the value is invalid, or the table cannot be read.
    """
    form, _, value = text.partition(":")
    try:
        if form == "name" and value:
            return GroupByFileName(text, re.compile(value))
        if form == "folder" and value:
            if int(value) < 1:
                raise ValueError(f"the level {value} is below 1")
            return GroupByFolder(text, int(value))
        if form == "time" and value:
            if not 0 < float(value) < math.inf:
                raise ValueError(f"{value} is not a number of seconds above 0")
            return GroupByTime(text, float(value))
        if form == "table" and value:
            return GroupByTable(text, _read_group_table(value), source)
        raise ValueError("unknown form, or no value")
    except DataError:  # the storage of the table fails
        raise
    except (ValueError, OSError, re.error, csv.Error) as error:
        raise DataError(f"group_by={text!r}: {error}: expected {RULE_FORMS}") from None


@dataclass(frozen=True)
class GroupByFileName(GroupRule):
    """The rule that takes the group name from the file name, by a regular expression: first capturing group or whole match."""

    pattern: re.Pattern[str]
    hint = "it matches no file name"

    def name_groups(self, locations: Sequence[ImageLocation]) -> list[str]:
        """Returns the part of each file name that the regular expression matches; empty if it does not match."""
        matches = (self.pattern.search(path.name) for path, _ in locations)
        number = 1 if self.pattern.groups else 0
        return [(match.group(number) or "") if match else "" for match in matches]


@dataclass(frozen=True)
class GroupByFolder(GroupRule):
    """The rule that takes the group name from a folder below the class folder (good/, scratch/).

    Level 1 is the folder of the file, and level 2 is the parent of this folder. The group name includes the folders above, so
    that a/1 and b/1 are two groups.
    """

    level: int
    takes_subfolders = True
    hint = "no image lies that many subfolders below good/ or the like: move the images of each part into a subfolder"

    def name_groups(self, locations: Sequence[ImageLocation]) -> list[str]:
        """Returns the folder of each image at the level of the rule; empty if the image has fewer subfolders."""
        folders = (below.split("/") if below else [] for _, below in locations)
        return ["/".join(names[: max(0, len(names) - self.level + 1)]) for names in folders]


@dataclass(frozen=True)
class GroupByTable(GroupRule):
    """The rule that takes the group names from a table, which lists paths relative to the source, or file names.

    Attributes:
        groups: path or file name -> group name.
        source: root of the source.
    """

    groups: Mapping[str, str]
    source: SourcePath
    hint = "the table names none of the image files: expected paths relative to the source, or file names"

    def name_groups(self, locations: Sequence[ImageLocation]) -> list[str]:
        """Returns the group of each image in the table; empty if the table does not name the image."""
        names = ((get_relative_path(path, self.source), path.name) for path, _ in locations)
        return [self.groups.get(relative, self.groups.get(name, "")) for relative, name in names]

    def check_source_images(self, paths: Iterable[SourcePath]) -> None:
        """Checks that each file name without folder in the table belongs to only one image of the source.

        Raises: DataError: a name is ambiguous.
        """
        by_name: dict[str, list[str]] = defaultdict(list)
        for path in paths:
            relative = get_relative_path(path, self.source)
            if relative not in self.groups or relative == path.name:
                by_name[path.name].append(relative)
        for name, relatives in by_name.items():
            if name in self.groups and len(relatives) > 1:
                places = " or ".join(sorted(relatives)[:3])
                raise DataError(f"group_by={self.text!r}: {name!r} could be {places}: write the path into the table")


@dataclass(frozen=True)
class GroupByTime(GroupRule):
    """The rule that groups photographs into bursts: their EXIF times have gaps of at most `max_gap_s` seconds."""

    max_gap_s: float
    hint = "no image has an EXIF time"
    _times: dict[str, datetime | None] = field(default_factory=dict)  # path -> EXIF time, of images that were read

    def name_groups(self, locations: Sequence[ImageLocation]) -> list[str]:
        """Returns the time of the first photograph of each image's burst; empty for an image without EXIF time."""
        paths = [path for path, _ in locations]
        unread = [path for path in paths if str(path) not in self._times]
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            self._times.update(zip(map(str, unread), pool.map(_read_exif_time, unread), strict=True))
        names = [""] * len(paths)
        first = last = datetime.min  # times of the first image of the current burst, and of the previous image
        timed = ((self._times[str(path)], str(path), number) for number, path in enumerate(paths))
        for time, _, number in sorted((time, path, number) for time, path, number in timed if time is not None):
            if last is datetime.min or (time - last).total_seconds() > self.max_gap_s:
                first = time
            last = time
            names[number] = first.isoformat()
        return names


def _read_exif_time(path: SourcePath) -> datetime | None:
    """Returns the EXIF time of an image; None if the image has no time or cannot be read."""
    try:
        return read_capture_time(path if isinstance(path, Path) else path.read_bytes())
    except OSError:  # the check of the file will reject it
        return None


def _read_group_table(value: str) -> dict[str, str]:
    """Reads a table of groups, and returns path or file name -> group name.

    Args: value: FILE:COLUMN, or FILE for a JSON object of file -> group. FILE is a path or an s3:// URI.

    Raises:
        ValueError, OSError or csv.Error: the table is missing, is neither CSV nor JSON, lacks a column, or gives a file two
            groups.
        DataError: the storage of the table fails.
    """
    file, _, column = value.rpartition(":")
    if not file or "/" in column or "\\" in column:  # the only colon belongs to s3:// or to a Windows drive
        file, column = value, ""
    content = read_bytes(file).decode("utf-8-sig")
    if file.lower().endswith(".json"):
        table = json.loads(content)
        is_list = isinstance(table, list) and all(isinstance(row, dict) for row in table)
        if not is_list and not (isinstance(table, dict) and not column):
            raise ValueError(f"{file} is neither a list of objects with a column, nor an object of file -> group")
        pairs = _extract_file_groups(table, file, column) if is_list else list(table.items())
    elif file.lower().endswith(".csv"):
        delimiter = max(",;\t", key=content.partition("\n")[0].count)
        reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
        # names may come from a table of `focus-ray inspect`
        rows = [
            {key: unescape_formula(cell) if isinstance(cell, str) else cell for key, cell in row.items()}
            for row in reader
        ]
        pairs = _extract_file_groups(rows or [dict.fromkeys(reader.fieldnames or ())], file, column)
    else:
        raise ValueError(f"the name of the table {file} does not end in .csv or .json")
    groups: dict[str, str] = {}
    for name, group in pairs:
        if isinstance(group, bool) or not isinstance(group, (str, int, float, type(None))):
            raise ValueError(f"{file}: the group {group!r} is neither a text nor a number")
        text = "" if group is None else str(group).strip()
        if groups.setdefault(name.replace("\\", "/").removeprefix("./"), text) != text:
            raise ValueError(f"{file} gives {name!r} a second group {text!r}")
    return groups


def _extract_file_groups(rows: Sequence[Mapping[str, Any]], file: str, column: str) -> list[tuple[str, Any]]:
    """Returns (file, group) of each table row that names a file.

    Args:
        rows: column -> cell, for each row.
        file: name of the table, for error messages.
        column: name of the column with the groups.

    Raises: ValueError: a column is missing.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    file_columns = [name for name in FILE_COLUMNS if name in columns and name != column]
    if column not in columns or not file_columns:
        column_text = f"a column {column or 'COLUMN'!r} of groups, and one of {', '.join(FILE_COLUMNS)} with file names"
        raise ValueError(f"{file} needs {column_text}; its columns are {', '.join(map(str, columns)) or 'none'}")
    names = (str(row.get(file_columns[0]) or "").strip() for row in rows)
    return [(name, row.get(column)) for name, row in zip(names, rows, strict=True) if name]
