"""Rules that give images the name of their group: one part, or one burst of photographs.

Images of a group show the same part, so they must not be on both sides of a split. A rule comes from `--group-by`:
name:REGEX, folder:LEVEL, table:FILE:COLUMN or time:SECONDS.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from focus_ray.csv_cells import csv_text
from focus_ray.data.images import read_capture_time
from focus_ray.data.source import SourcePath
from focus_ray.errors import DataError
from focus_ray.storage import read_bytes

FORMS = "name:REGEX, folder:LEVEL, table:FILE:COLUMN or time:SECONDS"
FILE_COLUMNS = ("file", "filename", "image", "path", "name")  # the first that a table has names its files
_READERS = 16  # files read at once for their EXIF block

Place = tuple[SourcePath, str]
"""An image file, and the subfolders between the folder of its class (good/ and the like) and the file, as in part1/view2."""


class GroupRule(Protocol):
    """Names the groups of images.

    Attributes:
        text: the rule as the user wrote it.
        takes_subfolders: whether images in subfolders of a class folder are taken too.
        hint: what to do if no image gets a group.
    """

    text: str
    takes_subfolders: bool
    hint: str

    def name_groups(self, places: Sequence[Place]) -> list[str]:
        """Returns the group name of each image of one category and split; empty for an image that is its own group."""

    def check_sources(self, paths: Iterable[SourcePath]) -> None:
        """Raises: DataError: the rule does not fit all images of the source together."""


def parse_group_rule(text: str, source: SourcePath) -> GroupRule:
    """Returns the rule that a `--group-by` value describes.

    Args: source: the folder that is ingested; paths in a table are relative to it.

    Raises: DataError: no such form, or a value that does not fit; a table that cannot be read.
    """
    form, _, value = text.partition(":")
    if form == "name" and value:
        return NameRule(text, value)
    if form == "folder" and value.isascii() and value.isdigit() and int(value) >= 1:
        return FolderRule(text, int(value))
    if form == "time":
        return TimeRule(text, value)
    if form == "table" and value:
        return read_table_rule(text, value, source)
    raise DataError(f"group_by={text!r}: expected {FORMS}")


class NameRule:
    """A regular expression on the file name; its first capturing group, or the whole match, is the group."""

    takes_subfolders = False
    hint = "it matches no file name"

    def __init__(self, text: str, pattern: str) -> None:
        """Raises: DataError: the expression does not compile."""
        self.text = text
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise DataError(f"group_by={text!r}: {pattern!r} is no regular expression: {error}") from None

    def name_groups(self, places: Sequence[Place]) -> list[str]:
        matches = (self._pattern.search(path.name) for path, _ in places)
        number = 1 if self._pattern.groups else 0
        return [(match.group(number) or "") if match else "" for match in matches]

    def check_sources(self, paths: Iterable[SourcePath]) -> None:
        pass


class FolderRule:
    """A folder below the class folder: level 1 holds the file, level 2 is the parent of that folder, and so on.

    The name keeps the folders above it, so that a/1 and b/1 are two groups.
    """

    takes_subfolders = True
    hint = (
        "no image lies in that many subfolders of good/ or of another folder of images: put each part into a subfolder"
    )

    def __init__(self, text: str, level: int) -> None:
        self.text, self._level = text, level

    def name_groups(self, places: Sequence[Place]) -> list[str]:
        folders = (below.split("/") if below else [] for _, below in places)
        return [
            "/".join(names[: len(names) - self._level + 1]) if len(names) >= self._level else "" for names in folders
        ]

    def check_sources(self, paths: Iterable[SourcePath]) -> None:
        pass


class TableRule:
    """Group names by file: a path relative to the source, or a bare file name."""

    takes_subfolders = False
    hint = "the table names none of the image files: expected paths relative to the source, or file names"

    def __init__(self, text: str, groups: Mapping[str, str], source: SourcePath) -> None:
        """
        Args: groups: file -> group name.
        """
        self.text, self._groups, self._source = text, dict(groups), source

    def _relative(self, path: SourcePath) -> str:
        return path.relative_to(self._source).as_posix() if path.is_relative_to(self._source) else str(path)

    def name_groups(self, places: Sequence[Place]) -> list[str]:
        return [self._groups.get(self._relative(path), self._groups.get(path.name, "")) for path, _ in places]

    def check_sources(self, paths: Iterable[SourcePath]) -> None:
        by_name: dict[str, list[str]] = defaultdict(list)
        for path in paths:
            relative = self._relative(path)
            if relative not in self._groups or relative == path.name:
                by_name[path.name].append(relative)
        for name, relatives in by_name.items():
            if name in self._groups and len(relatives) > 1:
                raise DataError(
                    f"group_by={self.text!r}: {name!r} could be {' or '.join(sorted(relatives)[:3])}: write paths relative to "
                    "the source into the table"
                )


class TimeRule:
    """Photographs that follow each other within some seconds, by their EXIF time, form one burst."""

    takes_subfolders = False
    hint = "no image has an EXIF time"

    def __init__(self, text: str, value: str) -> None:
        """Raises: DataError: no number of seconds."""
        self.text = text
        try:
            self._seconds = float(value)
        except ValueError:
            self._seconds = math.nan
        if not 0 < self._seconds < math.inf:
            raise DataError(f"group_by={text!r}: {value!r} is no number of seconds above 0; forms are {FORMS}")
        self._times: dict[str, datetime | None] = {}

    def name_groups(self, places: Sequence[Place]) -> list[str]:
        paths = [path for path, _ in places]
        new = [path for path in paths if str(path) not in self._times]
        with ThreadPoolExecutor(_READERS) as pool:
            self._times.update(zip(map(str, new), pool.map(_time_of, new), strict=True))
        names = [""] * len(paths)
        first = last = datetime.min
        timed = ((self._times[str(path)], str(path), number) for number, path in enumerate(paths))
        for time, _, number in sorted((time, path, number) for time, path, number in timed if time is not None):
            if last is datetime.min or (time - last).total_seconds() > self._seconds:
                first = time
            last = time
            names[number] = first.isoformat()
        return names

    def check_sources(self, paths: Iterable[SourcePath]) -> None:
        pass


def _time_of(path: SourcePath) -> datetime | None:
    try:
        return read_capture_time(path if isinstance(path, Path) else path.read_bytes())
    except OSError:  # the file is rejected when it is checked
        return None


def read_table_rule(text: str, value: str, source: SourcePath) -> TableRule:
    """Returns the rule of a table. Raises: DataError: the table is missing, is no CSV or JSON, or lacks a column.

    Args: value: FILE:COLUMN, or FILE for a JSON object of file -> group.  FILE may be a path or an s3:// URI.
    """

    def refuse(reason: str) -> DataError:
        return DataError(f"group_by={text!r}: {reason}")

    file, _, column = value.rpartition(":")
    if not file or "/" in column or "\\" in column:  # the only colon is that of s3:// or of a drive
        file, column = value, ""
    try:
        content = read_bytes(file).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise refuse(f"cannot read the table {file}: {error}") from None
    if file.lower().endswith(".json"):
        pairs = _pairs_of_json(content, file, column, refuse)
    elif file.lower().endswith(".csv"):
        pairs = _pairs_of_csv(content, file, column, refuse)
    else:
        raise refuse(f"{file}: expected a table that ends in .csv or .json")
    groups: dict[str, str] = {}
    for name, group in pairs:
        key = name.replace("\\", "/").removeprefix("./")
        if groups.setdefault(key, group) != group:
            raise refuse(f"{file} gives {name!r} the groups {groups[key]!r} and {group!r}: expected one")
    return TableRule(text, groups, source)


def _pairs_of_csv(content: str, file: str, column: str, refuse: Any) -> list[tuple[str, str]]:
    header = content.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    try:
        reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
        # names may come from a table of `focus-ray inspect`
        rows = [{key: csv_text(cell) if isinstance(cell, str) else cell for key, cell in row.items()} for row in reader]
        columns = list(reader.fieldnames or ())
    except csv.Error as error:
        raise refuse(f"{file} is no CSV: {error}") from None
    return _pairs_of_rows(rows, columns, file, column, refuse)


def _pairs_of_json(content: str, file: str, column: str, refuse: Any) -> list[tuple[str, str]]:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise refuse(f"{file} is no JSON: {error}") from None
    if isinstance(found, dict):
        if column:
            raise refuse(f"{file} is an object of file -> group and has no column {column!r}: write table:{file}")
        return [(name, _group_name(group, file, refuse)) for name, group in found.items()]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise refuse(f"{file}: expected a list of objects, or an object of file -> group")
    columns = list(dict.fromkeys(name for row in found for name in row))
    return _pairs_of_rows(found, columns, file, column, refuse)


def _pairs_of_rows(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], file: str, column: str, refuse: Any
) -> list[tuple[str, str]]:
    """Returns (file, group) of each row."""
    shown = ", ".join(columns) or "none"
    if not column or column not in columns:
        what = (
            f"no column {column!r} in {file}"
            if column
            else f"which column of {file} holds the group? Write FILE:COLUMN"
        )
        raise refuse(f"{what}; columns are: {shown}")
    names = [name for name in FILE_COLUMNS if name in columns and name != column]
    if not names:
        raise refuse(
            f"{file} has no column that names the file: expected {', '.join(FILE_COLUMNS)}; columns are: {shown}"
        )
    named = [(str(row.get(names[0]) or "").strip(), row.get(column)) for row in rows]
    return [(name, _group_name(group, file, refuse)) for name, group in named if name]


def _group_name(value: Any, file: str, refuse: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise refuse(f"{file}: group {value!r}: expected a text or a number")
    return str(value).strip()
