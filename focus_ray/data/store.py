"""The Parquet data set: its schema, importers of the field's folder shapes, and readers of what was committed.

One category is one folder, ``<root>/category=<name>/``, with part files, an index of their light columns, and
``_commit.json``, which names the files that count. It is replaced as a whole, so a reader sees the old data or the new
and never a mixture; a run that dies leaves the old. Every commit is kept beside, ``_commits/<run_id>.json``: a version that
was replaced stays readable, with its files, for a day. docs/DATA.md has the schema, the folder shapes and what becomes of odd
files.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TypedDict, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from focus_ray.data.schema import COMMIT_NAME, INDEX_COLUMNS, SCHEMA, SCHEMA_VERSION, Reject, Row
from focus_ray.errors import DataError
from focus_ray.storage import open_filesystem, open_input, read_file, storage_errors, sync_file, write_file

# A row group is what a reader must hold: it closes at 256 rows, or from 64 rows on at 16 MiB, or at 64 MiB in any case.
MAX_ROW_GROUP_ROWS, MIN_ROW_GROUP_ROWS = 256, 64
ROW_GROUP_BYTES, MAX_ROW_GROUP_BYTES = 16 << 20, 64 << 20
FILE_BYTES = 64 << 20  # a part file takes no more row groups from here on
# A version that was replaced stays this long for those who read it. Files that no commit names are leftovers of a dead run once
# they are as old: a younger one may belong to a run that is just writing it.
STALE_AFTER = timedelta(hours=24)
VERSIONS = "_commits"  # in a category's folder


class PartEntry(TypedDict):
    """A part file as its commit names it."""

    name: str
    row_group_rows: list[int]
    num_bytes: int


class IndexEntry(TypedDict):
    """The object with the light columns of all rows, as its commit names it."""

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
    dropped: list[DroppedEntry]  # still there for readers of former versions
    num_rows: int
    source_fingerprint: str
    counts: dict[str, int]  # of `CategoryReport`


class Store:
    """A data set's root: commits, part files and rejects on a local or S3 filesystem."""

    def __init__(self, uri: str, filesystem: fs.FileSystem, path: str) -> None:
        self.uri, self.filesystem, self.path = uri, filesystem, path
        self._writable = False

    def folder(self, category: str) -> str:
        return f"{self.path}/category={category}"

    def errors(self, action: str, path: str) -> Any:
        return storage_errors(action, self.uri, path)

    def categories(self) -> list[str]:
        """Names of the committed categories, sorted; empty where there is no data set."""
        with self.errors("list the data set", self.path):
            found = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
            names = [
                info.base_name[len("category=") :]
                for info in found
                if info.type == fs.FileType.Directory and info.base_name.startswith("category=")
            ]
            commits = self.filesystem.get_file_info([f"{self.folder(name)}/{COMMIT_NAME}" for name in names])
        return sorted(name for name, info in zip(names, commits, strict=True) if info.type == fs.FileType.File)

    def commit(self, category: str, version: str | None = None) -> Commit | None:
        """The category's commit; None where it has none.

        Args: version: the `run_id` of a commit; None takes the current one.

        Raises: DataError: damaged, or of another schema version; the version is gone.
        """
        path = f"{self.folder(category)}/{COMMIT_NAME}"
        if version is None:
            return self._read_commit(category, path)
        kept = self._read_commit(category, self._version_path(category, version))
        if kept is not None:
            return kept
        current = self._read_commit(category, path)
        if current is not None and current["run_id"] == version:  # published by a program that kept no versions
            return current
        there = f"it is now {current['run_id']}" if current else "the category is not there any more"
        raise DataError(
            f"{self.uri}: category {category!r} has no version {version!r}: {there}. A version that was replaced stays for "
            f"{STALE_AFTER.total_seconds() / 3600:g} hours: read the index again and start over"
        )

    def _version_path(self, category: str, version: str) -> str:
        if not version.isalnum():
            raise DataError(f"{self.uri}: version {version!r}: expected one that `data_version` gave")
        return f"{self.folder(category)}/{VERSIONS}/{version}.json"

    def _read_commit(self, category: str, path: str) -> Commit | None:
        with self.errors("read the commit file", path):
            data = read_file(self.filesystem, path)
        if data is None:
            return None
        try:
            commit = json.loads(data)
            version = commit["schema_version"]
            if version == SCHEMA_VERSION:
                for key in ("files", "run_id", "num_rows", "source_fingerprint", "counts"):
                    commit[key]
                if commit.setdefault("index", None) is not None:
                    commit["index"]["name"], commit["index"]["sha256"]
                commit.setdefault("dropped", [])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.uri}: {path}: not a commit file ({error}): remove it and ingest again") from error
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{self.uri}: category {category!r} has schema version {version!r}, this program reads "
                f"{SCHEMA_VERSION}: ingest it again into another root, or use the version that wrote it"
            )
        return cast(Commit, commit)

    def need_commit(self, category: str, version: str | None = None) -> Commit:
        """`commit`. Raises: DataError: there is none."""
        commit = self.commit(category, version)
        if commit is None:
            names = self.categories()
            if not names:
                raise DataError(
                    f"{self.uri}: no data set here: expected folders category=<name> with a {COMMIT_NAME}; ingest one "
                    f"first"
                )
            raise DataError(f"{self.uri}: no category {category!r}; there are: {', '.join(names)}")
        return commit

    def is_whole(self, category: str, commit: Commit) -> bool:
        """Whether every part file that a commit names is there, at its size, and its index, byte for byte."""
        paths = [f"{self.folder(category)}/{entry['name']}" for entry in commit["files"]]
        with self.errors("look at part files", self.folder(category)):
            found = self.filesystem.get_file_info(paths)
        if [info.size for info in found] != [entry["num_bytes"] for entry in commit["files"]]:
            return False
        return commit["index"] is None or self._index_bytes(category, commit["index"]) is not None

    def index(self, category: str, commit: Commit) -> pa.Table | None:
        """``INDEX_COLUMNS`` of all rows, in row order; None where the commit names no index.

        Raises: DataError: the index is gone or not what was written.
        """
        entry = commit["index"]
        if entry is None:
            return None
        data = self._index_bytes(category, entry)
        if data is None:
            # The parts would give the same table, but a store that lost or changed one file that a commit names is to be
            # mended, and of a large set they take many minutes that nobody expects.
            raise DataError(
                f"{self.uri}: index {self.folder(category)}/{entry['name']} is missing or damaged. If the category was "
                "ingested again meanwhile, start over; otherwise ingest it again"
            )
        return pq.read_table(pa.BufferReader(data))

    def _index_bytes(self, category: str, entry: IndexEntry) -> bytes | None:
        """None where the file is missing or has other bytes than were written."""
        path = f"{self.folder(category)}/{entry['name']}"
        with self.errors("read the index", path):
            data = read_file(self.filesystem, path)
        return data if data is not None and hashlib.sha256(data).hexdigest() == entry["sha256"] else None

    def check_writable(self) -> None:
        """Finds out before the decoding, not after, that nothing may be written."""
        if not self._writable:
            path = f"{self.path}/_write_check-{uuid.uuid4().hex}"
            with self.errors("write", path):
                write_file(self.filesystem, path, b"focus_ray")
                self.filesystem.delete_file(path)
            self._writable = True

    def publish(
        self,
        category: str,
        rows: Iterable[Row],
        rejects: Sequence[Reject],
        source_fingerprint: str,
        counts: dict[str, int],
    ) -> None:
        """Writes part files and index, then the commit that makes them count, then removes those that no longer do."""
        folder, run_id = self.folder(category), uuid.uuid4().hex[:12]
        if isinstance(self.filesystem, fs.LocalFileSystem):
            with self.errors("make the folder", folder):
                self.filesystem.create_dir(folder, recursive=True)
        files: list[PartEntry] = []
        light: list[pa.Table] = []

        def noted() -> Iterator[pa.Table]:
            for group in _row_groups(rows):
                light.append(group.select(INDEX_COLUMNS))
                yield group

        # Named by its run, as parts are: a name by content alone could be another run's too, which may just remove it.
        index: IndexEntry = {"name": f"_index-{run_id}.parquet", "sha256": ""}
        try:
            groups = noted()
            for group in groups:
                name = f"part-{run_id}-{len(files):05d}.parquet"
                files.append({"name": name, "row_group_rows": [], "num_bytes": 0})
                with self.errors("write a part file", f"{folder}/{name}"):
                    self._write_part(f"{folder}/{name}", itertools.chain([group], groups), files[-1])
            with self.errors("write the index", f"{folder}/{index['name']}"):
                index["sha256"] = self._write_index(f"{folder}/{index['name']}", pa.concat_tables(light))
        except BaseException:
            self._remove(f"{folder}/{item['name']}" for item in [*files, index])
            raise
        former = self.commit(category)
        self.write_rejects(category, rejects)
        now = datetime.now(timezone.utc)
        commit: Commit = {
            "schema_version": SCHEMA_VERSION,
            "category": category,
            "run_id": run_id,
            "created": now.isoformat(timespec="seconds"),
            "files": files,
            "index": index,
            "dropped": [],
            "num_rows": sum(sum(item["row_group_rows"]) for item in files),
            "source_fingerprint": source_fingerprint,
            "counts": counts,
        }
        self._make_current(commit, former, now)

    def _make_current(self, commit: Commit, former: Commit | None, now: datetime) -> None:
        """Writes the commit, as a version and as the current one, then removes what has been replaced for long enough."""
        category, folder = commit["category"], self.folder(commit["category"])
        limit = now - STALE_AFTER
        if former:
            gone = sorted(_named(former) - _named(commit))
            commit["dropped"] = [item for item in former["dropped"] if _when(item) >= limit]
            commit["dropped"] += [{"name": name, "at": now.isoformat()} for name in gone]
        with self.errors("list the category's files", folder):
            found = self.filesystem.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
        there = {info.path[len(folder) + 1 :]: info for info in found if info.is_file}
        versions = [commit]
        if former and f"{VERSIONS}/{former['run_id']}.json" not in there:  # by a program that kept no versions
            versions.append(former)
        # From here on parts and index stay whatever happens: a commit whose answer was lost may still have been made.
        places = [(self._version_path(category, item["run_id"]), item) for item in versions]
        for path, item in [*places, (f"{folder}/{COMMIT_NAME}", commit)]:
            with self.errors("write the commit file", path):
                write_file(self.filesystem, path, json.dumps(item, indent=1).encode())
        kept = {former["run_id"] if former else "", commit["run_id"]}
        self._remove(f"{folder}/{name}" for name in _stale(there, commit, kept, limit))

    def _write_part(self, path: str, groups: Iterator[pa.Table], entry: PartEntry) -> None:
        num_bytes = 0
        with (
            self.filesystem.open_output_stream(path) as sink,
            pq.ParquetWriter(
                sink,
                SCHEMA,
                compression="none",  # the images are compressed already
                use_dictionary=["category", "split", "defect_type", "site"],
                write_statistics=["id", "split", "label"],
            ) as writer,
        ):
            for group in groups:
                writer.write_table(group, row_group_size=group.num_rows)
                entry["row_group_rows"].append(group.num_rows)
                num_bytes += group.nbytes
                if num_bytes >= FILE_BYTES:
                    break
        sync_file(self.filesystem, path)
        entry["num_bytes"] = self.filesystem.get_file_info(path).size

    def _write_index(self, path: str, table: pa.Table) -> str:
        """Returns: SHA-256 hex of the file's bytes."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        write_file(self.filesystem, path, data)
        return hashlib.sha256(data).hexdigest()

    def _remove(self, paths: Iterable[str]) -> None:
        for path in paths:
            try:
                self.filesystem.delete_file(path)
            except OSError:  # an unnamed file harms nobody, and the next run tries again
                continue

    def write_rejects(self, category: str, rejects: Sequence[Reject]) -> None:
        path = self._rejects_path(category)
        with self.errors("write the rejects", path):
            if rejects:
                columns = {
                    name: [getattr(item, name) for item in rejects] for name in ("path", "category", "reason", "detail")
                }
                sink = pa.BufferOutputStream()
                pq.write_table(pa.table(columns), sink)
                write_file(self.filesystem, path, sink.getvalue().to_pybytes())
            elif self.filesystem.get_file_info(path).type == fs.FileType.File:
                self.filesystem.delete_file(path)

    def rejects(self, category: str) -> list[Reject]:
        path = self._rejects_path(category)
        with self.errors("read the rejects", path):
            data = read_file(self.filesystem, path)
        return [Reject(**row) for row in pq.read_table(pa.BufferReader(data)).to_pylist()] if data else []

    def _rejects_path(self, category: str) -> str:
        return f"{self.path}/_rejects/category={category}.parquet"


def _named(commit: Commit) -> set[str]:
    """Names of the files that count."""
    return {item["name"] for item in [*commit["files"], *([commit["index"]] if commit["index"] else [])]}


def _when(item: DroppedEntry) -> datetime:
    return datetime.fromisoformat(item["at"])


def _stale(there: dict[str, fs.FileInfo], commit: Commit, kept: set[str], limit: datetime) -> list[str]:
    """Which of the files that are there nobody can be reading or writing any more: path in the category's folder.

    Args: there: as they were before the commit.  kept: versions that stay in any case: the current and the last one.
    """
    named = _named(commit) | {item["name"] for item in commit["dropped"]}
    leftovers = [
        path
        for path, info in there.items()
        if path.rpartition("/")[2].startswith(("part-", "_index-", ".tmp-"))
        and path not in named
        and info.mtime < limit
    ]
    # a version is replaced by the next younger one: it goes when that one is old enough
    versions = sorted((info.mtime, path) for path, info in there.items() if path.startswith(f"{VERSIONS}/"))
    replaced = [path for (_, path), (at, _) in itertools.pairwise(versions) if at < limit]
    return leftovers + [path for path in replaced if path.rpartition("/")[2].removesuffix(".json") not in kept]


def _row_groups(rows: Iterable[Row]) -> Iterator[pa.Table]:
    pending: list[Row] = []
    num_bytes = 0
    for row in rows:
        pending.append(row)
        num_bytes += len(row["image"]) + len(row["mask"] or b"")
        full = len(pending) >= MAX_ROW_GROUP_ROWS or num_bytes >= MAX_ROW_GROUP_BYTES
        if full or (len(pending) >= MIN_ROW_GROUP_ROWS and num_bytes >= ROW_GROUP_BYTES):
            yield pa.Table.from_pylist(pending, schema=SCHEMA)
            pending, num_bytes = [], 0
    if pending:
        yield pa.Table.from_pylist(pending, schema=SCHEMA)


def open_store(uri: str | Path) -> Store:
    filesystem, path = open_filesystem(uri)
    return Store(str(uri), filesystem, path)


@contextmanager
def open_part(store: Store, category: str, entry: PartEntry) -> Iterator[pq.ParquetFile]:
    """One part file, checked against its commit; what goes wrong while it is open becomes a DataError."""
    path = f"{store.folder(category)}/{entry['name']}"
    try:
        with (
            storage_errors("read a part file", store.uri, path),
            open_input(store.filesystem, path) as stream,
            pq.ParquetFile(stream) as part,
        ):
            version = (part.schema_arrow.metadata or {}).get(b"focus_ray.schema_version")
            if version != str(SCHEMA_VERSION).encode() or part.metadata.num_rows != sum(entry["row_group_rows"]):
                raise pa.ArrowInvalid(f"schema version {version!r}, {part.metadata.num_rows} rows")
            yield part
    except pa.ArrowException as error:
        raise DataError(
            f"{store.uri}: part file {path} is damaged ({error}): remove the category's {COMMIT_NAME} and ingest it "
            "again"
        ) from error
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DataError(
                f"{error}. If the category was ingested again meanwhile, start over; otherwise ingest it again"
            ) from error
        raise
