"""Reads a category in chunks: each chunk is read once, checked and written to part files, here or on another machine.

A chunk is a list of images that fills about one part file. Duplicates and name clashes between chunks are found afterwards, from
the results without images. Only part files with a duplicate or a row that needs another id are written again.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from focus_ray.data import store as stores
from focus_ray.data.commits import PartFileEntry
from focus_ray.data.importers.base import ImportSettings, SourceImage
from focus_ray.data.schema import INDEX_SCHEMA, RejectedFile, Row, add_missing_group_column
from focus_ray.data.source import SourcePath
from focus_ray.data.store import DataSetStore, open_data_set, open_part_file
from focus_ray.ingestion.check import CheckedSample, FileDigest, check_sample, compute_file_digest, read_source_file
from focus_ray.ingestion.deduplicate import append_hash_to_id, find_used_row_ids, make_row_ids

MAX_CHUNK_IMAGES = 4096  # limits chunks of small images, whose reading time is mostly the latency of the storage

Mapper = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[tuple[int, Any]]]
"""Calls a function for each item, in this process or in others; yields position and result in the order in which calls finish."""


def map_in_process(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Calls a function for each item in this process, in order. Returns an iterator over (position, result)."""
    return enumerate(map(function, items))


@dataclass(frozen=True)
class IngestOptions:
    """The options of an ingestion: where and how the images are read and written.

    Attributes:
        uri: root of the data set.
        settings: settings of the importers.
        site: name of the site, stored in each row.
        num_threads: threads per chunk that read and check images.
        append: add new images to the existing categories, instead of replacing the categories.
        trusts_stamps: whether a file with the same size and stamp (ETag or time of change) counts as unchanged without being
            read.
        run: calls `ingest_chunk` and `rewrite_part_file` for many items, in this process or on a cluster.
    """

    uri: str
    settings: ImportSettings
    site: str
    num_threads: int
    append: bool
    trusts_stamps: bool
    run: Mapper


@dataclass(frozen=True)
class ImageChunk:
    """Images of one category that are read and written together; they fill about one part file, at most `MAX_CHUNK_IMAGES`.

    Attributes:
        category: name of the category.
        samples: provisional row id and sample of each image. Rows get other ids if images are rejected or ids are in use.
        used_ids: the ids of this chunk that existing rows already use.
        options: the options of the ingestion.
    """

    category: str
    samples: list[tuple[str, SourceImage]]
    used_ids: set[str]
    options: IngestOptions


@dataclass(frozen=True)
class ChunkResult:
    """The result of writing one chunk of images, or of all chunks of a category.

    Attributes:
        parts: entries of the part files that were written.
        index: table of the written rows, with `INDEX_COLUMNS`.
        items: the checked sample of each row, without its mask.
        rejects: the rejected files.
        digests: digest (size and SHA-256) of each file that was read.
    """

    parts: list[PartFileEntry]
    index: pa.Table
    items: list[CheckedSample]
    rejects: list[RejectedFile]
    digests: dict[SourcePath, FileDigest]


def merge_chunk_results(results: Sequence[ChunkResult]) -> ChunkResult:
    """Merges the results of all chunks of a category into one result."""
    return ChunkResult(
        [entry for result in results for entry in result.parts],
        pa.concat_tables([INDEX_SCHEMA.empty_table(), *(result.index for result in results)]),
        [item for result in results for item in result.items],
        [reject for result in results for reject in result.rejects],
        {path: digest for result in results for path, digest in result.digests.items()},
    )


def divide_into_chunks(
    category: str,
    samples: Sequence[SourceImage],
    stamps: Mapping[SourcePath, tuple[int, str]],
    index: pa.Table,
    options: IngestOptions,
) -> list[ImageChunk]:
    """Divides the images of a category into chunks of about the size of one part file, in the order of their row ids.

    Args:
        category: name of the category.
        samples: the images.
        stamps: size and change mark of each file of the samples.
        index: table of the existing rows.
        options: the options of the ingestion.
    """
    # the samples have their groups: do not send the table of the rule
    options = replace(options, settings=replace(options.settings, grouping=None), run=map_in_process)
    pairs = sorted(zip(make_row_ids(samples, category), samples, strict=True), key=lambda pair: pair[0])
    used_ids = find_used_row_ids(index, [row_id for row_id, _ in pairs])
    chunks: list[list[tuple[str, SourceImage]]] = []
    num_bytes = stores.FILE_BYTES
    for row_id, sample in pairs:
        if num_bytes >= stores.FILE_BYTES or len(chunks[-1]) >= MAX_CHUNK_IMAGES:
            chunks.append([])
            num_bytes = 0
        chunks[-1].append((row_id, sample))
        num_bytes += sum(max(0, stamps[path][0]) for path in (sample.path, *sample.masks))
    return [ImageChunk(category, chunk, used_ids & {row_id for row_id, _ in chunk}, options) for chunk in chunks]


def ingest_chunk(chunk: ImageChunk) -> ChunkResult:
    """Reads and checks the images of a chunk, and writes the images that pass to part files.

    Only images of the chunk are in memory.

    Raises: DataError: the storage fails.
    """
    items: list[CheckedSample] = []
    rejects: list[RejectedFile] = []
    digests: dict[SourcePath, FileDigest] = {}

    def read_and_check_sample(
        sample: SourceImage,
    ) -> tuple[bytes | OSError, dict[SourcePath, FileDigest], CheckedSample | RejectedFile]:
        """Returns the bytes of an image, the digests of its files, and the checked sample or the rejection."""
        paths = (sample.path, *sample.masks)
        contents = [read_source_file(path) for path in paths]
        outcome = check_sample(sample, contents, chunk.category, chunk.options.settings)
        return contents[0], dict(zip(paths, map(compute_file_digest, contents), strict=True)), outcome

    def generate_rows() -> Iterator[Row]:
        """Generator: yields the rows of the images without errors, and collects samples, rejections and digests."""
        results = pool.map(read_and_check_sample, [sample for _, sample in chunk.samples])
        for (row_id, sample), (data, sample_digests, outcome) in zip(chunk.samples, results, strict=True):
            digests.update(sample_digests)
            if isinstance(outcome, RejectedFile):
                rejects.append(outcome)
                continue
            items.append(outcome if outcome.mask is None else replace(outcome, mask=b""))
            yield {
                "id": append_hash_to_id(row_id, outcome) if row_id in chunk.used_ids else row_id,
                "category": chunk.category,
                "split": sample.split,
                "label": sample.label,
                "defect_type": sample.defect_type,
                "image": data,
                "mask": outcome.mask,
                "width": outcome.width,
                "height": outcome.height,
                "site": chunk.options.site,
                "content_hash": outcome.content_hash,
                "group": sample.group,
            }

    with ThreadPoolExecutor(chunk.options.num_threads) as pool:
        parts, index = open_data_set(chunk.options.uri).write_part_files(chunk.category, generate_rows())
    return ChunkResult(parts, index, items, rejects, digests)


RowChanges = Mapping[int, str | None]
"""Changes of rows: number of a row -> its new id, or None to remove the row."""


@dataclass(frozen=True)
class PartFileRewrite:
    """A part file to be written again, with some rows removed or renamed. `changes` uses row numbers of this file."""

    uri: str
    category: str
    entry: PartFileEntry
    changes: RowChanges


def rewrite_part_file(rewrite: PartFileRewrite) -> tuple[list[PartFileEntry], int]:
    """Writes the remaining rows of a part file, with their new ids, to new part files. The old file stays.

    Returns:
        The entries of the new part files, and the number of removed rows with a mask.

    Raises: DataError: the storage fails, or the part file is missing or damaged.
    """
    store = open_data_set(rewrite.uri)
    num_removed_masks = 0

    def generate_rows() -> Iterator[Row]:
        """Generator: yields the remaining rows with their new ids, and counts the removed masks."""
        nonlocal num_removed_masks
        for number, row in enumerate(read_rows_of_part_files(store, rewrite.category, [rewrite.entry])):
            row_id = rewrite.changes.get(number, row["id"])
            if row_id is not None:
                yield {**row, "id": row_id}
            else:
                num_removed_masks += row["mask"] is not None

    return store.write_part_files(rewrite.category, generate_rows())[0], num_removed_masks


def read_rows_of_part_files(store: DataSetStore, category: str, entries: Sequence[PartFileEntry]) -> Iterator[Row]:
    """Generator: yields all rows of part files in order. One row group (block of rows) is in memory at a time.

    Raises: DataError: a part file is missing or damaged.
    """
    for entry in entries:
        with open_part_file(store, category, entry) as part:
            for group in range(part.num_row_groups):
                yield from add_missing_group_column(part.read_row_group(group)).to_pylist()


def rewrite_part_files(
    store: DataSetStore, category: str, entries: Sequence[PartFileEntry], changes: RowChanges, run: Mapper
) -> tuple[list[PartFileEntry], int]:
    """Removes and renames rows of part files. Part files without such a row are not written again. The old files stay.

    Args:
        store: store of the data set.
        category: name of the category.
        entries: entries of the part files.
        changes: number of a row, counted over all part files -> its new id, or None to remove the row.
        run: calls `rewrite_part_file` for the part files to be written again.

    Returns:
        The entries of the part files in row order, old and new; and the number of removed rows with a mask.

    Raises: DataError: the storage fails, or a part file is missing or damaged.
    """
    first_rows = [0, *itertools.accumulate(sum(entry["row_group_rows"]) for entry in entries)]
    changes_by_part: dict[int, dict[int, str | None]] = defaultdict(dict)
    for row, new_id in changes.items():
        number = bisect_right(first_rows, row) - 1
        changes_by_part[number][row - first_rows[number]] = new_id
    numbers = sorted(changes_by_part)
    rewrites = [PartFileRewrite(store.uri, category, entries[number], changes_by_part[number]) for number in numbers]
    files_by_entry = [[entry] for entry in entries]
    num_removed_masks = 0
    for position, (files, num_masks) in run(rewrite_part_file, rewrites):
        files_by_entry[numbers[position]] = files
        num_removed_masks += num_masks
    return list(itertools.chain.from_iterable(files_by_entry)), num_removed_masks
