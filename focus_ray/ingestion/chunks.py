"""Reads a category in chunks: each chunk is read once, checked and written to part files, in this process or on another machine.

Duplicates and name clashes between chunks are found afterwards, from the results without images. Only part files with a
duplicate or a row that needs another id are written again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from focus_ray.data import store as stores
from focus_ray.data.commits import PartEntry
from focus_ray.data.importers.base import ImportSettings, Sample
from focus_ray.data.schema import INDEX_COLUMNS, INDEX_SCHEMA, Reject, Row, fill_group_column
from focus_ray.data.source import SourcePath
from focus_ray.data.store import Store, open_part, open_store
from focus_ray.ingestion.check import (
    CheckedSample,
    FileDigest,
    check_sample,
    compute_digest,
    make_row,
    read_sample_files,
)
from focus_ray.ingestion.deduplicate import find_existing_ids, id_with_hash, make_row_ids

T = TypeVar("T")
R = TypeVar("R")
MAX_CHUNK_IMAGES = 4096  # limits chunks of small images, whose reading time is mostly the latency of the storage


class Mapper(Protocol):
    """Calls a function for each item, in this process or in others, in any order."""

    def __call__(self, function: Callable[[T], R], items: Sequence[T], /) -> Iterator[tuple[int, R]]:
        """Yields the position of each item and the result of the function, in the order in which the calls finish."""


def map_in_process(function: Callable[[T], R], items: Sequence[T], /) -> Iterator[tuple[int, R]]:
    """Calls a function for each item in this process, one after the other. Yields position and result, see `Mapper`."""
    return ((number, function(item)) for number, item in enumerate(items))


@dataclass(frozen=True)
class Chunk:
    """Images of one category whose total size is about the size of one part file.

    Attributes:
        uri: root of the data set.
        ids: row ids of the images if no image of the category is rejected.
        used_ids: the ids of this chunk that existing rows already use.
        num_threads: threads that read and check images.
    """

    uri: str
    category: str
    site: str
    settings: ImportSettings
    samples: tuple[Sample, ...]
    ids: tuple[str, ...]
    used_ids: frozenset[str]
    num_threads: int


@dataclass(frozen=True)
class ChunkResult:
    """The result of writing a chunk.

    Attributes:
        parts: the part files that were written.
        items: the checked sample of each row, in row order, without its mask.
        ids: the id of each row.
        rejects: the rejected files.
        digests: the digest of each file that was read, in the order of `list_source_files`.
    """

    parts: list[PartEntry]
    items: list[CheckedSample]
    ids: list[str]
    rejects: list[Reject]
    digests: list[FileDigest]


def list_source_files(samples: Sequence[Sample]) -> Iterator[SourcePath]:
    """Yields the files of samples: each image, followed by its masks."""
    return itertools.chain.from_iterable((sample.path, *sample.masks) for sample in samples)


def make_chunks(
    category: str,
    samples: Sequence[Sample],
    stamps: Mapping[SourcePath, tuple[int, str]],
    uri: str,
    site: str,
    settings: ImportSettings,
    num_threads: int,
    index: pa.Table | None = None,
) -> list[Chunk]:
    """Divides the samples of a category into chunks, in the order of their row ids.

    Args:
        stamps: stamp of each file of the samples.
        uri: root of the data set.
        index: the index of the existing rows, for an append.
    """
    settings = replace(settings, grouping=None)  # the samples have their groups: do not send the table of the rule
    pairs = sorted(zip(make_row_ids(samples, category), samples, strict=True), key=lambda pair: pair[0])
    used_ids = find_existing_ids(index, [row_id for row_id, _ in pairs]) if index is not None else set()
    chunks: list[list[tuple[str, Sample]]] = []
    num_bytes = stores.FILE_BYTES
    for row_id, sample in pairs:
        if num_bytes >= stores.FILE_BYTES or len(chunks[-1]) >= MAX_CHUNK_IMAGES:
            chunks.append([])
            num_bytes = 0
        chunks[-1].append((row_id, sample))
        num_bytes += sum(max(0, stamps[path][0]) for path in list_source_files([sample]))
    return [
        Chunk(
            uri,
            category,
            site,
            settings,
            tuple(sample for _, sample in chunk),
            tuple(row_id for row_id, _ in chunk),
            frozenset(row_id for row_id, _ in chunk if row_id in used_ids),
            num_threads,
        )
        for chunk in chunks
    ]


def write_chunk(chunk: Chunk) -> ChunkResult:
    """Reads, checks and writes a chunk. Its images are in memory once. Raises: DataError: the storage fails."""
    store = open_store(chunk.uri)
    result = ChunkResult([], [], [], [], [])

    def read_and_check(sample: Sample) -> tuple[bytes, list[FileDigest], CheckedSample | Reject]:
        contents = read_sample_files(sample)
        outcome = check_sample(sample, contents, chunk.category, chunk.settings)
        data = contents[0] if isinstance(contents[0], bytes) else b""
        return data, [compute_digest(content) for content in contents], outcome

    def rows() -> Iterator[Row]:
        for row_id, (data, digests, outcome) in zip(chunk.ids, pool.map(read_and_check, chunk.samples), strict=True):
            result.digests.extend(digests)
            if isinstance(outcome, Reject):
                result.rejects.append(outcome)
                continue
            row_id = id_with_hash(row_id, outcome) if row_id in chunk.used_ids else row_id
            row = make_row(row_id, outcome, data, chunk.category, chunk.site)
            result.ids.append(row_id)
            result.items.append(outcome if outcome.mask is None else replace(outcome, mask=b""))
            yield row

    with ThreadPoolExecutor(chunk.num_threads) as pool:
        parts, _ = store.write_parts(chunk.category, rows())
    result.parts.extend(parts)
    return result


@dataclass(frozen=True)
class PartRewrite:
    """A part file to be written again.

    Attributes:
        entry: the part file.
        is_kept: (rows,) bool, whether each row is kept.
        new_ids: number of a row in the file -> its new id.
    """

    uri: str
    category: str
    entry: PartEntry
    is_kept: np.ndarray[Any, np.dtype[np.bool_]]
    new_ids: Mapping[int, str]


def rewrite_part(rewrite: PartRewrite) -> tuple[list[PartEntry], int]:
    """Writes the kept rows of a part file to new part files.

    Returns:
        The new part files, and the number of removed rows with a mask.
    """
    store = open_store(rewrite.uri)
    num_removed_masks = 0

    def rows() -> Iterator[Row]:
        nonlocal num_removed_masks
        for number, row in enumerate(read_part_rows(store, rewrite.category, [rewrite.entry])):
            if rewrite.is_kept[number]:
                yield {**row, "id": rewrite.new_ids.get(number, row["id"])}
            else:
                num_removed_masks += row["mask"] is not None

    return store.write_parts(rewrite.category, rows())[0], num_removed_masks


def read_part_rows(store: Store, category: str, entries: Sequence[PartEntry]) -> Iterator[Row]:
    """Yields all rows of part files in order. One row group is in memory."""
    for entry in entries:
        with open_part(store, category, entry) as part:
            for group in range(part.num_row_groups):
                yield from fill_group_column(part.read_row_group(group)).to_pylist()


def rewrite_parts(
    store: Store,
    category: str,
    entries: Sequence[PartEntry],
    is_kept: np.ndarray[Any, np.dtype[np.bool_]],
    new_ids: Mapping[int, str],
    run: Mapper,
) -> tuple[list[PartEntry], list[str], int]:
    """Removes and renames rows of part files. Part files without such a row are not written again.

    Args:
        entries: the part files.
        is_kept: (rows of all part files,) bool, whether each row is kept.
        new_ids: number of a row among all part files -> its new id.
        run: calls `rewrite_part` for the part files to be written again.

    Returns:
        The part files in order, the names of the new part files, and the number of removed rows with a mask.
    """
    rewrites: dict[int, PartRewrite] = {}
    bounds = np.cumsum([0, *(sum(entry["row_group_rows"]) for entry in entries)])
    renamed_rows = np.array(sorted(new_ids), dtype=np.int64)
    for number, entry in enumerate(entries):
        first, last = int(bounds[number]), int(bounds[number + 1])
        start, stop = np.searchsorted(renamed_rows, first), np.searchsorted(renamed_rows, last)
        renamed_here = renamed_rows[start:stop].tolist()
        if renamed_here or not is_kept[first:last].all():
            new_ids_here = {row - first: new_ids[row] for row in renamed_here}
            rewrites[number] = PartRewrite(store.uri, category, entry, is_kept[first:last], new_ids_here)
    files_by_entry: list[list[PartEntry]] = [[entry] for entry in entries]
    num_removed_masks = 0
    new_files: list[str] = []
    numbers = list(rewrites)
    for position, (files, num_masks) in run(rewrite_part, list(rewrites.values())):
        files_by_entry[numbers[position]] = files
        new_files += [entry["name"] for entry in files]
        num_removed_masks += num_masks
    return list(itertools.chain.from_iterable(files_by_entry)), new_files, num_removed_masks


def build_index(ids: Sequence[str], items: Sequence[CheckedSample], site: str) -> pa.Table:
    """Returns the index, `INDEX_COLUMNS`, of rows from their ids and checked samples."""
    columns = {
        "id": list(ids),
        "split": [item.sample.split for item in items],
        "label": [item.sample.label for item in items],
        "defect_type": [item.sample.defect_type for item in items],
        "width": [item.width for item in items],
        "height": [item.height for item in items],
        "site": [site] * len(items),
        "content_hash": [item.content_hash for item in items],
        "group": [item.sample.group for item in items],
    }
    return pa.table({name: columns[name] for name in INDEX_COLUMNS}, schema=INDEX_SCHEMA)
