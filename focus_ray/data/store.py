"""Stores a data set as Parquet files, and publishes new versions of its categories atomically.

A category is a folder, ``<root>/category=<name>/``, with part files (the rows), an index file (all columns except images and
masks) and ``_commit.json``, which names the files of the current version. Replacing ``_commit.json`` publishes a version, so a
reader sees the old or the new version and never a mixture. If a writer dies, the old version stays. Every commit is also stored
as ``_commits/<run_id>.json``: a replaced version stays readable, with its files, for a day. docs/use/data.md describes the
schema, the folder layouts and the handling of unusual files.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from focus_ray.data.commits import (
    CLAIMS_FOLDER,
    STALE_AFTER,
    VERSIONS_FOLDER,
    ChecksummedFileEntry,
    Commit,
    PartFileEntry,
    find_stale_files,
    list_dropped_files,
    list_referenced_files,
    parse_commit,
)
from focus_ray.data.schema import (
    COMMIT_NAME,
    INDEX_COLUMNS,
    INDEX_SCHEMA,
    SCHEMA,
    SCHEMA_VERSION,
    RejectedFile,
    Row,
    add_missing_group_column,
)
from focus_ray.errors import DataError, StorageError
from focus_ray.storage.files import (
    check_folder_access,
    explain_storage_errors,
    join_path,
    open_file_for_reading,
    open_filesystem,
    read_file,
    read_stats_in_subfolders,
    sync_file_to_disk,
    write_bytes_if_absent,
    write_file,
)

# A reader must hold a complete row group in memory. A row group is closed at 256 rows, at 16 MiB if it has at least 64 rows, and
# at 64 MiB in any case.
MAX_ROW_GROUP_ROWS, MIN_ROW_GROUP_ROWS = 256, 64
ROW_GROUP_BYTES, MAX_ROW_GROUP_BYTES = 16 << 20, 64 << 20
FILE_BYTES = 64 << 20  # a part file of at least this size gets no further row groups
# A publisher rebuilds its version on top of the version of another publisher that came first, at most this many times.
MAX_PUBLISH_ATTEMPTS = 20
# error numbers of file systems without hard links
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_CHANGED_MEANWHILE = "If the category was ingested again meanwhile, start over; otherwise ingest it again"


@dataclass
class CommitDraft:
    """The content of a new version of a category before the version is published.

    Attributes:
        files: entries of the part files, which contain the rows.
        index: table of all rows, with `INDEX_COLUMNS`, in row order.
        sources: the source manifest (list of the source files), of `SOURCE_SCHEMA`; None stores no manifest.
        source_fingerprint: fingerprint of the source, to recognise an unchanged source.
        counts: the row counts of `CategoryReport`.
        rejects: the rejected files to store beside the data; None keeps the stored rejects.
    """

    files: list[PartFileEntry]
    index: pa.Table
    sources: pa.Table | None
    source_fingerprint: str
    counts: dict[str, int]
    rejects: Sequence[RejectedFile] | None = None


class DataSetStore:
    """Reads and writes the files of a data set, on a disk or on S3: its commits (lists of a version's files), rows and rejects.

    Attributes:
        uri: root of the data set.
        filesystem: the disk or S3.
        path: the root inside `filesystem`.
    """

    def __init__(self, uri: str, filesystem: fs.FileSystem, path: str) -> None:
        self.uri, self.filesystem, self.path = uri, filesystem, path
        self._writable = False

    def get_category_folder(self, category: str) -> str:
        """Returns the path of the folder of a category, inside the filesystem of the store."""
        return f"{self.path}/category={category}"

    def explain_storage_errors(self, action: str, path: str) -> Any:
        """Returns a context manager that turns an OSError into a StorageError with the location of this data set.

        Args: action, path: see `storage.files.explain_storage_errors`.
        """
        return explain_storage_errors(action, self.uri, path)

    def list_committed_categories(self) -> list[str]:
        """Returns the sorted names of all categories that have a published version; an empty list if there is no data set.

        Raises: DataError: the root cannot be listed.
        """
        # one listing on S3, whatever the number of categories
        folders = read_stats_in_subfolders(self.uri, COMMIT_NAME)
        return sorted(folder[len("category=") :] for folder in folders if folder.startswith("category="))

    def require_categories(self) -> list[str]:
        """Returns the sorted names of all categories that have a published version.

        Raises: DataError: there is no data set, or its root cannot be listed.
        """
        names = self.list_committed_categories()
        if not names:
            expected = f"expected folders category=<name> with a {COMMIT_NAME}"
            raise DataError(f"{self.uri}: no data set here: {expected}; ingest one first")
        return names

    def read_commit(self, category: str, version: str | None = None) -> Commit | None:
        """Reads a commit, the description of a version of a category. Returns None if the category has no current version.

        Args:
            category: name of the category.
            version: the `run_id` of a version; None takes the current version.

        Raises: DataError: the commit file is damaged or of another schema version, the version does not exist any more or has an
            invalid name, or the storage fails.
        """
        path = f"{self.get_category_folder(category)}/{COMMIT_NAME}"
        if version is None:
            return self._read_commit_file(category, path)
        commit = self._read_commit_file(category, self._get_version_path(category, version))
        if commit is not None:
            return commit
        current = self._read_commit_file(category, path)
        if current is not None and current["run_id"] == version:  # published by an old program that stored no versions
            return current
        state = f"it is now {current['run_id']}" if current else "the category does not exist any more"
        raise DataError(
            f"{self.uri}: category {category!r} has no version {version!r}: {state}. A replaced version stays readable for "
            f"{STALE_AFTER.total_seconds() / 3600:g} hours: read the index again and start over"
        )

    def _get_version_path(self, category: str, version: str) -> str:
        """Returns the path of the commit file of a version.

        Raises: DataError: `version` is not a valid name of a version.
        """
        if not version.isalnum():
            raise DataError(f"{self.uri}: version {version!r}: expected a name from `data_version`")
        return f"{self.get_category_folder(category)}/{VERSIONS_FOLDER}/{version}.json"

    def _read_commit_file(self, category: str, path: str) -> Commit | None:
        """Reads a commit file. Returns None if the file does not exist.

        Raises: DataError: the file is damaged or of another schema version, or the storage fails.
        """
        with self.explain_storage_errors("read the commit file", path):
            data = read_file(self.filesystem, path)
        return None if data is None else parse_commit(data, self.uri, category, path)

    def require_commit(self, category: str, version: str | None = None) -> Commit:
        """Returns the commit (the description of a version) of a category that must exist.

        Args: version: see `read_commit`.

        Raises: DataError: the data set or the category does not exist. Also as `read_commit`.
        """
        commit = self.read_commit(category, version)
        if commit is None:
            names = ", ".join(self.require_categories())
            raise DataError(f"{self.uri}: no category {category!r}; available categories: {names}")
        return commit

    def has_all_files(self, category: str, commit: Commit) -> bool:
        """Returns whether all part files of a version exist with the right size, and the index file has the right checksum.

        Args: commit: the description of the version.

        Raises: DataError: the storage fails.
        """
        sizes = {path: info.size for path, info in self.list_category_files(category).items()}
        if any(sizes.get(entry["name"]) != entry["num_bytes"] for entry in commit["files"]):
            return False
        return commit["index"] is None or self._read_checksummed_file(category, commit["index"]) is not None

    def list_category_files(self, category: str) -> dict[str, fs.FileInfo]:
        """Returns all files in the folder of a category and its subfolders: path relative to the folder -> file information.

        On S3 this takes one request per thousand files.

        Raises: DataError: the folder cannot be listed.
        """
        folder = self.get_category_folder(category)
        with self.explain_storage_errors("list the category's files", folder):
            entries = self.filesystem.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
        return {info.path[len(folder) + 1 :]: info for info in entries if info.is_file}

    def read_index_file(self, category: str, commit: Commit) -> pa.Table | None:
        """Reads the index file of a version: the table of all rows without images and masks.

        Args: commit: the description of the version.

        Returns: ``INDEX_COLUMNS`` of all rows, in row order; None if the commit names no index file.

        Raises: DataError: the index file is missing or damaged, or the storage fails.
        """
        entry = commit["index"]
        if entry is None:
            return None
        data = self._read_checksummed_file(category, entry)
        if data is None:
            # The part files contain the same columns. But a storage that lost or changed a file needs a repair, and reading the
            # part files of a large data set takes many minutes, which no user expects here.
            path = f"{self.get_category_folder(category)}/{entry['name']}"
            raise DataError(f"{self.uri}: index {path} is missing or damaged. {_CHANGED_MEANWHILE}")
        return add_missing_group_column(pq.read_table(pa.BufferReader(data)))

    def read_source_manifest(self, category: str, commit: Commit) -> pa.Table | None:
        """Reads the source manifest of a version: the table of its source files, of `SOURCE_SCHEMA`.

        Returns: None if the version has no manifest, or the manifest is missing or damaged.

        Raises: DataError: the storage fails.
        """
        entry = commit["sources"]
        data = self._read_checksummed_file(category, entry) if entry else None
        return None if data is None else pq.read_table(pa.BufferReader(data))

    def _read_checksummed_file(self, category: str, entry: ChecksummedFileEntry) -> bytes | None:
        """Returns the bytes of an index file or source manifest; None if the file is missing or has a wrong checksum.

        Raises: DataError: the storage fails.
        """
        path = f"{self.get_category_folder(category)}/{entry['name']}"
        with self.explain_storage_errors("read the index", path):
            data = read_file(self.filesystem, path)
        return data if data is not None and hashlib.sha256(data).hexdigest() == entry["sha256"] else None

    def check_writable(self) -> None:
        """Checks that the data set is writable, so that a missing permission is reported before the images are decoded.

        Only the first call writes a test file and deletes it.

        Raises: DataError: the test file cannot be written and deleted.
        """
        if not self._writable:
            check_folder_access(self.uri, ("write", "delete"), is_quick=False)
            self._writable = True

    def write_part_files(self, category: str, rows: Iterable[Row]) -> tuple[list[PartFileEntry], pa.Table]:
        """Writes rows to new part files. The rows become visible when a published version names the files.

        Args:
            category: name of the category. Its folder is created on a disk.
            rows: dicts of column -> value, for all columns of `SCHEMA`.

        Returns:
            The entries of the part files, and a table of their rows with `INDEX_COLUMNS`.

        Raises:
            DataError: the storage fails. The files that were already written are removed.
        """
        folder, token = self.get_category_folder(category), uuid.uuid4().hex[:12]
        if isinstance(self.filesystem, fs.LocalFileSystem):
            with self.explain_storage_errors("make the folder", folder):
                self.filesystem.create_dir(folder, recursive=True)
        files: list[PartFileEntry] = []
        index_tables: list[pa.Table] = []

        def collect_index_tables() -> Iterator[pa.Table]:
            """Generator: yields the row groups, and adds their index columns to `index_tables`."""
            for group in _collect_row_groups(rows):
                index_tables.append(group.select(INDEX_COLUMNS))
                yield group

        try:
            groups = collect_index_tables()
            for group in groups:
                name = f"part-{token}-{len(files):05d}.parquet"
                files.append({"name": name, "row_group_rows": [], "num_bytes": 0})
                with self.explain_storage_errors("write a part file", f"{folder}/{name}"):
                    self._write_part_file(f"{folder}/{name}", itertools.chain([group], groups), files[-1])
        except BaseException:
            self.delete_unreferenced_files(category, [entry["name"] for entry in files])
            raise
        return files, pa.concat_tables(index_tables) if index_tables else INDEX_SCHEMA.empty_table()

    def publish_version(
        self,
        category: str,
        build_draft: Callable[[Commit | None], CommitDraft | None],
        new_parts: Sequence[PartFileEntry] = (),
    ) -> bool:
        """Publishes a new version of a category, and deletes stale files of old versions.

        Several processes may publish at the same time. Each version has one successor: a publisher claims the successor of the
        version that its draft is based on. If another publisher claimed it first, this publisher builds its draft again, based
        on the version of the other publisher.

        Args:
            category: name of the category.
            build_draft: gets the current commit (None if there is none) and returns the draft; None if there is nothing to
                change. It may be called several times. If a draft is not published, its new part files are removed.
            new_parts: part files that were written for this version. They are removed if they are not published.

        Returns:
            Whether a version was published.

        Raises:
            DataError: the storage fails, a part file of the draft is missing, or other publishers came first in every attempt.
        """
        new_files = [entry["name"] for entry in new_parts]
        try:
            for _ in range(MAX_PUBLISH_ATTEMPTS):
                previous = self.read_commit(category)
                draft = build_draft(previous)
                if draft is None:
                    self.delete_unreferenced_files(category, new_files)
                    return False
                existing_names = {*new_files, *(entry["name"] for entry in (previous["files"] if previous else []))}
                new_files += [entry["name"] for entry in draft.files if entry["name"] not in existing_names]
                commit, existing_files = self._write_version_files(category, draft, previous, new_files)
                if previous is None or self._claim_next_version(category, previous["run_id"], commit["run_id"]):
                    break
                # Another publisher was first: remove the files of this draft, but keep the part files of the caller.
                self.delete_unreferenced_files(category, new_files[len(new_parts) :])
                del new_files[len(new_parts) :]
                self._publish_last_claimed_version(category, previous)
            else:
                problem = f"other runs published first in {MAX_PUBLISH_ATTEMPTS} attempts"
                raise DataError(f"{self.uri}: category {category!r}: {problem}: run it again when they have finished")
        except BaseException:
            self.delete_unreferenced_files(category, new_files)
            raise
        # From here on no file of the version is removed after an error: if only the response of the server was lost, the commit
        # exists and names these files.
        self._set_current_version(commit)
        self._publish_last_claimed_version(category, commit)
        unused = {entry["name"] for entry in new_parts} - list_referenced_files(commit)
        self.delete_unreferenced_files(
            category, [*unused, *find_stale_files(existing_files, commit, datetime.now(timezone.utc))]
        )
        return True

    def _write_version_files(
        self, category: str, draft: CommitDraft, previous: Commit | None, new_files: list[str]
    ) -> tuple[Commit, dict[str, fs.FileInfo]]:
        """Writes all files of a version, without making it the current version.

        The rejects of the draft replace the stored rejects at once.

        Args:
            category: name of the category.
            draft: content of the version.
            previous: the commit that the draft is based on; None for the first version.
            new_files: the names of the written files are appended to this list.

        Returns:
            The new commit, and the files that the category had before its commit file was written.

        Raises:
            DataError: the storage fails, or a part file of the draft is missing.
        """
        folder, run_id = self.get_category_folder(category), uuid.uuid4().hex[:12]
        # The file names contain the run id. If they depended on the content alone, another run could use the same name and
        # remove the file.
        objects: dict[str, ChecksummedFileEntry | None] = {"index": None, "sources": None}
        for kind, table in (("index", draft.index), ("sources", draft.sources)):
            if table is not None:
                name = f"_{kind}-{run_id}.parquet"
                new_files.append(name)
                with self.explain_storage_errors(f"write the {kind}", f"{folder}/{name}"):
                    objects[kind] = {"name": name, "sha256": self._write_parquet_table(f"{folder}/{name}", table)}
        if draft.rejects is not None:
            self.write_reject_list(category, draft.rejects)
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
            "num_rows": sum(sum(entry["row_group_rows"]) for entry in draft.files),
            "source_fingerprint": draft.source_fingerprint,
            "counts": draft.counts,
        }
        existing_files = self.list_category_files(category)
        missing = sorted({entry["name"] for entry in draft.files} - set(existing_files))
        if missing:
            raise DataError(
                f"{self.uri}: {len(missing)} part files of category {category!r} are missing, the first is {missing[0]}. If this "
                f"run took more than {STALE_AFTER.total_seconds() / 3600:g} hours, its files may have been removed as leftovers: "
                "run it again. If the files belong to the existing version, ingest the category again without appending"
            )
        if previous:
            commit["dropped"] = list_dropped_files(previous, commit, now)
            # an old program that stored no versions may have published the previous commit
            if f"{VERSIONS_FOLDER}/{previous['run_id']}.json" not in existing_files:
                self._write_commit_file(self._get_version_path(category, previous["run_id"]), previous)
        new_files.append(f"{VERSIONS_FOLDER}/{run_id}.json")
        self._write_commit_file(self._get_version_path(category, run_id), commit)
        return commit, existing_files

    def _write_commit_file(self, path: str, commit: Commit) -> None:
        """Writes a commit (the description of a version) to a file. Raises: DataError: the storage fails."""
        with self.explain_storage_errors("write the commit file", path):
            write_file(self.filesystem, path, json.dumps(commit, indent=1).encode())

    def _set_current_version(self, commit: Commit) -> None:
        """Publishes a version: writes its commit to `_commit.json`. Raises: DataError: the storage fails."""
        self._write_commit_file(f"{self.get_category_folder(commit['category'])}/{COMMIT_NAME}", commit)

    def _claim_next_version(self, category: str, previous_id: str, run_id: str) -> bool:
        """Tries to reserve the right to publish the next version, which only one process gets. Returns whether it succeeded.

        On a file system without hard links every process succeeds.

        Args:
            category: name of the category.
            previous_id: `run_id` of the present version.
            run_id: `run_id` of the next version.

        Raises: DataError: the storage fails.
        """
        uri = join_path(self.uri, f"category={category}", CLAIMS_FOLDER, f"after-{previous_id}")
        try:
            return write_bytes_if_absent(uri, run_id.encode())
        except StorageError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in _NO_HARD_LINKS:
                return True  # without hard links there are no claims: the last writer wins
            raise

    def _publish_last_claimed_version(self, category: str, commit: Commit) -> None:
        """Follows the claims from a version to its last successor, and makes that successor the current version.

        The publisher of the successor may have died after its claim, before it made the version current. Without a successor
        nothing changes.

        Raises: DataError: the storage fails, or the commit of a successor is missing.
        """
        while True:
            path = f"{self.get_category_folder(category)}/{CLAIMS_FOLDER}/after-{commit['run_id']}"
            with self.explain_storage_errors("read the next version", path):
                successor_id = read_file(self.filesystem, path)
            if successor_id is None:
                return
            commit = self.require_commit(category, successor_id.decode())
            self._set_current_version(commit)

    def _write_part_file(self, path: str, groups: Iterator[pa.Table], entry: PartFileEntry) -> None:
        """Writes row groups (blocks of rows) to one part file until the file has at least `FILE_BYTES`.

        Args:
            path: path of the part file.
            groups: row groups; the row groups that are not written stay in the iterator.
            entry: entry of the part file; the function writes the row counts and the file size into it.
        """
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
        sync_file_to_disk(self.filesystem, path)
        entry["num_bytes"] = self.filesystem.get_file_info(path).size

    def _write_parquet_table(self, path: str, table: pa.Table) -> str:
        """Writes a table to a Parquet file, and returns the SHA-256 hex of the bytes of the file."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        write_file(self.filesystem, path, data)
        return hashlib.sha256(data).hexdigest()

    def delete_unreferenced_files(self, category: str, names: Iterable[str]) -> None:
        """Deletes files of a category that no commit names. A file that cannot be deleted stays.

        Args: names: paths relative to the folder of the category.
        """
        for name in names:
            with suppress(OSError):  # a file that no commit names does no harm, and a later run tries again
                self.filesystem.delete_file(f"{self.get_category_folder(category)}/{name}")

    def write_reject_list(self, category: str, rejects: Sequence[RejectedFile]) -> None:
        """Replaces the stored list of rejected files of a category. An empty list deletes the stored list.

        Raises: DataError: the storage fails.
        """
        path = self._get_reject_list_path(category)
        with self.explain_storage_errors("write the rejects", path):
            if rejects:
                self._write_parquet_table(path, pa.Table.from_pylist([asdict(reject) for reject in rejects]))
            elif self.filesystem.get_file_info(path).type == fs.FileType.File:
                self.filesystem.delete_file(path)

    def read_reject_list(self, category: str) -> list[RejectedFile]:
        """Returns the stored list of rejected files of a category; an empty list if there is none.

        Raises: DataError: the storage fails.
        """
        path = self._get_reject_list_path(category)
        with self.explain_storage_errors("read the rejects", path):
            data = read_file(self.filesystem, path)
        return [RejectedFile(**row) for row in pq.read_table(pa.BufferReader(data)).to_pylist()] if data else []

    def _get_reject_list_path(self, category: str) -> str:
        """Returns the path of the file that contains the rejected files of a category."""
        return f"{self.path}/_rejects/category={category}.parquet"


def _collect_row_groups(rows: Iterable[Row]) -> Iterator[pa.Table]:
    """Generator: collects rows to tables, each of the size of one row group (a block of rows that is read at once)."""
    pending: list[Row] = []
    num_bytes = 0
    for row in rows:
        pending.append(row)
        num_bytes += len(row["image"]) + len(row["mask"] or b"")
        is_full = len(pending) >= MAX_ROW_GROUP_ROWS or num_bytes >= MAX_ROW_GROUP_BYTES
        if is_full or (len(pending) >= MIN_ROW_GROUP_ROWS and num_bytes >= ROW_GROUP_BYTES):
            yield pa.Table.from_pylist(pending, schema=SCHEMA)
            pending, num_bytes = [], 0
    if pending:
        yield pa.Table.from_pylist(pending, schema=SCHEMA)


def open_data_set(uri: str | Path) -> DataSetStore:
    """Returns the store of a data set, which need not exist yet.

    Args: uri: a local path or an s3:// URI.

    Raises: DataError: the location is not valid, see `storage.files.open_filesystem`.
    """
    filesystem, path = open_filesystem(uri)
    return DataSetStore(str(uri), filesystem, path)


def read_part_columns(part: pq.ParquetFile, columns: Sequence[str], group: int | None = None) -> pa.Table:
    """Reads columns of a part file. If the file is older and lacks the column `group`, that column is added and empty.

    Args:
        part: the open part file.
        columns: names of columns of `SCHEMA`.
        group: number of a row group (a block of rows); None reads all row groups.
    """
    # a table without columns has no rows that could be filled
    available = [name for name in columns if name in part.schema_arrow.names] or ["label"]
    table = part.read(columns=available) if group is None else part.read_row_group(group, columns=available)
    return add_missing_group_column(table).select(columns)


@contextmanager
def open_part_file(store: DataSetStore, category: str, entry: PartFileEntry) -> Iterator[pq.ParquetFile]:
    """Context manager: opens a part file, and checks that its row count is as the commit says.

    Args:
        store: store of the data set.
        category: name of the category.
        entry: entry of the part file in the commit.

    Raises: DataError: the file is missing or damaged. Errors of pyarrow and of the storage inside the `with` block become
        DataError too.
    """
    path = f"{store.get_category_folder(category)}/{entry['name']}"
    try:
        with (
            explain_storage_errors("read a part file", store.uri, path),
            open_file_for_reading(store.filesystem, path) as stream,
            pq.ParquetFile(stream) as part,
        ):
            version = (part.schema_arrow.metadata or {}).get(b"focus_ray.schema_version")
            if version != str(SCHEMA_VERSION).encode() or part.metadata.num_rows != sum(entry["row_group_rows"]):
                raise pa.ArrowInvalid(f"schema version {version!r}, {part.metadata.num_rows} rows")
            yield part
    except pa.ArrowException as error:
        remedy = f"remove the category's {COMMIT_NAME} and ingest it again"
        raise DataError(f"{store.uri}: part file {path} is damaged ({error}): {remedy}") from error
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DataError(f"{error}. {_CHANGED_MEANWHILE}") from error
        raise
