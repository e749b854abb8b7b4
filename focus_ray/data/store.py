"""The Parquet data set: its schema, importers of the field's folder shapes, and readers of what was committed.

One category is one folder, ``<root>/category=<name>/``, with part files, an index of their light columns, and
``_commit.json``, which names the files that count. It is replaced as a whole, so a reader sees the old data or the new
and never a mixture; a run that dies leaves the old. Every commit is kept beside, ``_commits/<run_id>.json``: a version that
was replaced stays readable, with its files, for a day. docs/use/data.md has the schema, the folder shapes and what becomes of odd
files.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from focus_ray.data.commits import (
    CLAIMS,
    STALE_AFTER,
    VERSIONS,
    Commit,
    IndexEntry,
    PartEntry,
    dropped_after,
    named,
    parse_commit,
    stale,
)
from focus_ray.data.schema import (
    COMMIT_NAME,
    INDEX_COLUMNS,
    INDEX_SCHEMA,
    SCHEMA,
    SCHEMA_VERSION,
    Reject,
    Row,
    with_groups,
)
from focus_ray.errors import DataError, StorageError
from focus_ray.storage import (
    create_bytes,
    join,
    open_filesystem,
    open_input,
    read_file,
    storage_errors,
    sync_file,
    write_file,
)

# A row group is what a reader must hold: it closes at 256 rows, or from 64 rows on at 16 MiB, or at 64 MiB in any case.
MAX_ROW_GROUP_ROWS, MIN_ROW_GROUP_ROWS = 256, 64
ROW_GROUP_BYTES, MAX_ROW_GROUP_BYTES = 16 << 20, 64 << 20
FILE_BYTES = 64 << 20  # a part file takes no more row groups from here on
# A publisher that another one has overtaken builds on what that one made, this often.
ATTEMPTS = 20
# of an OSError: the file system has no hard links
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass
class Draft:
    """What a publication makes of a category.

    index: of `INDEX_COLUMNS`, in row order.  sources: of `SOURCE_COLUMNS`; None keeps nothing of them.
    rejects: to be kept beside; None leaves those that are.  fresh: part files made for this draft alone, which go if it does
    not become a version.
    """

    files: list[PartEntry]
    index: pa.Table
    sources: pa.Table | None
    source_fingerprint: str
    counts: dict[str, int]
    rejects: Sequence[Reject] | None = None
    fresh: list[str] = field(default_factory=list)


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
        return parse_commit(data, self.uri, category, path)

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
        sizes = {path: info.size for path, info in self.files(category).items()}
        if any(sizes.get(entry["name"]) != entry["num_bytes"] for entry in commit["files"]):
            return False
        return commit["index"] is None or self._object_bytes(category, commit["index"]) is not None

    def files(self, category: str) -> dict[str, fs.FileInfo]:
        """Everything in the category's folder and below, by its path there; on S3 a request a thousand files."""
        folder = self.folder(category)
        with self.errors("list the category's files", folder):
            found = self.filesystem.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
        return {info.path[len(folder) + 1 :]: info for info in found if info.is_file}

    def index(self, category: str, commit: Commit) -> pa.Table | None:
        """``INDEX_COLUMNS`` of all rows, in row order; None where the commit names no index.

        Raises: DataError: the index is gone or not what was written.
        """
        entry = commit["index"]
        if entry is None:
            return None
        data = self._object_bytes(category, entry)
        if data is None:
            # The parts would give the same table, but a store that lost or changed one file that a commit names is to be
            # mended, and of a large set they take many minutes that nobody expects.
            raise DataError(
                f"{self.uri}: index {self.folder(category)}/{entry['name']} is missing or damaged. If the category was "
                "ingested again meanwhile, start over; otherwise ingest it again"
            )
        return with_groups(pq.read_table(pa.BufferReader(data)))

    def sources(self, category: str, commit: Commit) -> pa.Table | None:
        """`SOURCE_COLUMNS` of the files that were read; None where they are not known."""
        entry = commit["sources"]
        data = self._object_bytes(category, entry) if entry else None
        return None if data is None else pq.read_table(pa.BufferReader(data))

    def _object_bytes(self, category: str, entry: IndexEntry) -> bytes | None:
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

    def write_parts(self, category: str, rows: Iterable[Row]) -> tuple[list[PartEntry], pa.Table]:
        """Writes part files under names that no other run has; they count once a commit names them.

        Returns: the files, and `INDEX_COLUMNS` of their rows.
        """
        folder, token = self.folder(category), uuid.uuid4().hex[:12]
        if isinstance(self.filesystem, fs.LocalFileSystem):
            with self.errors("make the folder", folder):
                self.filesystem.create_dir(folder, recursive=True)
        files: list[PartEntry] = []
        light: list[pa.Table] = []

        def noted() -> Iterator[pa.Table]:
            for group in _row_groups(rows):
                light.append(group.select(INDEX_COLUMNS))
                yield group

        try:
            groups = noted()
            for group in groups:
                name = f"part-{token}-{len(files):05d}.parquet"
                files.append({"name": name, "row_group_rows": [], "num_bytes": 0})
                with self.errors("write a part file", f"{folder}/{name}"):
                    self._write_part(f"{folder}/{name}", itertools.chain([group], groups), files[-1])
        except BaseException:
            self.discard(category, [item["name"] for item in files])
            raise
        return files, pa.concat_tables(light) if light else INDEX_SCHEMA.empty_table()

    def publish(
        self, category: str, build: Callable[[Commit | None], Draft | None], made: Sequence[PartEntry] = ()
    ) -> bool:
        """Makes a new version of a category: what `build` makes of the current one.

        Of several publishers at once each comes after another: one that was overtaken calls `build` again, with what the
        other made.

        Args:
            build: the current commit, or None -> the draft; None where there is nothing to change.
            made: part files that were written for it; they are removed where nothing comes of it.

        Returns: whether there was anything to change.

        Raises: DataError: the storage fails, or others kept coming first.
        """
        fresh = [entry["name"] for entry in made]
        try:
            for _ in range(ATTEMPTS):
                former = self.commit(category)
                draft = build(former)
                if draft is None:
                    self.discard(category, fresh)
                    return False
                fresh += draft.fresh
                commit, there = self._prepare(category, draft, former, fresh)
                if former is None or self._claim(category, former["run_id"], commit["run_id"]):
                    break
                self.discard(category, fresh[len(made) :])
                del fresh[len(made) :]
                self._make_last_current(category, former)
            else:
                raise DataError(
                    f"{self.uri}: category {category!r}: other runs kept publishing first: run it again when they are done"
                )
        except BaseException:
            self.discard(category, fresh)
            raise
        # from here on its files stay whatever happens: a commit whose answer was lost may still have been made
        self._make_current(commit)
        self._make_last_current(category, commit)
        unused = {entry["name"] for entry in made} - named(commit)
        self.discard(category, [*unused, *stale(there, commit, datetime.now(timezone.utc))])
        return True

    def _prepare(
        self, category: str, draft: Draft, former: Commit | None, fresh: list[str]
    ) -> tuple[Commit, dict[str, fs.FileInfo]]:
        """Writes all of a version but what makes it count.

        Args: fresh: takes the names of the files written.

        Returns: the commit, and the files that were there before.
        """
        folder, run_id = self.folder(category), uuid.uuid4().hex[:12]
        # Named by the run: a name by content alone could be another run's too, which may just remove it.
        objects: dict[str, IndexEntry | None] = {}
        for kind, table in (("index", draft.index), ("sources", draft.sources)):
            objects[kind] = None
            if table is not None:
                name = f"_{kind}-{run_id}.parquet"
                fresh.append(name)
                with self.errors(f"write the {kind}", f"{folder}/{name}"):
                    objects[kind] = {"name": name, "sha256": self._write_table(f"{folder}/{name}", table)}
        if draft.rejects is not None:
            self.write_rejects(category, draft.rejects)
        now = datetime.now(timezone.utc)
        commit: Commit = {
            "schema_version": SCHEMA_VERSION,
            "category": category,
            "run_id": run_id,
            "created": now.isoformat(timespec="seconds"),
            "files": draft.files,
            "index": objects["index"],
            "sources": objects["sources"],
            "dropped": [],
            "num_rows": sum(sum(item["row_group_rows"]) for item in draft.files),
            "source_fingerprint": draft.source_fingerprint,
            "counts": draft.counts,
        }
        there = self.files(category)
        lost = sorted({entry["name"] for entry in draft.files} - set(there))
        if lost:
            raise DataError(
                f"{self.uri}: {len(lost)} part files of category {category!r} are not there, {lost[0]} first. Those of a run of "
                f"more than {STALE_AFTER.total_seconds() / 3600:g} hours may have been taken for leftovers: run it again; "
                "if they are of what was there before, ingest the category again without appending"
            )
        if former:
            commit["dropped"] = dropped_after(former, commit, now)
            if f"{VERSIONS}/{former['run_id']}.json" not in there:  # by a program that kept no versions
                self._write_commit(self._version_path(category, former["run_id"]), former)
        fresh.append(f"{VERSIONS}/{run_id}.json")
        self._write_commit(self._version_path(category, run_id), commit)
        return commit, there

    def _write_commit(self, path: str, commit: Commit) -> None:
        with self.errors("write the commit file", path):
            write_file(self.filesystem, path, json.dumps(commit, indent=1).encode())

    def _make_current(self, commit: Commit) -> None:
        self._write_commit(f"{self.folder(commit['category'])}/{COMMIT_NAME}", commit)

    def _claim(self, category: str, former: str, run_id: str) -> bool:
        """Whether this version is the one that comes after the former: of several, one is."""
        place = join(self.uri, f"category={category}", CLAIMS, f"after-{former}")
        try:
            return create_bytes(place, run_id.encode())
        except StorageError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in _NO_LINKS:
                return True  # the last to write then wins
            raise

    def _make_last_current(self, category: str, commit: Commit) -> None:
        """Makes the last of the versions that came after a commit current: its publisher may have died before it could."""
        while True:
            path = f"{self.folder(category)}/{CLAIMS}/after-{commit['run_id']}"
            with self.errors("read which version came after", path):
                found = read_file(self.filesystem, path)
            if found is None:
                return
            commit = self.need_commit(category, found.decode())
            self._make_current(commit)

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

    def _write_table(self, path: str, table: pa.Table) -> str:
        """Returns: SHA-256 hex of the file's bytes."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        write_file(self.filesystem, path, data)
        return hashlib.sha256(data).hexdigest()

    def discard(self, category: str, names: Iterable[str]) -> None:
        """Removes files of a category that no commit names."""
        for name in names:
            try:
                self.filesystem.delete_file(f"{self.folder(category)}/{name}")
            except OSError:  # an unnamed file harms nobody, and a later run tries again
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


def read_columns(part: pq.ParquetFile, columns: Sequence[str], group: int | None = None) -> pa.Table:
    """Returns columns of a part file, or of one of its row groups. A column that the file lacks is filled by `with_groups`."""
    there = [name for name in columns if name in part.schema_arrow.names]
    if there == list(columns):
        return part.read(columns=there) if group is None else part.read_row_group(group, columns=there)
    if not there:  # a table without columns has no rows to be filled
        there = ["label"]
    table = part.read(columns=there) if group is None else part.read_row_group(group, columns=there)
    return with_groups(table).select(columns)


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
