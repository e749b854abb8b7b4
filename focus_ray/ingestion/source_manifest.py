"""The source manifest: a table of the source files of a category, stored with each version to recognise unchanged files.

It contains size, stamp and digest of each file. A file is recognised on S3 by its ETag, on a disk that many machines share by
its size and time of change, and on a local disk by its digest.
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
from focus_ray.data.importers.base import ImportPlan, ImportSettings, SourceImage
from focus_ray.data.schema import SCHEMA_VERSION, SOURCE_SCHEMA
from focus_ray.data.source import SourcePath
from focus_ray.ingestion.check import CheckedSample, FileDigest, compute_file_digest, read_source_file
from focus_ray.names import is_valid_utf8

SourceStamp = tuple[int, str]
"""Stamp of a file, see `data.source.read_size_and_change_mark`."""

ManifestRows = Mapping[str, Mapping[str, Any]]
"""Rows of a source manifest: path -> values of `SOURCE_SCHEMA`."""


def list_source_files(samples: Iterable[SourceImage]) -> list[SourcePath]:
    """Returns all files of the samples, images and masks, each once."""
    return list(dict.fromkeys(path for sample in samples for path in (sample.path, *sample.masks)))


def compute_source_fingerprint(
    plan: ImportPlan, settings: ImportSettings, site: str, digests: Mapping[SourcePath, FileDigest]
) -> str:
    """Returns a hash of a source. If two hashes are equal, ingestions of the sources give the same rows.

    It is the SHA-256 hex of these facts: schema version, category and site; path, size and digest of each file; split, label,
    type of defect and group of each image; the files that the importer rejects; and the group rule.

    Args:
        plan: the images of the category.
        settings: the settings of the ingestion.
        site: name of the site, stored in each row.
        digests: digest (size and SHA-256) of each image and mask of the plan.
    """
    samples = sorted(plan.samples, key=lambda item: settings.describe_path(item.path))
    sample_facts = [
        [
            *(item.folder, item.split, item.label, item.defect_type),
            *([settings.describe_path(path), *digests[path]] for path in (item.path, *item.masks)),
        ]
        for item in samples
    ]
    reject_facts = sorted([item.path, item.reason, item.detail] for item in plan.rejects)
    source_facts = [SCHEMA_VERSION, plan.category, site, sample_facts, reject_facts]
    if settings.grouping is not None:  # without a rule the fingerprint is the same as in versions before groups existed
        source_facts += [settings.grouping.text, [item.group for item in samples]]
    text = json.dumps(source_facts)
    return hashlib.sha256(text.encode()).hexdigest()


def derive_fingerprint_after_change(previous: Commit, change: str, values: Iterable[str]) -> str:
    """Returns the source fingerprint of a version that was changed without a full ingestion.

    No source has this fingerprint, so a later ingestion replaces the version.

    Args:
        previous: the commit of the version before the change.
        change: the kind of the change, such as "append".
        values: content hashes or ids of the changed rows.
    """
    return hashlib.sha256(json.dumps([previous["source_fingerprint"], change, sorted(values)]).encode()).hexdigest()


def build_source_manifest(
    digests: Mapping[SourcePath, FileDigest], stamps: Mapping[SourcePath, SourceStamp], items: Iterable[CheckedSample]
) -> pa.Table:
    """Returns the source manifest, a table of `SOURCE_SCHEMA` with one row per source file.

    Files whose path is not valid UTF-8 are left out.

    Args:
        digests: digest (size and SHA-256) of each file; its keys are the files of the manifest.
        stamps: stamp (size and change mark) of each file.
        items: the images without errors, for their content hashes.
    """
    hashes = {item.sample.path: item.content_hash for item in items}
    paths = [path for path in digests if is_valid_utf8(str(path))]  # Parquet requires UTF-8 of strings
    columns = {
        "path": [str(path) for path in paths],
        "num_bytes": [digests[path][0] for path in paths],
        "stamp": [stamps[path][1] for path in paths],
        "digest": [digests[path][1] for path in paths],
        "content_hash": [hashes.get(path) for path in paths],
    }
    return pa.table(columns, schema=SOURCE_SCHEMA)


def merge_source_manifests(previous: pa.Table | None, new: pa.Table) -> pa.Table:
    """Returns the union of two source manifests. For a file in both, the row of the new manifest is taken.

    Args: previous: None returns `new`.
    """
    if previous is None:
        return new
    is_only_previous = pc.invert(pc.is_in(previous["path"], value_set=new["path"].combine_chunks()))
    return pa.concat_tables([previous.filter(is_only_previous), new])


def find_manifest_rows(table: pa.Table | None, paths: Iterable[SourcePath]) -> ManifestRows:
    """Returns the rows of a source manifest for some files: path -> row. Files without a row are left out.

    Args: table: the source manifest; None if the version has none, then the result is empty.
    """
    if table is None:
        return {}
    path_texts = pa.array([text for text in map(str, paths) if is_valid_utf8(text)], pa.string())
    return {row["path"]: row for row in table.filter(pc.is_in(table["path"], value_set=path_texts)).to_pylist()}


def find_digests_of_unchanged_files(
    rows: ManifestRows, stamps: Mapping[SourcePath, SourceStamp], trusts_stamps: bool, num_threads: int
) -> dict[SourcePath, FileDigest]:
    """Returns the digests (size and SHA-256) of source files that may be unchanged since the last ingestion.

    If stamps are trusted, a file with the size and stamp of the manifest counts as unchanged, and its digest is taken from the
    manifest. Otherwise, every file with the size of the manifest is read to compute its digest, which may have changed.

    Args:
        rows: path -> row of the manifest.
        stamps: stamp (size and change mark) of each source file.
        trusts_stamps: whether stamps are trusted.
        num_threads: threads that read files.

    Raises: DataError: the S3 storage fails.
    """

    def may_be_unchanged(path: SourcePath, stamp: SourceStamp) -> bool:
        """Returns whether a file has the size (and the stamp, if stamps are trusted) of its row in the manifest."""
        row = rows.get(str(path))
        if row is None or row["num_bytes"] != stamp[0] or stamp[0] < 0:
            return False
        return not trusts_stamps or row["stamp"] == stamp[1]

    paths = [path for path, stamp in stamps.items() if may_be_unchanged(path, stamp)]
    if trusts_stamps:
        return {path: (rows[str(path)]["num_bytes"], rows[str(path)]["digest"]) for path in paths}
    with ThreadPoolExecutor(num_threads) as pool:
        return dict(zip(paths, pool.map(lambda path: compute_file_digest(read_source_file(path)), paths), strict=True))


def find_stored_content_hash(rows: ManifestRows, path: SourcePath, digest: FileDigest | None) -> str | None:
    """Returns the hash of the pixels of an image, taken from the source manifest instead of reading the file.

    Args:
        rows: path -> row of the manifest.
        path: the image file.
        digest: current digest of the file; None if it is not known.

    Returns: None if the file is not in the manifest, has another digest there, or is not an image without errors.
    """
    row = rows.get(str(path))
    return row["content_hash"] if row is not None and digest == (row["num_bytes"], row["digest"]) else None
