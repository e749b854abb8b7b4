"""Ingests small sources without a progress bar, and reads the resulting data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from focus_ray.data.commits import Commit
from focus_ray.data.read import read_index, read_rows
from focus_ray.data.schema import SCHEMA
from focus_ray.data.store import open_data_set
from focus_ray.ingestion.ingest import ingest
from focus_ray.ingestion.report import IngestReport


def ingest_quietly(source: Path, out: Path, **options: Any) -> IngestReport:
    return ingest(source, out, progress=False, **options)


def append_quietly(source: Path, out: Path, **options: Any) -> IngestReport:
    return ingest_quietly(source, out, append=True, **options)


def rows_of(root: Path, category: str = "bolt", version: str | None = None) -> list[dict[str, Any]]:
    """Returns all rows of a category, with all columns."""
    numbers = read_index(root, category, version=version)["row"].to_numpy()
    return list(read_rows(root, category, numbers, SCHEMA.names, version))


def ids_of(root: Path) -> list[str]:
    """Returns the row ids of the category bolt, without its name."""
    return [name.removeprefix("bolt/") for name in read_index(root, "bolt")["id"].to_pylist()]


def commit_of(root: Path, category: str = "bolt") -> Commit:
    return open_data_set(root).require_commit(category)


def part_names(root: Path) -> list[str]:
    """Returns the names of the part files of the category bolt."""
    return [entry["name"] for entry in commit_of(root)["files"]]
