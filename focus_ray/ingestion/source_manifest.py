"""The source manifest: digests of the source files of a category, stored with each version to recognise unchanged files.

A file is recognised on S3 by its ETag, on a disk that many machines share by its size and time of change, and on a local disk by
its digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from focus_ray.data.commits import Commit
from focus_ray.data.importers.base import ImportPlan, ImportSettings, Sample
from focus_ray.data.schema import SCHEMA_VERSION, SOURCE_SCHEMA
from focus_ray.data.source import SourcePath
from focus_ray.ingestion.check import CheckedSample, FileDigest, compute_digest, read_content
from focus_ray.names import is_utf8

SourceStamp = tuple[int, str]
"""Stamp of a file, see `data.source.read_source_stamp`."""

ManifestRows = Mapping[str, Mapping[str, Any]]
"""Rows of a source manifest: path -> values of `SOURCE_SCHEMA`."""


def list_source_files(samples: Iterable[Sample]) -> list[SourcePath]:
    """Returns every file of the samples (images and masks) once."""
    return list(dict.fromkeys(path for sample in samples for path in (sample.path, *sample.masks)))


def compute_source_fingerprint(
    plan: ImportPlan, settings: ImportSettings, site: str, digests: Mapping[SourcePath, FileDigest]
) -> str:
    """Returns the fingerprint of a source. If two fingerprints are equal, ingestions of the sources give the same rows.

    It is the SHA-256 hex of these facts: schema version, category and site; path, size and digest of each file; split, label,
    type of defect and group of each image; the files that the importer rejects; and the group rule.

    Args: digests: digest of each image and mask of the plan.
    """
    samples = sorted(plan.samples, key=lambda item: settings.relative(item.path))
    sample_facts = [
        [
            *(item.folder, item.split, item.label, item.defect_type),
            *([settings.relative(path), *digests[path]] for path in (item.path, *item.masks)),
        ]
        for item in samples
    ]
    reject_facts = sorted([item.path, item.reason, item.detail] for item in plan.rejects)
    source_facts = [SCHEMA_VERSION, plan.category, site, sample_facts, reject_facts]
    if settings.grouping is not None:  # without a rule the fingerprint is the same as in versions before groups existed
        source_facts += [settings.grouping.text, [item.group for item in samples]]
    text = json.dumps(source_facts)
    return hashlib.sha256(text.encode()).hexdigest()


def change_fingerprint(previous: Commit, change: str, values: Iterable[str]) -> str:
    """Returns the fingerprint of a changed version, which no source has, so that a later ingestion replaces it.

    Args:
        change: the kind of the change.
        values: content hashes or ids of the changed rows.
    """
    return hashlib.sha256(json.dumps([previous["source_fingerprint"], change, sorted(values)]).encode()).hexdigest()


def build_source_table(
    digests: Mapping[SourcePath, FileDigest], stamps: Mapping[SourcePath, SourceStamp], items: Iterable[CheckedSample]
) -> pa.Table:
    """Returns the source manifest, of `SOURCE_SCHEMA`, with one row per file.

    Args:
        digests: digest of each file; its keys are the files of the manifest.
        stamps: stamp of each file.
        items: the images without errors, for their content hashes.
    """
    hashes = {item.sample.path: item.content_hash for item in items}
    paths = [path for path in digests if is_utf8(str(path))]  # Parquet requires UTF-8 of strings
    columns = {
        "path": [str(path) for path in paths],
        "num_bytes": [digests[path][0] for path in paths],
        "stamp": [stamps[path][1] for path in paths],
        "digest": [digests[path][1] for path in paths],
        "content_hash": [hashes.get(path) for path in paths],
    }
    return pa.table(columns, schema=SOURCE_SCHEMA)


def merge_source_tables(previous: pa.Table | None, new: pa.Table) -> pa.Table:
    """Returns the union of two source manifests. A file in both has its row from the new manifest."""
    if previous is None:
        return new
    is_only_previous = pc.invert(pc.is_in(previous["path"], value_set=new["path"].combine_chunks()))
    return pa.concat_tables([previous.filter(is_only_previous), new])


def find_manifest_rows(table: pa.Table | None, paths: Iterable[SourcePath]) -> ManifestRows:
    """Returns the rows of a source manifest for these files. table: None if the version has no manifest."""
    if table is None:
        return {}
    path_texts = pa.array([text for text in map(str, paths) if is_utf8(text)], pa.string())
    return {row["path"]: row for row in table.filter(pc.is_in(table["path"], value_set=path_texts)).to_pylist()}


def find_digests(
    rows: ManifestRows, stamps: Mapping[SourcePath, SourceStamp], trusts_stamps: bool, num_threads: int
) -> dict[SourcePath, FileDigest]:
    """Returns the digests of source files that may be unchanged since the last ingestion.

    If stamps are trusted, a file with the size and stamp of the manifest counts as unchanged, and its digest is taken from the
    manifest. Otherwise, every file with the size of the manifest is read to compute its digest, which may have changed.

    Args: stamps: stamp of each source file.
    """

    def may_be_unchanged(path: SourcePath, stamp: SourceStamp) -> bool:
        row = rows.get(str(path))
        if row is None or row["num_bytes"] != stamp[0] or stamp[0] < 0:
            return False
        return not trusts_stamps or row["stamp"] == stamp[1]

    paths = [path for path, stamp in stamps.items() if may_be_unchanged(path, stamp)]
    if trusts_stamps:
        return {path: (rows[str(path)]["num_bytes"], rows[str(path)]["digest"]) for path in paths}
    with ThreadPoolExecutor(num_threads) as pool:
        return dict(zip(paths, pool.map(lambda path: compute_digest(read_content(path)), paths), strict=True))


def find_content_hash(rows: ManifestRows, path: SourcePath, digest: FileDigest | None) -> str | None:
    """Returns the content hash of an image from the manifest.

    Returns: None if the file is not in the manifest, has another digest there, or is not an image without errors.
    """
    row = rows.get(str(path))
    return row["content_hash"] if row is not None and digest == (row["num_bytes"], row["digest"]) else None
