"""Readers of a data set: they open the files that the commit names, and no others."""

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

from focus_ray.data.ahead import ahead
from focus_ray.data.commits import Commit, PartEntry
from focus_ray.data.framing import Frame
from focus_ray.data.images import decode_batch
from focus_ray.data.schema import COMMIT_NAME, INDEX_COLUMNS, SCHEMA, SPLITS, Row
from focus_ray.data.store import Store, open_part, open_store, read_columns
from focus_ray.errors import DataError


def list_categories(uri: str | Path) -> list[str]:
    """Names of a data set's categories, sorted. Raises: DataError: no data set there."""
    store = open_store(uri)
    names = store.categories()
    if not names:
        raise DataError(
            f"{uri}: no data set here: expected folders category=<name> with a {COMMIT_NAME}; ingest one first"
        )
    return names


_VERSION = b"focus_ray.version"  # in the metadata of what `read_index` gives


def data_version(uri: str | Path, category: str) -> str:
    """Name of the version of a category that is current. Raises: DataError: no such data set or category."""
    return open_store(uri).need_commit(category)["run_id"]


def index_version(table: pa.Table) -> str:
    """Name of the version that `read_index` read, for `read_rows`: row numbers hold within one version."""
    return str(table.schema.metadata[_VERSION].decode())


def read_index(uri: str | Path, category: str, split: str | None = None, version: str | None = None) -> pa.Table:
    """The light columns of a category, in row order, without images and masks.

    One object, the index, however many part files there are; of a category whose commit names none, every part file.

    Args: split: train or test; None takes both.  version: as `data_version` names it; None takes the current one.

    Returns: ``INDEX_COLUMNS`` and ``row`` (int64), the row's number in this version of the category, for ``read_rows``;
        `index_version` tells which version.

    Raises: DataError: no such data set, category or split; a version that is gone; a damaged index or part file.
    """
    if split is not None and split not in SPLITS:
        raise DataError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    store = open_store(uri)
    commit = store.need_commit(category, version)
    table = index_of(store, category, commit)
    table = table.replace_schema_metadata({_VERSION: commit["run_id"]})
    table = table.append_column("row", pa.array(np.arange(table.num_rows, dtype=np.int64)))
    if split is not None:
        table = table.filter(pc.equal(table["split"], split))
    return table


PART_READERS = 16  # part files read at once: their small reads take a store's answering time and little else


def index_of(store: Store, category: str, commit: Commit) -> pa.Table:
    """``INDEX_COLUMNS`` of all rows of a commit."""
    table = store.index(category, commit)
    return _index_of_parts(store, category, commit) if table is None else table


def _index_of_parts(store: Store, category: str, commit: Commit) -> pa.Table:
    """``INDEX_COLUMNS`` of all rows, from footers and light columns of the part files."""

    def read(entry: PartEntry) -> pa.Table:
        with open_part(store, category, entry) as part:
            return read_columns(part, INDEX_COLUMNS)

    with ThreadPoolExecutor(PART_READERS) as pool:
        return pa.concat_tables(list(pool.map(read, commit["files"])))


def read_rows(
    uri: str | Path,
    category: str,
    row_numbers: Sequence[int] | np.ndarray[Any, Any],
    columns: Sequence[str] = ("id", "label", "image", "mask"),
    version: str | None = None,
) -> Iterator[Row]:
    """Rows by number, reading only the row groups that hold them and holding one of them at a time.

    Args:
        row_numbers: strictly ascending, as ``read_index`` gives them in ``row``.
        columns: of ``SCHEMA``.
        version: that the numbers are of, as `index_version` tells; None takes the current one.

    Yields: a dict of Python values for each number, in their order.

    Raises: DataError, at the call and not at the first row: an unknown column, numbers out of order or out of range,
        no such category, a version that is gone. While reading: a part file that is gone or damaged.
    """
    unknown = [name for name in columns if name not in SCHEMA.names]
    if unknown:
        raise DataError(f"no column {', '.join(unknown)}; there are: {', '.join(SCHEMA.names)}")
    store = open_store(uri)
    commit = store.need_commit(category, version)
    numbers = np.asarray(row_numbers, dtype=np.int64)
    if numbers.ndim != 1 or (np.diff(numbers) <= 0).any():
        raise DataError("row numbers must be a flat list in strictly ascending order: sort them and drop repeats")
    if numbers.size and (numbers[0] < 0 or numbers[-1] >= commit["num_rows"]):
        raise DataError(
            f"row numbers from {numbers[0]} to {numbers[-1]}, but category {category!r} has {commit['num_rows']} rows "
            "(0-based): read the index again"
        )
    return _iterate_rows(store, category, commit, numbers, list(columns))


def _iterate_rows(
    store: Store, category: str, commit: Commit, numbers: np.ndarray[Any, Any], columns: list[str]
) -> Iterator[Row]:
    start = 0
    for entry in commit["files"]:
        bounds = start + np.concatenate([[0], np.cumsum(entry["row_group_rows"])]).astype(np.int64)
        start = int(bounds[-1])
        cuts = np.searchsorted(numbers, bounds)
        if cuts[0] == cuts[-1]:
            continue
        with open_part(store, category, entry) as part:
            for group in range(len(bounds) - 1):
                inside = numbers[cuts[group] : cuts[group + 1]] - bounds[group]
                if not inside.size:
                    continue
                table = read_columns(part, columns, group)
                for number in inside.tolist():
                    yield {name: table.column(name)[number].as_py() for name in columns}


def data_fingerprint(uri: str | Path, category: str) -> str:
    """SHA-256 hex over the sorted (content hash, label, split, group) of a category: what a model was made from.

    File names, order, encoding and masks do not enter, and neither does an empty group.
    """
    return index_fingerprint(read_index(uri, category))


def index_fingerprint(table: pa.Table) -> str:
    """``data_fingerprint`` of what ``read_index`` gave for both splits."""
    rows = zip(*(table[name].to_pylist() for name in ("content_hash", "label", "split", "group")), strict=True)
    lines = [f"{h} {label} {split}" + (f" {group}" if group else "") for h, label, split, group in rows]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


READ_ROWS = 32  # decoded at a time: bounds the memory of large originals


def decoded_rows(
    uri: str,
    category: str,
    rows: Sequence[int] | np.ndarray[Any, Any],
    size: int | Frame,
    batch_size: int = READ_ROWS,
    num_threads: int = 1,
    version: str | None = None,
) -> Iterator[np.ndarray[Any, Any]]:
    """uint8 (B, H, W, 3 or 4) of the given rows, in order, as `decode_batch` gives them.

    Read and decoded ahead of who asks for them: up to four batches lie in memory.

    Args: num_threads: that decode.  version: as of `read_rows`.
    """
    records = read_rows(uri, category, rows, columns=("id", "image"), version=version)

    def batches() -> Iterator[np.ndarray[Any, Any]]:
        while batch := list(itertools.islice(records, batch_size)):
            images, names = ([record[column] for record in batch] for column in ("image", "id"))
            yield decode_batch(images, size, num_threads, names)

    return ahead(batches())


TEST_COLUMNS = ("id", "image", "mask", "label", "defect_type", "width", "height", "content_hash")


def iter_test_records(uri: str, category: str) -> Iterable[Row]:
    """The labelled test images of a category, as `Inspector.evaluate` takes them."""
    index = read_index(uri, category, split="test")
    return read_rows(uri, category, index["row"].to_numpy(), columns=TEST_COLUMNS, version=index_version(index))
