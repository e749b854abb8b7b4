"""What is known of the files of a source: their bytes' digests, and what was made of them before."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from focus_ray.data.importers.base import ImportPlan, ImportSettings
from focus_ray.data.ingestion.check import Checked, Facts
from focus_ray.data.schema import SCHEMA_VERSION, SOURCE_COLUMNS
from focus_ray.data.source import SourcePath

Stamp = tuple[int, str]
"""`stamp_of` a file."""


def source_fingerprint(plan: ImportPlan, settings: ImportSettings, site: str, facts: Mapping[SourcePath, Facts]) -> str:
    """SHA-256 hex over every file's name, size and bytes, its meaning for the importer, its group, and the settings."""
    samples = sorted(plan.samples, key=lambda item: settings.relative(item.path))
    described = [
        [
            *(item.folder, item.split, item.label, item.defect_type),
            *([settings.relative(path), *facts[path]] for path in (item.path, *item.masks)),
        ]
        for item in samples
    ]
    planned = sorted([item.path, item.reason, item.detail] for item in plan.rejects)
    facts_of_source = [SCHEMA_VERSION, plan.category, site, described, planned]
    if settings.grouping is not None:  # without a rule, the fingerprint of programs before it
        facts_of_source += [settings.grouping.text, [item.group for item in samples]]
    text = json.dumps(facts_of_source)
    return hashlib.sha256(text.encode()).hexdigest()


def read_facts(path: SourcePath) -> tuple[Facts, Stamp]:
    """A local file's digest and, of the same moment, its stamp."""
    assert isinstance(path, Path)
    try:
        with path.open("rb") as stream:
            found = os.fstat(stream.fileno())
            digest = hashlib.sha256()
            size = 0
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
                size += len(chunk)
            return (size, digest.hexdigest()), (found.st_size, str(found.st_mtime_ns))
    except OSError as error:
        return (-1, str(error.errno)), (-1, "")  # rejected when it is checked


def source_table(
    facts: Mapping[SourcePath, Facts], stamps: Mapping[SourcePath, Stamp], items: Iterable[Checked]
) -> pa.Table:
    """`SOURCE_COLUMNS` of files that were read. items: of images that could be used."""
    hashes = {item.sample.path: item.content_hash for item in items}
    rows = [path for path in facts if _printable(str(path))]
    columns = {
        "path": [str(path) for path in rows],
        "num_bytes": [facts[path][0] for path in rows],
        "stamp": [stamps[path][1] for path in rows],
        "digest": [facts[path][1] for path in rows],
        "content_hash": [hashes.get(path) for path in rows],
    }
    return pa.table(columns, schema=SOURCE_COLUMNS)


def _printable(path: str) -> bool:
    """Whether it is UTF-8, as Parquet's strings are."""
    return not any("\ud800" <= letter <= "\udfff" for letter in path)


def joined_sources(former: pa.Table | None, new: pa.Table) -> pa.Table:
    """Of a file that both name, what is new."""
    if former is None:
        return new
    other = pc.invert(pc.is_in(former["path"], value_set=new["path"].combine_chunks()))
    return pa.concat_tables([former.filter(other), new])


class Known:
    """What a version's `SOURCE_COLUMNS` tell of some files."""

    def __init__(self, table: pa.Table | None, paths: Iterable[SourcePath]) -> None:
        table = SOURCE_COLUMNS.empty_table() if table is None else table
        asked = pa.array([str(path) for path in paths if _printable(str(path))], pa.string())
        part = table.filter(pc.is_in(table["path"], value_set=asked)).to_pylist()
        self._rows = {row["path"]: row for row in part}

    def facts(self, paths: Sequence[SourcePath], stamps: Mapping[SourcePath, Stamp]) -> dict[SourcePath, Facts]:
        """Of the files that have the size and the stamp that they had, their digests."""
        found = {}
        for path in paths:
            row = self._rows.get(str(path))
            if row is not None and stamps[path] == (row["num_bytes"], row["stamp"]) and row["num_bytes"] >= 0:
                found[path] = row["num_bytes"], row["digest"]
        return found

    def has_size(self, path: SourcePath, stamp: Stamp) -> bool:
        """Whether it was read before, and had this size."""
        row = self._rows.get(str(path))
        return row is not None and row["num_bytes"] == stamp[0] >= 0

    def content_hash(self, path: SourcePath, facts: Facts) -> str | None:
        """Of the pixels, where the file has the bytes that it had and they could be used."""
        row = self._rows.get(str(path))
        same = row is not None and facts == (row["num_bytes"], row["digest"])
        return row["content_hash"] if row is not None and same else None


def all_files(plan: ImportPlan) -> list[SourcePath]:
    """Every file that its samples name, once."""
    return list(dict.fromkeys(itertools.chain.from_iterable((item.path, *item.masks) for item in plan.samples)))
