"""The source manifest: digests of the source files of a category, stored with each version to recognise unchanged files."""

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
from focus_ray.data.schema import SCHEMA_VERSION, SOURCE_SCHEMA
from focus_ray.data.source import SourcePath
from focus_ray.ingestion.check import CheckedSample, FileDigest

SourceStamp = tuple[int, str]
"""Stamp of a file, see `read_source_stamp`."""


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


def read_file_digest(path: SourcePath) -> tuple[FileDigest, SourceStamp]:
    """Reads a local file, and returns its digest and its stamp, both from one opening of the file.

    Returns: size and SHA-256 hex; size and time of change. If the file cannot be read, both sizes are -1.
    """
    assert isinstance(path, Path)
    try:
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            digest = hashlib.sha256()
            size = 0
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
                size += len(chunk)
            return (size, digest.hexdigest()), (status.st_size, str(status.st_mtime_ns))
    except OSError as error:
        return (-1, str(error.errno)), (-1, "")  # the check of the sample will reject the file


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
    paths = [path for path in digests if _is_utf8_text(str(path))]
    columns = {
        "path": [str(path) for path in paths],
        "num_bytes": [digests[path][0] for path in paths],
        "stamp": [stamps[path][1] for path in paths],
        "digest": [digests[path][1] for path in paths],
        "content_hash": [hashes.get(path) for path in paths],
    }
    return pa.table(columns, schema=SOURCE_SCHEMA)


def _is_utf8_text(path: str) -> bool:
    """Returns whether a path can be encoded as UTF-8, which Parquet requires of strings."""
    return not any("\ud800" <= letter <= "\udfff" for letter in path)


def merge_source_tables(previous: pa.Table | None, new: pa.Table) -> pa.Table:
    """Returns the union of two source manifests. A file in both has its row from the new manifest."""
    if previous is None:
        return new
    is_only_previous = pc.invert(pc.is_in(previous["path"], value_set=new["path"].combine_chunks()))
    return pa.concat_tables([previous.filter(is_only_previous), new])


class SourceManifest:
    """The source manifest of a version, for looking up some of its files."""

    def __init__(self, table: pa.Table | None, paths: Iterable[SourcePath]) -> None:
        """
        Args:
            table: of `SOURCE_SCHEMA`; None if the version has no manifest.
            paths: the files to look up.
        """
        table = SOURCE_SCHEMA.empty_table() if table is None else table
        path_texts = pa.array([str(path) for path in paths if _is_utf8_text(str(path))], pa.string())
        rows = table.filter(pc.is_in(table["path"], value_set=path_texts)).to_pylist()
        self._rows = {row["path"]: row for row in rows}

    def unchanged_digests(
        self, paths: Sequence[SourcePath], stamps: Mapping[SourcePath, SourceStamp]
    ) -> dict[SourcePath, FileDigest]:
        """Returns the digests of the files whose size and stamp are the same as in the manifest, without reading the files."""
        digests = {}
        for path in paths:
            row = self._rows.get(str(path))
            if row is not None and stamps[path] == (row["num_bytes"], row["stamp"]) and row["num_bytes"] >= 0:
                digests[path] = row["num_bytes"], row["digest"]
        return digests

    def has_same_size(self, path: SourcePath, stamp: SourceStamp) -> bool:
        """Returns whether a file is in the manifest with the size of this stamp."""
        row = self._rows.get(str(path))
        return row is not None and row["num_bytes"] == stamp[0] >= 0

    def content_hash(self, path: SourcePath, digest: FileDigest) -> str | None:
        """Returns the content hash of an image from the manifest.

        Returns: None if the file is not in the manifest, has another digest there, or is not an image without errors.
        """
        row = self._rows.get(str(path))
        is_same = row is not None and digest == (row["num_bytes"], row["digest"])
        return row["content_hash"] if row is not None and is_same else None


def list_plan_files(plan: ImportPlan) -> list[SourcePath]:
    """Returns every file of the samples of a plan (images and masks) once."""
    return list(dict.fromkeys(itertools.chain.from_iterable((item.path, *item.masks) for item in plan.samples)))
