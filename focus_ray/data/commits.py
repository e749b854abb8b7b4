"""The format of a commit file, which lists the files of one version of a category, and the rules when old files are deleted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from itertools import pairwise
from typing import TypedDict, cast

from pyarrow import fs

from focus_ray.data.schema import SCHEMA_VERSION
from focus_ray.errors import DataError

# A replaced version stays readable for this long. A file that no commit names counts as the leftover of a dead run only when it
# is older than this: a younger file may belong to a run that is still writing.
STALE_AFTER = timedelta(hours=24)
# Subfolders of a category: the commits of all versions, and one claim per version that names its successor.
VERSIONS_FOLDER, CLAIMS_FOLDER = "_commits", "_claims"


class PartFileEntry(TypedDict):
    """The entry of a part file (a Parquet file with rows of the category) in a commit.

    Attributes:
        name: file name in the folder of the category.
        row_group_rows: number of rows in each row group. A row group is the smallest block of rows that Parquet reads at once.
        num_bytes: size of the file.
    """

    name: str
    row_group_rows: list[int]
    num_bytes: int


class ChecksummedFileEntry(TypedDict):
    """The entry of a file with a checksum in a commit. The index file and the source manifest have such entries.

    The index file contains all columns except images and masks. The source manifest lists the source files of the rows.
    """

    name: str
    sha256: str  # hex digest of the file's bytes


class DroppedFileEntry(TypedDict):
    """The entry of a file that only earlier versions of the category use. It stays for a day, for readers of these versions."""

    name: str
    at: str  # time when it was dropped, ISO 8601, UTC


class Commit(TypedDict):
    """The description of one version of a category: the content of `_commit.json` and of `_commits/<run_id>.json`."""

    schema_version: int
    category: str
    run_id: str  # name of the version
    created: str  # ISO 8601, UTC
    files: list[PartFileEntry]
    index: ChecksummedFileEntry | None
    sources: ChecksummedFileEntry | None  # the source manifest: the source files of the rows
    dropped: list[DroppedFileEntry]  # kept on the storage for readers of earlier versions
    num_rows: int
    source_fingerprint: str
    counts: dict[str, int]  # the counts of `CategoryReport`


def parse_commit(data: bytes, uri: str, category: str, path: str) -> Commit:
    """Parses the bytes of a commit file, and adds the entries that old commit files lack.

    Args:
        data: the bytes of the file.
        uri: root of the data set, for error messages.
        category: name of the category, for error messages.
        path: path of the commit file, for error messages.

    Raises: DataError: the file is damaged, or has another schema version than this program.
    """
    try:
        commit = json.loads(data)
        version = commit["schema_version"]
        if version == SCHEMA_VERSION:
            for key in ("files", "run_id", "num_rows", "source_fingerprint", "counts"):
                commit[key]
            for key in ("index", "sources"):
                if commit.setdefault(key, None) is not None:
                    commit[key]["name"], commit[key]["sha256"]
            commit.setdefault("dropped", [])
            for name in list_referenced_files(cast(Commit, commit)):
                if not isinstance(name, str) or name in ("", "..") or "/" in name or "\\" in name:
                    raise ValueError(f"{name!r} is no file of the category's folder")
    except (ValueError, KeyError, TypeError) as error:
        problem = f"not a commit file ({error}): remove it and ingest the category again"
        raise DataError(f"{uri}: {path}: {problem}") from error
    if version != SCHEMA_VERSION:
        remedy = "ingest it again into another root, or use the version of focus_ray that wrote it"
        versions = f"schema version {version!r}, this program reads {SCHEMA_VERSION}"
        raise DataError(f"{uri}: category {category!r} has {versions}: {remedy}")
    return cast(Commit, commit)


def list_referenced_files(commit: Commit) -> set[str]:
    """Returns the names of the files that a commit uses: its part files, its index file and its source manifest."""
    objects = (commit["index"], commit["sources"])
    return {entry["name"] for entry in commit["files"]} | {entry["name"] for entry in objects if entry}


def list_dropped_files(previous: Commit, commit: Commit, now: datetime) -> list[DroppedFileEntry]:
    """Returns the files of earlier versions that must stay for their readers, the `dropped` list of a new commit.

    These are the dropped files of the previous commit that are younger than `STALE_AFTER`, and the files that the new commit no
    longer uses.

    Args:
        previous: the commit that the new commit replaces.
        commit: the new commit.
        now: current time, UTC.
    """
    recent = [entry for entry in previous["dropped"] if datetime.fromisoformat(entry["at"]) >= now - STALE_AFTER]
    newly_dropped = sorted(list_referenced_files(previous) - list_referenced_files(commit))
    return recent + [{"name": name, "at": now.isoformat()} for name in newly_dropped]


def find_stale_files(files: Mapping[str, fs.FileInfo], commit: Commit, now: datetime) -> list[str]:
    """Returns the files of a category that can be deleted, because no process can still read or write them.

    Args:
        files: path relative to the folder of the category -> file information.
        commit: the current commit.
        now: current time, UTC.

    Returns:
        Paths relative to the folder of the category. Files with unknown names are never in the list.
    """
    limit = now - STALE_AFTER
    used_names = list_referenced_files(commit) | {
        entry["name"] for entry in commit["dropped"] if datetime.fromisoformat(entry["at"]) >= limit
    }
    names = {path: path.rpartition("/")[2] for path in files}
    prefixes = ("part-", "_index-", "_sources-", ".tmp-", "after-")
    unused = [path for path, name in names.items() if name.startswith(prefixes) and path not in used_names]
    stale = [path for path in unused if files[path].mtime < limit and names[path] != f"after-{commit['run_id']}"]
    # A version is replaced when the next younger version is written. It is stale when the younger version is old enough.
    versions = sorted((info.mtime, path) for path, info in files.items() if path.startswith(f"{VERSIONS_FOLDER}/"))
    replaced = [path for (_, path), (replaced_at, _) in pairwise(versions) if replaced_at < limit]
    return stale + [path for path in replaced if names[path] != f"{commit['run_id']}.json"]
