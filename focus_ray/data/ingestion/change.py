"""Changes of a category that is there: rows taken out, small part files joined, what is stale removed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from focus_ray.data import store as stores
from focus_ray.data.commits import Commit, PartEntry, stale
from focus_ray.data.ingestion.chunks import map_here, part_rows, settle_parts
from focus_ray.data.read import index_of, list_categories
from focus_ray.data.store import Draft, Store, open_store
from focus_ray.errors import DataError

_SHOWN = 5  # of what is not there


@dataclass(frozen=True)
class RemoveReport:
    """num_removed, num_left: rows.  num_rewritten: part files that held some of them, of num_parts."""

    category: str
    num_removed: int
    num_left: int
    num_rewritten: int
    num_parts: int

    def __str__(self) -> str:
        return (
            f"{self.category}: {self.num_removed} images taken out, {self.num_left} left; {self.num_rewritten} of "
            f"{self.num_parts} part files written again"
        )


def remove_rows(
    uri: str | Path,
    category: str,
    ids: Collection[str] = (),
    content_hashes: Collection[str] = (),
    site: str | None = None,
) -> RemoveReport:
    """Takes rows out of a category: those of these ids, these hashes, and this site. Only part files that hold them are written
    again; readers of the version before keep it for a day.

    Raises: DataError: one is not there; nothing would be left; nothing was named.
    """
    if not ids and not content_hashes and site is None:
        raise DataError("nothing to take out: name ids, content hashes or a site")
    store = open_store(uri)
    store.need_commit(category)
    report: list[RemoveReport] = []

    def draft(former: Commit | None) -> Draft:
        if former is None:
            raise DataError(f"{uri}: category {category!r} has gone meanwhile")
        index = index_of(store, category, former)
        gone = np.zeros(index.num_rows, dtype=bool)
        asked = (("id", "ids", ids), ("content_hash", "content hashes", content_hashes))
        for column, words, values in (*asked, ("site", "site", [] if site is None else [site])):
            gone |= _having(index, column, words, values, f"{uri}: category {category!r}")
        if gone.all():
            raise DataError(
                f"{uri}: category {category!r}: all of its {len(gone)} images would go: to be rid of the category remove its "
                f"folder, {store.folder(category)}"
            )
        files, made, num_masks = settle_parts(store, category, former["files"], ~gone, {}, map_here)
        counts = dict(former["counts"])
        lost = index.filter(pa.array(gone))
        for split, label in zip(lost["split"].to_pylist(), lost["label"].to_pylist(), strict=True):
            name = "num_train" if split == "train" else "num_test_anomalous" if label else "num_test_normal"
            counts[name] -= 1
        counts["num_masks"] -= num_masks
        kept = {entry["name"] for entry in files}
        rewritten = sum(entry["name"] not in kept for entry in former["files"])
        report[:] = [RemoveReport(category, int(gone.sum()), int((~gone).sum()), rewritten, len(former["files"]))]
        fingerprint = _after(former, "remove", lost["id"].to_pylist())
        sources = store.sources(category, former)
        return Draft(files, index.filter(pa.array(~gone)), sources, fingerprint, counts, fresh=made)

    store.publish(category, draft)
    return report[0]


def _having(index: pa.Table, column: str, words: str, values: Collection[str], where: str) -> np.ndarray:
    """(rows,) bool: which have one of the values. Raises: DataError: no row has one of them."""
    asked = sorted(set(values))
    found = pc.is_in(index[column], value_set=pa.array(asked, pa.string()))
    there = set(pc.unique(index[column].filter(found)).to_pylist())
    missing = [value for value in asked if value not in there]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise DataError(
            f"{where}: no image of the {words} {', '.join(missing[:_SHOWN])}{more}; nothing was taken out. read_index lists "
            "what there is"
        )
    return np.asarray(found.to_numpy(), dtype=bool)


def _after(former: Commit, what: str, ids: Sequence[str]) -> str:
    """A fingerprint that no source has: ingesting the source again then brings back what is gone."""
    return hashlib.sha256(json.dumps([former["source_fingerprint"], what, sorted(ids)]).encode()).hexdigest()


@dataclass(frozen=True)
class CompactReport:
    """num_before, num_after: part files.  num_stale: files removed that nobody can be using any more."""

    category: str
    num_before: int
    num_after: int
    num_stale: int

    def __str__(self) -> str:
        return (
            f"{self.category}: {self.num_before} part files, now {self.num_after}; {self.num_stale} stale files removed"
        )


def compact(uri: str | Path, categories: Sequence[str] | None = None) -> list[CompactReport]:
    """Joins small part files that follow each other into full ones, and removes what is stale; rows and their order stay.

    Args: categories: None takes all.

    Raises: DataError: no such category; the storage fails.
    """
    store = open_store(uri)
    names = list_categories(uri) if categories is None else list(dict.fromkeys(categories))
    for name in names:
        store.need_commit(name)
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda name: _compact(store, name), names))


def _compact(store: Store, category: str) -> CompactReport:
    counts = [0, 0]

    def draft(former: Commit | None) -> Draft | None:
        if former is None:
            raise DataError(f"{store.uri}: category {category!r} has gone meanwhile")
        groups = small_runs(former["files"])
        files: list[PartEntry] = []
        made: list[PartEntry] = []
        for group in groups:
            if len(group) > 1:
                joined = store.write_parts(category, part_rows(store, category, group))[0]
                made += joined
                files += joined
            else:
                files += group
        counts[:] = [len(former["files"]), len(files)]
        if not made:
            return None
        index = index_of(store, category, former)
        sources = store.sources(category, former)
        fresh = [entry["name"] for entry in made]
        return Draft(files, index, sources, former["source_fingerprint"], former["counts"], fresh=fresh)

    store.publish(category, draft)
    commit = store.need_commit(category)
    old = stale(store.files(category), commit, datetime.now(timezone.utc))
    store.discard(category, old)
    return CompactReport(category, counts[0], counts[1], len(old))


def small_runs(files: Sequence[PartEntry]) -> list[list[PartEntry]]:
    """The part files in order, neighbours of less than half a full one together."""
    runs: list[list[PartEntry]] = []
    for entry in files:
        small = entry["num_bytes"] < stores.FILE_BYTES // 2
        if small and runs and runs[-1][-1]["num_bytes"] < stores.FILE_BYTES // 2:
            runs[-1].append(entry)
        else:
            runs.append([entry])
    return runs
