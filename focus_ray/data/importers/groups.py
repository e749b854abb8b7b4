"""Rules that name the group of each image: the images of one part, or of one burst of photographs.

The images of a group show the same part, so a split must not separate them. `--group-by` selects a rule: name:REGEX,
folder:LEVEL, table:FILE:COLUMN or time:SECONDS.
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

from focus_ray.csv_tables import csv_text
from focus_ray.data.images import read_capture_time
from focus_ray.data.source import SourcePath
from focus_ray.errors import DataError
from focus_ray.storage.files import read_bytes

RULE_FORMS = "name:REGEX, folder:LEVEL, table:FILE:COLUMN or time:SECONDS"
FILE_COLUMNS = (
    "file",
    "filename",
    "image",
    "path",
    "name",
)  # the first of these columns in a table contains the file names
_NUM_READERS = 16  # threads that read EXIF blocks

ImageLocation = tuple[SourcePath, str]
"""An image file, and its subfolders below the class folder (good/, scratch/), for example "part1/view2"."""


class GroupRule(Protocol):
    """Names the groups of images.

    Attributes:
        text: the rule as the user wrote it.
        takes_subfolders: whether images in subfolders of a class folder are ingested too.
        hint: the advice in the error message if no image gets a group.
    """

    text: str
    takes_subfolders: bool
    hint: str

    def name_groups(self, locations: Sequence[ImageLocation]) -> list[str]:
        """Returns the group name of each image of one category and split; empty for an image that is its own group."""

    def check_sources(self, paths: Iterable[SourcePath]) -> None:
        """Checks that the rule fits all images of the source. Raises: DataError: it does not."""


def parse_group_rule(text: str, source: SourcePath) -> GroupRule:
    """Returns the rule that a `--group-by` value describes.

    Args: source: root of the source; paths in a table are relative to it.

    Raises: DataError: the form is unknown, the value is invalid, or the table cannot be read.
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
    raise DataError(f"group_by={text!r}: expected {RULE_FORMS}")


class NameRule:
    """Names the group by a regular expression on the file name: its first capturing group or, without one, the whole match."""

    takes_subfolders = False
    hint = "it matches no file name"

    def __init__(self, text: str, pattern: str) -> None:
        """Raises: DataError: the expression does not compile."""
        self.text = text
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise DataError(f"group_by={text!r}: {pattern!r} is not a regular expression: {error}") from None

    def name_groups(self, locations: Sequence[ImageLocation]) -> list[str]:
        matches = (self._pattern.search(path.name) for path, _ in locations)
        number = 1 if self._pattern.groups else 0
        return [(match.group(number) or "") if match else "" for match in matches]

    def check_sources(self, paths: Iterable[SourcePath]) -> None:
        pass


class FolderRule:
    """Names the group by a folder below the class folder: level 1 contains the file, level 2 is its parent folder, and so on.

    The name of the group includes the folders above, so that a/1 and b/1 are two groups.
    """

    takes_subfolders = True
    hint = "no image lies that many subfolders below good/ or the like: move the images of each part into a subfolder"

    def __init__(self, text: str, level: int) -> None:
        self.text, self._level = text, level

    def name_groups(self, locations: Sequence[ImageLocation]) -> list[str]:
        folders = (below.split("/") if below else [] for _, below in locations)
        return [
            "/".join(names[: len(names) - self._level + 1]) if len(names) >= self._level else "" for names in folders
        ]

    def check_sources(self, paths: Iterable[SourcePath]) -> None:
        pass


class TableRule:
    """Takes the group names from a table. A file is named by its path relative to the source, or by its bare file name."""

    takes_subfolders = False
    hint = "the table names none of the image files: expected paths relative to the source, or file names"

    def __init__(self, text: str, groups: Mapping[str, str], source: SourcePath) -> None:
        """
        Args:
            text: the rule as the user wrote it.
            groups: file -> group name.
            source: root of the source.
        """
        self.text, self._groups, self._source = text, dict(groups), source

    def _relative(self, path: SourcePath) -> str:
        """Returns the path relative to the source."""
        return path.relative_to(self._source).as_posix() if path.is_relative_to(self._source) else str(path)

    def name_groups(self, locations: Sequence[ImageLocation]) -> list[str]:
        return [self._groups.get(self._relative(path), self._groups.get(path.name, "")) for path, _ in locations]

    def check_sources(self, paths: Iterable[SourcePath]) -> None:
        """Checks that each bare file name in the table names only one image. Raises: DataError: a name is ambiguous."""
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
    """Groups photographs into bursts: the EXIF times of successive photographs differ by at most some seconds."""

    takes_subfolders = False
    hint = "no image has an EXIF time"

    def __init__(self, text: str, value: str) -> None:
        """Raises: DataError: the value is not a number of seconds."""
        self.text = text
        try:
            self._max_gap_s = float(value)
        except ValueError:
            self._max_gap_s = math.nan
        if not 0 < self._max_gap_s < math.inf:
            raise DataError(f"group_by={text!r}: {value!r} is not a number of seconds above 0; expected {RULE_FORMS}")
        self._times: dict[str, datetime | None] = {}

    def name_groups(self, locations: Sequence[ImageLocation]) -> list[str]:
        paths = [path for path, _ in locations]
        unread = [path for path in paths if str(path) not in self._times]
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            self._times.update(zip(map(str, unread), pool.map(_read_time, unread), strict=True))
        names = [""] * len(paths)
        first = last = datetime.min  # times of the first image of the current burst, and of the previous image
        timed = ((self._times[str(path)], str(path), number) for number, path in enumerate(paths))
        for time, _, number in sorted((time, path, number) for time, path, number in timed if time is not None):
            if last is datetime.min or (time - last).total_seconds() > self._max_gap_s:
                first = time
            last = time
            names[number] = first.isoformat()
        return names

    def check_sources(self, paths: Iterable[SourcePath]) -> None:
        pass


def _read_time(path: SourcePath) -> datetime | None:
    """Returns the EXIF time of an image, or None."""
    try:
        return read_capture_time(path if isinstance(path, Path) else path.read_bytes())
    except OSError:  # the check of the file will reject it
        return None


def read_table_rule(text: str, value: str, source: SourcePath) -> TableRule:
    """Reads a table, and returns its rule.

    Args:
        text: the rule as the user wrote it.
        value: FILE:COLUMN, or FILE for a JSON object of file -> group. FILE is a path or an s3:// URI.
        source: root of the source.

    Raises: DataError: the table is missing, is neither CSV nor JSON, lacks a column, or gives a file two groups.
    """

    def refuse(reason: str) -> DataError:
        return DataError(f"group_by={text!r}: {reason}")

    file, _, column = value.rpartition(":")
    if not file or "/" in column or "\\" in column:  # the only colon belongs to s3:// or to a Windows drive
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
        raise refuse(f"{file}: expected a table with the suffix .csv or .json")
    groups: dict[str, str] = {}
    for name, group in pairs:
        key = name.replace("\\", "/").removeprefix("./")
        if groups.setdefault(key, group) != group:
            raise refuse(f"{file} gives {name!r} the groups {groups[key]!r} and {group!r}: expected one group")
    return TableRule(text, groups, source)


def _pairs_of_csv(content: str, file: str, column: str, refuse: Any) -> list[tuple[str, str]]:
    """Returns (file, group) of each row of a CSV text.

    Args:
        file: name of the table, for error messages.
        column: name of the column with the groups.
        refuse: makes the error to raise from its reason.

    Raises: the error of `refuse`: the text is not valid CSV, or a column is missing.
    """
    header = content.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    try:
        reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
        # names may come from a table of `focus-ray inspect`
        rows = [{key: csv_text(cell) if isinstance(cell, str) else cell for key, cell in row.items()} for row in reader]
        columns = list(reader.fieldnames or ())
    except csv.Error as error:
        raise refuse(f"{file} is not valid CSV: {error}") from None
    return _pairs_of_rows(rows, columns, file, column, refuse)


def _pairs_of_json(content: str, file: str, column: str, refuse: Any) -> list[tuple[str, str]]:
    """Returns (file, group) from a JSON text: an object of file -> group, or a list of row objects."""
    try:
        table = json.loads(content)
    except ValueError as error:
        raise refuse(f"{file} is not valid JSON: {error}") from None
    if isinstance(table, dict):
        if column:
            raise refuse(f"{file} is an object of file -> group and has no column {column!r}: write table:{file}")
        return [(name, _group_name(group, file, refuse)) for name, group in table.items()]
    if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
        raise refuse(f"{file}: expected a list of objects, or an object of file -> group")
    columns = list(dict.fromkeys(name for row in table for name in row))
    return _pairs_of_rows(table, columns, file, column, refuse)


def _pairs_of_rows(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], file: str, column: str, refuse: Any
) -> list[tuple[str, str]]:
    """Returns (file, group) of each row that names a file. Raises the error of `refuse`: a column is missing."""
    available = ", ".join(columns) or "none"
    if not column or column not in columns:
        problem = (
            f"no column {column!r} in {file}"
            if column
            else f"which column of {file} holds the group? Write FILE:COLUMN"
        )
        raise refuse(f"{problem}; columns are: {available}")
    file_columns = [name for name in FILE_COLUMNS if name in columns and name != column]
    if not file_columns:
        raise refuse(
            f"{file} has no column with file names: expected one of {', '.join(FILE_COLUMNS)}; columns are: {available}"
        )
    pairs = [(str(row.get(file_columns[0]) or "").strip(), row.get(column)) for row in rows]
    return [(name, _group_name(group, file, refuse)) for name, group in pairs if name]


def _group_name(value: Any, file: str, refuse: Any) -> str:
    """Returns the group name of a table cell; empty for None. Raises the error of `refuse`: neither text nor number."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise refuse(f"{file}: group {value!r}: expected a text or a number")
    return str(value).strip()
