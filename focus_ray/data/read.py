"""Reads categories, indexes and rows of a data set. Only files that a commit (the file list of a version) names are opened."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from focus_ray.data.commits import Commit, PartFileEntry
from focus_ray.data.framing import InputFrame
from focus_ray.data.images import decode_batch
from focus_ray.data.prefetch import prefetch_items
from focus_ray.data.schema import INDEX_COLUMNS, SCHEMA, SPLITS, Row
from focus_ray.data.store import DataSetStore, open_data_set, open_part_file, read_part_columns
from focus_ray.errors import DataError


def list_categories(uri: str | Path) -> list[str]:
    """Returns the sorted names of the categories of a data set. Raises: DataError: there is no data set at this location."""
    return open_data_set(uri).require_categories()


_VERSION_KEY = b"focus_ray.version"  # in the schema metadata of the tables of `read_index`


def data_version(uri: str | Path, category: str) -> str:
    """Returns the name of the current version of a category. Each change of the category makes a new version.

    Raises: DataError: the data set or category does not exist.
    """
    return open_data_set(uri).require_commit(category)["run_id"]


def index_version(table: pa.Table) -> str:
    """Returns the name of the category version that an index table belongs to. Row numbers are valid only in this version.

    Args: table: from `read_index`.
    """
    return str(table.schema.metadata[_VERSION_KEY].decode())


def read_index(uri: str | Path, category: str, split: str | None = None, version: str | None = None) -> pa.Table:
    """Reads the index of a category: a table of all rows without images and masks, in row order.

    The index is one file, independent of the number of part files. If the commit names no index file, every part file is read.

    Args:
        uri: root of the data set.
        category: name of the category.
        split: train or test; None takes both.
        version: a name from `data_version`; None takes the current version.

    Returns:
        ``INDEX_COLUMNS`` and ``row`` (int64), the number of the row in this version of the category, for ``read_rows``.
        `index_version` returns the version of the table.

    Raises:
        DataError: the data set or category does not exist, the split is neither train nor test, the version was removed, or a
            file is missing or damaged.
    """
    if split is not None and split not in SPLITS:
        raise DataError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    store = open_data_set(uri)
    commit = store.require_commit(category, version)
    table = load_version_index(store, category, commit)
    table = table.replace_schema_metadata({_VERSION_KEY: commit["run_id"]})
    table = table.append_column("row", pa.array(np.arange(table.num_rows, dtype=np.int64)))
    if split is not None:
        table = table.filter(pc.equal(table["split"], split))
    return table


NUM_PART_READERS = 16  # part files read at once: the time of such small reads is mostly the latency of the storage


def load_version_index(store: DataSetStore, category: str, commit: Commit) -> pa.Table:
    """Returns ``INDEX_COLUMNS`` of all rows of a version, from its index file or, without an index file, from its part files.

    Args: commit: the list of the version's files.

    Raises: DataError: a file is missing or damaged.
    """
    table = store.read_index_file(category, commit)
    if table is not None:
        return table

    def read_part_index(entry: PartFileEntry) -> pa.Table:
        with open_part_file(store, category, entry) as part:
            return read_part_columns(part, INDEX_COLUMNS)

    with ThreadPoolExecutor(NUM_PART_READERS) as pool:
        return pa.concat_tables(list(pool.map(read_part_index, commit["files"])))


def read_rows(
    uri: str | Path,
    category: str,
    row_numbers: Sequence[int] | np.ndarray[Any, Any],
    columns: Sequence[str] = ("id", "label", "image", "mask"),
    version: str | None = None,
) -> Iterator[Row]:
    """Returns an iterator over rows by number. It reads only the row groups (blocks of rows) that contain these rows.

    One row group is in memory at a time.

    Args:
        uri: root of the data set.
        category: name of the category.
        row_numbers: strictly ascending numbers from the column ``row`` of ``read_index``.
        columns: names of columns of ``SCHEMA``.
        version: the version in which the numbers are valid, from `index_version`; None takes the current version.

    Yields:
        One dict per row number, in the order of the numbers: column -> Python value.

    Raises:
        DataError: at the call, not at the first row: a column is unknown, the numbers are not ascending or out of range, the
            category does not exist, or the version was removed. While reading: a part file is missing or damaged.
    """
    unknown = [name for name in columns if name not in SCHEMA.names]
    if unknown:
        raise DataError(f"no column {', '.join(unknown)}; available columns: {', '.join(SCHEMA.names)}")
    store = open_data_set(uri)
    commit = store.require_commit(category, version)
    numbers = np.asarray(row_numbers, dtype=np.int64)
    if numbers.ndim != 1 or (np.diff(numbers) <= 0).any():
        raise DataError("row numbers must be a flat list in strictly ascending order: sort them and drop repeats")
    if numbers.size and (numbers[0] < 0 or numbers[-1] >= commit["num_rows"]):
        rows = f"{commit['num_rows']} rows (0-based): read the index again"
        raise DataError(f"row numbers from {numbers[0]} to {numbers[-1]}, but category {category!r} has {rows}")
    return _iterate_rows(store, category, commit, numbers, list(columns))


def _iterate_rows(
    store: DataSetStore, category: str, commit: Commit, numbers: np.ndarray[Any, Any], columns: list[str]
) -> Iterator[Row]:
    """Generator: yields the rows of a version at these ascending row numbers, counted over all part files; see `read_rows`."""
    start = 0
    for entry in commit["files"]:
        # (G + 1,) first row number of each row group of this part file, and the end of the file
        bounds = start + np.concatenate([[0], np.cumsum(entry["row_group_rows"])]).astype(np.int64)
        start = int(bounds[-1])
        # numbers[cuts[g] : cuts[g + 1]] are the requested rows of row group g
        cuts = np.searchsorted(numbers, bounds)
        if cuts[0] == cuts[-1]:
            continue
        with open_part_file(store, category, entry) as part:
            for group in range(len(bounds) - 1):
                numbers_in_group = numbers[cuts[group] : cuts[group + 1]] - bounds[group]
                if not numbers_in_group.size:
                    continue
                table = read_part_columns(part, columns, group)
                for number in numbers_in_group.tolist():
                    yield {name: table.column(name)[number].as_py() for name in columns}


def data_fingerprint(uri: str | Path, category: str) -> str:
    """Returns a hash that identifies the images, labels, splits and groups of a category, to detect that the data changed.

    It is the SHA-256 hex of the sorted (content hash, label, split, group) of all rows. File names, order, encoding, masks and
    empty groups do not change it.

    Raises: DataError: the data set or category does not exist, or a file is missing or damaged.
    """
    return compute_index_fingerprint(read_index(uri, category))


def compute_index_fingerprint(table: pa.Table) -> str:
    """Returns the `data_fingerprint` of a category, computed from its index table.

    Args: table: from `read_index`, with both splits.
    """
    rows = zip(*(table[name].to_pylist() for name in ("content_hash", "label", "split", "group")), strict=True)
    lines = [f"{h} {label} {split}" + (f" {group}" if group else "") for h, label, split, group in rows]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


NUM_ROWS_PER_READ = 32  # rows decoded at once: limits the memory that large originals take


def decode_rows(
    uri: str,
    category: str,
    rows: Sequence[int] | np.ndarray[Any, Any],
    size: int | InputFrame,
    batch_size: int = NUM_ROWS_PER_READ,
    num_threads: int = 1,
    version: str | None = None,
) -> Iterator[np.ndarray[Any, Any]]:
    """Returns an iterator over batches of decoded images, uint8 (B, H, W, 3), in the order of the rows.

    If the frame marks scored pixels, a fourth channel contains the mark (see `InputFrame.shape`). The batches are prefetched:
    up to four batches are in memory.

    Args:
        uri: root of the data set.
        category: name of the category.
        rows: strictly ascending row numbers.
        size: the `InputFrame` of the images, or the side of a square in pixels, see `decode_batch`.
        batch_size: images per batch; the last batch may be smaller.
        num_threads: threads that decode.
        version: the version in which the row numbers are valid; None takes the current version.

    Raises: DataError: see `read_rows`. ImageError: an image cannot be decoded, see `decode_batch`.
    """
    records = read_rows(uri, category, rows, columns=("id", "image"), version=version)

    def decode_batches() -> Iterator[np.ndarray[Any, Any]]:
        while batch := list(itertools.islice(records, batch_size)):
            images, names = ([record[column] for record in batch] for column in ("image", "id"))
            yield decode_batch(images, size, num_threads, names)

    return prefetch_items(decode_batches())


TEST_COLUMNS = ("id", "image", "mask", "label", "defect_type", "width", "height", "content_hash")


def read_test_rows(uri: str, category: str) -> Iterable[Row]:
    """Returns an iterator over the labelled test images of a category, as rows with the columns ``TEST_COLUMNS``.

    Raises: DataError: the data set or category does not exist, or a file is missing or damaged.
    """
    index = read_index(uri, category, split="test")
    return read_rows(uri, category, index["row"].to_numpy(), columns=TEST_COLUMNS, version=index_version(index))
