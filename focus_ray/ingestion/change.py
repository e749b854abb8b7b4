"""Changes an existing category without its source: removes rows, merges small part files, and deletes stale files."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from focus_ray.data import store as stores
from focus_ray.data.commits import Commit, PartFileEntry, find_stale_files
from focus_ray.data.read import list_categories, load_version_index
from focus_ray.data.store import CommitDraft, DataSetStore, open_data_set
from focus_ray.errors import DataError
from focus_ray.ingestion.chunks import map_in_process, read_rows_of_part_files, rewrite_part_files
from focus_ray.ingestion.report import count_rows_by_split_and_label
from focus_ray.ingestion.source_manifest import derive_fingerprint_after_change

_MAX_LISTED_VALUES = 5  # missing values that an error message lists


@dataclass(frozen=True)
class RowRemovalReport:
    """The result of removing rows from a category. ``str()`` returns the text for the user.

    Attributes:
        category: name of the category.
        num_removed, num_remaining: numbers of rows.
        num_rewritten: part files that were written again because they contained removed rows.
        num_parts: part files before the removal.
    """

    category: str
    num_removed: int
    num_remaining: int
    num_rewritten: int
    num_parts: int

    def __str__(self) -> str:
        return (
            f"{self.category}: {self.num_removed} images removed, {self.num_remaining} remain; {self.num_rewritten} of "
            f"{self.num_parts} part files written again"
        )


def remove_rows(
    uri: str | Path,
    category: str,
    ids: Collection[str] = (),
    content_hashes: Collection[str] = (),
    site: str | None = None,
) -> RowRemovalReport:
    """Removes rows from a category: all rows with one of the ids, one of the content hashes, or the site.

    Only part files that contain such rows are written again. The previous version stays readable for a day.

    Args:
        uri: root of the data set.
        category: name of the category.
        ids: ids of rows to remove.
        content_hashes: content hashes of images to remove.
        site: site whose rows are removed; None: no site.

    Raises:
        DataError: no value is given, a value occurs in no row, or no row would remain. Also if the category does not exist, the
            storage fails, or other processes published first too often.
    """
    if not ids and not content_hashes and site is None:
        raise DataError("no rows to remove: give ids, content hashes or a site")
    store = open_data_set(uri)
    store.require_commit(category)
    reports: list[RowRemovalReport] = []

    def build_commit_draft(previous: Commit | None) -> CommitDraft:
        """Returns the content of the version without the rows, and adds a report. Raises: DataError: see `remove_rows`."""
        if previous is None:
            raise DataError(f"{uri}: category {category!r} was deleted meanwhile")
        index = load_version_index(store, category, previous)
        is_removed = np.zeros(index.num_rows, dtype=bool)
        for column, values in (("id", ids), ("content_hash", content_hashes), ("site", [] if site is None else [site])):
            is_removed |= _find_matching_rows(index, column, values, f"{uri}: category {category!r}")
        if is_removed.all():
            raise DataError(
                f"{uri}: category {category!r}: all of its {len(is_removed)} images would be removed: to delete the category, "
                f"delete its folder, {store.get_category_folder(category)}"
            )
        changes = dict.fromkeys(np.flatnonzero(is_removed).tolist())
        files, num_masks = rewrite_part_files(store, category, previous["files"], changes, map_in_process)
        remaining = index.filter(pa.array(~is_removed))
        counts = {**count_rows_by_split_and_label(remaining), "num_masks": previous["counts"]["num_masks"] - num_masks}
        names = {entry["name"] for entry in files}
        num_rewritten = sum(entry["name"] not in names for entry in previous["files"])
        reports.append(
            RowRemovalReport(category, len(changes), remaining.num_rows, num_rewritten, len(previous["files"]))
        )
        fingerprint = derive_fingerprint_after_change(
            previous, "remove", index["id"].filter(pa.array(is_removed)).to_pylist()
        )
        return CommitDraft(files, remaining, store.read_source_manifest(category, previous), fingerprint, counts)

    store.publish_version(category, build_commit_draft)
    return reports[-1]


def _find_matching_rows(index: pa.Table, column: str, values: Collection[str], location: str) -> np.ndarray:
    """Returns for each row of an index table whether its column has one of the values, (rows,) bool.

    Args:
        index: table of the rows of a category.
        column: name of the column.
        values: values to find.
        location: data set and category, for the error message.

    Raises: DataError: at least one value is in no row.
    """
    is_match = pc.is_in(index[column], value_set=pa.array(sorted(set(values)), pa.string()))
    missing = sorted(set(values) - set(index[column].filter(is_match).to_pylist()))
    if missing:
        more = f" and {len(missing) - _MAX_LISTED_VALUES} more" if len(missing) > _MAX_LISTED_VALUES else ""
        raise DataError(
            f"{location}: no image has the {column} {', '.join(missing[:_MAX_LISTED_VALUES])}{more}; nothing was removed. "
            "read_index lists the existing rows"
        )
    return np.asarray(is_match.to_numpy(), dtype=bool)


@dataclass(frozen=True)
class CompactionReport:
    """The result of merging the part files of a category. ``str()`` returns the text for the user.

    Attributes:
        category: name of the category.
        num_before, num_after: numbers of part files.
        num_stale: number of deleted files that no process could still use.
    """

    category: str
    num_before: int
    num_after: int
    num_stale: int

    def __str__(self) -> str:
        return (
            f"{self.category}: {self.num_before} part files, now {self.num_after}; {self.num_stale} stale files removed"
        )


def compact_part_files(uri: str | Path, categories: Sequence[str] | None = None) -> list[CompactionReport]:
    """Merges consecutive small part files of categories into larger files, and deletes stale files. The rows do not change.

    Args:
        uri: root of the data set.
        categories: None takes all categories.

    Returns: one report per category.

    Raises: DataError: a category does not exist, the storage fails, or other processes published first too often.
    """
    store = open_data_set(uri)
    names = list_categories(uri) if categories is None else list(dict.fromkeys(categories))
    for name in names:
        store.require_commit(name)
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda name: _compact_category(store, name), names))


def _compact_category(store: DataSetStore, category: str) -> CompactionReport:
    """Merges the small part files of one category, and deletes its stale files, see `compact_part_files`."""
    num_parts = [0, 0]

    def build_commit_draft(previous: Commit | None) -> CommitDraft | None:
        """Returns the content of the version with merged part files; None if no file is merged."""
        if previous is None:
            raise DataError(f"{store.uri}: category {category!r} was deleted meanwhile")
        files: list[PartFileEntry] = []
        for group in group_small_part_files(previous["files"]):
            is_joined = len(group) > 1
            files += (
                store.write_part_files(category, read_rows_of_part_files(store, category, group))[0]
                if is_joined
                else group
            )
        num_parts[:] = [len(previous["files"]), len(files)]
        if files == previous["files"]:
            return None
        return CommitDraft(
            files,
            load_version_index(store, category, previous),
            store.read_source_manifest(category, previous),
            previous["source_fingerprint"],
            previous["counts"],
        )

    store.publish_version(category, build_commit_draft)
    commit = store.require_commit(category)
    stale_files = find_stale_files(store.list_category_files(category), commit, datetime.now(timezone.utc))
    store.delete_unreferenced_files(category, stale_files)
    return CompactionReport(category, num_parts[0], num_parts[1], len(stale_files))


def group_small_part_files(files: Sequence[PartFileEntry]) -> list[list[PartFileEntry]]:
    """Groups part files to be merged: consecutive files of less than half the full size come into one list.

    Args: files: entries of the part files, in row order.

    Returns: lists of entries, in the same order. A file that is not merged is alone in its list.
    """
    runs: list[list[PartFileEntry]] = []
    for entry in files:
        if runs and max(entry["num_bytes"], runs[-1][-1]["num_bytes"]) < stores.FILE_BYTES // 2:
            runs[-1].append(entry)
        else:
            runs.append([entry])
    return runs
