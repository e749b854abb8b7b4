"""A category read piece by piece: each piece is read once, checked, and written as part files, on whatever machine.

What counts of them is settled afterwards, from light facts alone: a part file that holds a duplicate, or a row that must be
called otherwise, is written again; most are taken as they are.
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
from focus_ray.data.ingestion.check import Checked, Facts, check, facts_of, make_row, read_files
from focus_ray.data.ingestion.unique import ids_there, make_ids, other_id
from focus_ray.data.schema import INDEX_COLUMNS, INDEX_SCHEMA, Reject, Row, with_groups
from focus_ray.data.source import SourcePath
from focus_ray.data.store import Store, open_part, open_store

T = TypeVar("T")
R = TypeVar("R")
MAX_CHUNK_IMAGES = 4096  # small ones take a store's answering time and little else


class Mapper(Protocol):
    """Calls a function for each item, here or elsewhere, in any order."""

    def __call__(self, function: Callable[[T], R], items: Sequence[T], /) -> Iterator[tuple[int, R]]:
        """Number of the item, and what the function gave."""


def map_here(function: Callable[[T], R], items: Sequence[T], /) -> Iterator[tuple[int, R]]:
    """One after the other, in this process."""
    return ((number, function(item)) for number, item in enumerate(items))


@dataclass(frozen=True)
class Chunk:
    """Images of one category, about a part file of them.

    ids: what they are called if all of the category can be used.  taken: of these, what rows that are there are called.
    """

    uri: str
    category: str
    site: str
    settings: ImportSettings
    samples: tuple[Sample, ...]
    ids: tuple[str, ...]
    taken: frozenset[str]
    num_threads: int


@dataclass(frozen=True)
class Written:
    """What came of a chunk.

    parts: files in the category's folder.  items: of their rows, in order, without masks.  ids: what the rows are called.
    facts: of each file that was read, in the order of `files_of` its samples.
    """

    parts: list[PartEntry]
    items: list[Checked]
    ids: list[str]
    rejects: list[Reject]
    facts: list[Facts]


def files_of(samples: Sequence[Sample]) -> Iterator[SourcePath]:
    """Images and their masks."""
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
    """The samples in the order of their ids, in pieces of about a part file's bytes.

    Args: stamps: of their files.  index: of the rows that are there.
    """
    settings = replace(settings, grouping=None)  # the samples have their groups; a rule's table stays in this process
    named = sorted(zip(make_ids(samples, category), samples, strict=True), key=lambda pair: pair[0])
    taken = ids_there(index, [name for name, _ in named]) if index is not None else set()
    pieces: list[list[tuple[str, Sample]]] = []
    num_bytes = stores.FILE_BYTES
    for name, sample in named:
        if num_bytes >= stores.FILE_BYTES or len(pieces[-1]) >= MAX_CHUNK_IMAGES:
            pieces.append([])
            num_bytes = 0
        pieces[-1].append((name, sample))
        num_bytes += sum(max(0, stamps[path][0]) for path in files_of([sample]))
    return [
        Chunk(
            uri,
            category,
            site,
            settings,
            tuple(sample for _, sample in piece),
            tuple(name for name, _ in piece),
            frozenset(name for name, _ in piece if name in taken),
            num_threads,
        )
        for piece in pieces
    ]


def write_chunk(chunk: Chunk) -> Written:
    """Reads, checks and writes a chunk; holds its images in memory, once. Raises: DataError: the storage fails."""
    store = open_store(chunk.uri)
    written = Written([], [], [], [], [])

    def look(sample: Sample) -> tuple[bytes, list[Facts], Checked | Reject]:
        contents = read_files(sample)
        outcome = check(sample, contents, chunk.category, chunk.settings)
        data = contents[0] if isinstance(contents[0], bytes) else b""
        return data, [facts_of(content) for content in contents], outcome

    def rows() -> Iterator[Row]:
        for name, (data, facts, outcome) in zip(chunk.ids, pool.map(look, chunk.samples), strict=True):
            written.facts.extend(facts)
            if isinstance(outcome, Reject):
                written.rejects.append(outcome)
                continue
            name = other_id(name, outcome) if name in chunk.taken else name
            row = make_row(name, outcome, data, chunk.category, chunk.site)
            written.ids.append(name)
            written.items.append(outcome if outcome.mask is None else replace(outcome, mask=b""))
            yield row

    with ThreadPoolExecutor(chunk.num_threads) as pool:
        parts, _ = store.write_parts(chunk.category, rows())
    written.parts.extend(parts)
    return written


@dataclass(frozen=True)
class Rewrite:
    """A part file that is to be written again. keep: (rows,) bool.  ids: of rows that are to be called otherwise."""

    uri: str
    category: str
    entry: PartEntry
    keep: np.ndarray[Any, np.dtype[np.bool_]]
    ids: Mapping[int, str]


def rewrite_part(job: Rewrite) -> tuple[list[PartEntry], int]:
    """Writes the rows that stay to new files. Returns: these, and how many of the rows that go have a mask."""
    store = open_store(job.uri)
    masks = 0

    def rows() -> Iterator[Row]:
        nonlocal masks
        for number, row in enumerate(part_rows(store, job.category, [job.entry])):
            if job.keep[number]:
                yield {**row, "id": job.ids.get(number, row["id"])}
            else:
                masks += row["mask"] is not None

    return store.write_parts(job.category, rows())[0], masks


def part_rows(store: Store, category: str, entries: Sequence[PartEntry]) -> Iterator[Row]:
    """All rows of part files, in order, a row group in memory."""
    for entry in entries:
        with open_part(store, category, entry) as part:
            for group in range(part.num_row_groups):
                yield from with_groups(part.read_row_group(group)).to_pylist()


def settle_parts(
    store: Store,
    category: str,
    entries: Sequence[PartEntry],
    keep: np.ndarray[Any, np.dtype[np.bool_]],
    ids: Mapping[int, str],
    run: Mapper,
) -> tuple[list[PartEntry], list[str], int]:
    """Part files with the rows that stay, in order; those of which nothing changes are taken as they are.

    Args:
        keep: (rows of all entries,) bool.  ids: number of the row -> what it is called instead.

    Returns: the files, the names of new ones, and how many of the rows that go have a mask.
    """
    jobs: dict[int, Rewrite] = {}
    bounds = np.cumsum([0, *(sum(entry["row_group_rows"]) for entry in entries)])
    changed = np.array(sorted(ids), dtype=np.int64)
    for number, entry in enumerate(entries):
        first, last = int(bounds[number]), int(bounds[number + 1])
        renamed = changed[np.searchsorted(changed, first) : np.searchsorted(changed, last)].tolist()
        if renamed or not keep[first:last].all():
            own = {row - first: ids[row] for row in renamed}
            jobs[number] = Rewrite(store.uri, category, entry, keep[first:last], own)
    settled: list[list[PartEntry]] = [[entry] for entry in entries]
    masks = 0
    fresh: list[str] = []
    numbers = list(jobs)
    for place, (files, gone) in run(rewrite_part, list(jobs.values())):
        settled[numbers[place]] = files
        fresh += [entry["name"] for entry in files]
        masks += gone
    return list(itertools.chain.from_iterable(settled)), fresh, masks


def index_of_items(ids: Sequence[str], items: Sequence[Checked], site: str) -> pa.Table:
    """`INDEX_COLUMNS` of rows, from what is known of them."""
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
