"""What a commit says, and which files of a category nobody can be using any more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from itertools import pairwise
from typing import TypedDict, cast

from pyarrow import fs

from focus_ray.data.schema import SCHEMA_VERSION
from focus_ray.errors import DataError

# A version that was replaced stays this long for those who read it. Files that no commit names are leftovers of a dead run once
# they are as old: a younger one may belong to a run that is just writing it.
STALE_AFTER = timedelta(hours=24)
# in a category's folder: the versions, and of each which one came after it
VERSIONS, CLAIMS = "_commits", "_claims"


class PartEntry(TypedDict):
    """A part file as its commit names it."""

    name: str
    row_group_rows: list[int]
    num_bytes: int


class IndexEntry(TypedDict):
    """The object with the light columns of all rows, or with the sources, as its commit names it."""

    name: str
    sha256: str  # of its bytes


class DroppedEntry(TypedDict):
    """A file of a former version that the commit no longer names, and since when."""

    name: str
    at: str  # ISO 8601, UTC


class Commit(TypedDict):
    """What `_commit.json` and `_commits/<run_id>.json` hold."""

    schema_version: int
    category: str
    run_id: str  # the version's name
    created: str  # ISO 8601, UTC
    files: list[PartEntry]
    index: IndexEntry | None
    sources: IndexEntry | None  # what is known of the files that the rows came from
    dropped: list[DroppedEntry]  # still there for readers of former versions
    num_rows: int
    source_fingerprint: str
    counts: dict[str, int]  # of `CategoryReport`


def parse_commit(data: bytes, uri: str, category: str, path: str) -> Commit:
    """Raises: DataError: damaged, or of another schema version."""
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
            for name in named(cast(Commit, commit)):
                if not isinstance(name, str) or name in ("", "..") or "/" in name or "\\" in name:
                    raise ValueError(f"{name!r} is no file of the category's folder")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{uri}: {path}: not a commit file ({error}): remove it and ingest again") from error
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{uri}: category {category!r} has schema version {version!r}, this program reads {SCHEMA_VERSION}: ingest it "
            "again into another root, or use the version that wrote it"
        )
    return cast(Commit, commit)


def named(commit: Commit) -> set[str]:
    """Names of the files that count."""
    objects = (commit["index"], commit["sources"])
    return {item["name"] for item in commit["files"]} | {item["name"] for item in objects if item}


def dropped_after(former: Commit, commit: Commit, now: datetime) -> list[DroppedEntry]:
    """What a commit's `dropped` holds: of the former's what is younger than `STALE_AFTER`, and what it no longer names."""
    kept = [item for item in former["dropped"] if datetime.fromisoformat(item["at"]) >= now - STALE_AFTER]
    gone = sorted(named(former) - named(commit))
    return kept + [{"name": name, "at": now.isoformat()} for name in gone]


def stale(there: Mapping[str, fs.FileInfo], commit: Commit, now: datetime) -> list[str]:
    """Which of the files that are there nobody can be reading or writing: path in the category's folder.

    Args: there: as they are.  commit: the current one.
    """
    limit = now - STALE_AFTER
    kept = named(commit) | {item["name"] for item in commit["dropped"] if datetime.fromisoformat(item["at"]) >= limit}
    names = {path: path.rpartition("/")[2] for path in there}
    starts = ("part-", "_index-", "_sources-", ".tmp-", "after-")
    found = [path for path, name in names.items() if name.startswith(starts) and path not in kept]
    found = [path for path in found if there[path].mtime < limit and names[path] != f"after-{commit['run_id']}"]
    # a version is replaced by the next younger one: it goes when that one is old enough
    versions = sorted((info.mtime, path) for path, info in there.items() if path.startswith(f"{VERSIONS}/"))
    replaced = [path for (_, path), (at, _) in pairwise(versions) if at < limit]
    return found + [path for path in replaced if names[path] != f"{commit['run_id']}.json"]
