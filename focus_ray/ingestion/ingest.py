"""Ingests folders of images into a data set: checks every file, and publishes each category as a whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from focus_ray.data.importers.base import ImportSettings
from focus_ray.data.importers.choose import make_import_plans
from focus_ray.data.importers.groups import GroupRule, parse_group_rule
from focus_ray.data.importers.registry import IMPORTERS
from focus_ray.data.schema import RejectedFile
from focus_ray.data.source import open_source_folder
from focus_ray.errors import DataError
from focus_ray.ingestion.category import ingest_categories
from focus_ray.ingestion.chunks import IngestOptions, Mapper, map_in_process
from focus_ray.ingestion.report import CategoryReport, IngestReport
from focus_ray.storage.files import is_s3_uri

_NUM_S3_THREADS = 16  # threads that read and decode: the time of small files is mostly the latency of S3


def ingest(
    source: str | Path,
    destination: str | Path,
    format: str = "auto",
    categories: Sequence[str] | None = None,
    site: str = "default",
    progress: bool = True,
    test_share: float = 0.2,
    seed: int = 0,
    num_threads: int | None = None,
    append: bool = False,
    run: Mapper | None = None,
    group_by: str | GroupRule | None = None,
) -> IngestReport:
    """Checks folders of images, and publishes the images that pass as a Parquet data set, category by category.

    A category whose files and settings have not changed since the last ingestion stays, and is reported as "unchanged". Any
    other category is replaced as a whole or, for an append, extended. RAM holds the row data of all
    categories (no images or masks), and the images of about one part file.

    Args:
        source: a local folder or an s3:// prefix: one category, or a folder of categories.
        destination: root of the data set, a local path or an s3:// URI.
        format: name of the folder layout; auto recognises it, and the report names it.
        categories: the categories to ingest; None takes all.
        site: name of the site of the images, stored in each row.
        progress: show a bar on standard error.
        test_share: share of the normal images that becomes test data if the source defines no split (layout folder, and VisA
            without its split table).
        seed: seed for the choice of these test images.
        num_threads: threads that decode. None takes one per CPU and at most 8, or 16 if the source is on S3.
        append: add new images to the existing categories, instead of replacing the categories.
        run: calls the functions that read and write chunks of images, see `ingestion.cluster.ingest_on_cluster`; None calls them
            in this process.
        group_by: names the part or burst that each image shows: name:REGEX, folder:LEVEL, table:FILE:COLUMN or time:SECONDS;
            docs/use/data.md explains them. None makes each image its own group.

    Returns:
        The report of all categories.

    Raises:
        DataError: an argument is invalid, the source has no category or an ambiguous or unexpected layout, a category has no
            usable image (all other categories are published first), the storage fails, or the group rule is invalid or fits no
            image.
    """
    if format != "auto" and format not in IMPORTERS.import_paths:
        raise DataError(f"format={format!r}: expected one of auto, {', '.join(IMPORTERS)}")
    if not 0.0 <= test_share < 1.0:
        raise DataError(f"test_share={test_share}: expected a share in [0, 1)")
    if not site or site != site.strip() or not site.isprintable():
        raise DataError(f"site={site!r}: expected a name without spaces around it or control characters")
    root = open_source_folder(source)
    rule = parse_group_rule(group_by, root) if isinstance(group_by, str) else group_by
    settings = ImportSettings(root, test_share, seed, rule)
    chosen, plans, notes = make_import_plans(root, format, categories, settings)

    threads = num_threads or (_NUM_S3_THREADS if is_s3_uri(source) else min(8, os.cpu_count() or 1))
    trusts_stamps = is_s3_uri(source) or run is not None
    options = IngestOptions(str(destination), settings, site, threads, append, trusts_stamps, run or map_in_process)
    reports: list[CategoryReport] = []
    rejects: list[RejectedFile] = []
    unusable: list[str] = []
    for category in ingest_categories(plans, options, progress):
        rejects += category.rejects
        notes += category.plan.notes + category.notes
        if category.report is None:
            examples = "; ".join(f"{item.path}: {item.detail}" for item in category.rejects[:3]) or "it has no images"
            unusable.append(f"{category.plan.category} ({len(category.rejects)} rejected: {examples})")
        else:
            reports.append(category.report)
    if unusable:
        raise DataError(
            f"{source}: no usable image in {'; '.join(unusable)}. Published: "
            f"{', '.join(item.name for item in reports) or 'nothing'}"
        )
    return IngestReport(chosen, tuple(reports), tuple(rejects), tuple(notes))
