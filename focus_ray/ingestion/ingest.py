"""Ingests folders of images into a data set: checks every file, and publishes each category as a whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from focus_ray.data.commits import Commit
from focus_ray.data.importers.base import ImportPlan, ImportSettings
from focus_ray.data.importers.choose import make_plans
from focus_ray.data.importers.groups import GroupRule, parse_group_rule
from focus_ray.data.schema import Reject, Row
from focus_ray.data.source import open_source
from focus_ray.data.store import CommitDraft, Store, open_store
from focus_ray.errors import DataError
from focus_ray.ingestion.check import CheckedSample, check_sample, make_row, read_sample_files
from focus_ray.ingestion.chunked_ingest import IngestOptions, ingest_in_chunks, report_unchanged
from focus_ray.ingestion.chunks import Mapper, map_in_process
from focus_ray.ingestion.deduplicate import make_row_ids, remove_duplicates
from focus_ray.ingestion.report import (
    CategoryOutcome,
    CategoryReport,
    IngestReport,
    count_groups,
    count_rows,
    find_implausible_data,
    shared_groups_note,
)
from focus_ray.ingestion.source_manifest import (
    build_source_table,
    compute_source_fingerprint,
    list_plan_files,
    read_file_digest,
)
from focus_ray.settings.kinds import IMPORTERS
from focus_ray.storage.files import is_s3

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
    """Checks folders of images, and publishes them as Parquet, category by category.

    A category whose files and settings have not changed since the last run stays, and is reported as "unchanged". Any other
    category is replaced as a whole or, for an append, extended. The memory contains the row data and masks of a category, and the
    images of one row group. If the source is on S3, and for an append, it contains the images of one part file.

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
        run: where chunks are read and written, from `cluster.ingest.on_cluster`; None takes this process.
        group_by: names the part or burst that each image shows: name:REGEX, folder:LEVEL, table:FILE:COLUMN or time:SECONDS;
            docs/use/data.md explains them. None makes each image its own group.

    Returns:
        The report of all categories.

    Raises:
        DataError: there is no category, a category has no usable image (all others are published first), the storage fails, or
            the group rule is invalid or fits no image.
    """
    if format != "auto" and format not in IMPORTERS.import_paths:
        raise DataError(f"format={format!r}: expected one of auto, {', '.join(IMPORTERS)}")
    if not 0.0 <= test_share < 1.0:
        raise DataError(f"test_share={test_share}: expected a share in [0, 1)")
    if not site or site != site.strip() or not site.isprintable():
        raise DataError(f"site={site!r}: expected a name without spaces around it or control characters")
    root = open_source(source)
    rule = parse_group_rule(group_by, root) if isinstance(group_by, str) else group_by
    settings = ImportSettings(root, test_share, seed, rule)
    chosen, plans, notes = make_plans(root, format, categories, settings)

    store = open_store(destination)
    threads = num_threads or (_NUM_S3_THREADS if is_s3(source) else min(8, os.cpu_count() or 1))
    if append or run is not None or is_s3(source):
        trusts_stamps = is_s3(source) or run is not None
        options = IngestOptions(store, settings, site, threads, append, trusts_stamps, run or map_in_process)
        outcomes = ingest_in_chunks(plans, options, progress)
    else:
        outcomes = [_ingest_category(plan, store, settings, site, threads, progress) for plan in plans]
    reports: list[CategoryReport] = []
    rejects: list[Reject] = []
    unusable: list[str] = []
    for plan, (report, category_rejects, category_notes) in zip(plans, outcomes, strict=True):
        rejects += category_rejects
        notes += plan.notes + category_notes
        if report is None:
            examples = "; ".join(f"{item.path}: {item.detail}" for item in category_rejects[:3]) or "it has no images"
            unusable.append(f"{plan.category} ({len(category_rejects)} rejected: {examples})")
        else:
            reports.append(report)
    if unusable:
        raise DataError(
            f"{source}: no usable image in {'; '.join(unusable)}. Published: "
            f"{', '.join(item.name for item in reports) or 'nothing'}"
        )
    return IngestReport(chosen, tuple(reports), tuple(rejects), tuple(notes))


def _ingest_category(
    plan: ImportPlan, store: Store, settings: ImportSettings, site: str, num_threads: int, progress: bool
) -> CategoryOutcome:
    """Ingests one category of a local folder in this process. Each image is read for its digest, its check and its row.

    Args: num_threads: threads that read and check images.
    """
    bar = tqdm(total=len(plan.samples), desc=plan.category, unit="image", disable=not progress)
    with ThreadPoolExecutor(num_threads) as pool, bar:
        paths = list_plan_files(plan)
        digests_and_stamps = dict(zip(paths, pool.map(read_file_digest, paths), strict=True))
        digests = {path: digest for path, (digest, _) in digests_and_stamps.items()}
        fingerprint = compute_source_fingerprint(plan, settings, site, digests)
        current = store.read_commit(plan.category)
        if current and current["source_fingerprint"] == fingerprint and store.is_complete(plan.category, current):
            return report_unchanged(plan, store, current, settings)

        store.check_writable()
        checked: list[CheckedSample] = []
        rejects = list(plan.rejects)
        outcomes = pool.map(
            lambda sample: check_sample(sample, read_sample_files(sample), plan.category, settings), plan.samples
        )
        for outcome in outcomes:
            bar.update()
            if isinstance(outcome, Reject):
                rejects.append(outcome)
            else:
                checked.append(outcome)
        items, duplicates = remove_duplicates(checked, plan.category, settings)
        rejects = sorted(rejects + duplicates, key=lambda item: (item.path, item.reason))
        notes = [f"{settings.relative(item.sample.path)}: {item.note}" for item in items if item.note]
        if not items:
            store.write_rejects(plan.category, rejects)
            return None, rejects, notes
        ids = make_row_ids([item.sample for item in items], plan.category)
        pairs = sorted(zip(ids, items, strict=True), key=lambda pair: pair[0])
        counts = count_rows(items)
        parts, index = store.write_parts(
            plan.category, (_read_row(row_id, item, plan.category, site) for row_id, item in pairs)
        )
        stamps = {path: stamp for path, (_, stamp) in digests_and_stamps.items()}
        sources = build_source_table(digests, stamps, checked)

        def build_draft(previous: Commit | None) -> CommitDraft:
            return CommitDraft(parts, index, sources, fingerprint, counts, rejects)

        store.publish(plan.category, build_draft, parts)
    notes += find_implausible_data(plan.category, counts, items, settings)
    groups = count_groups(index)
    notes += shared_groups_note(plan.category, groups)
    report = CategoryReport(
        plan.category, "written", **counts, folders=tuple(plan.folders), num_train_groups=groups.num_train
    )
    return report, rejects, notes


def _read_row(row_id: str, item: CheckedSample, category: str, site: str) -> Row:
    """Reads the image of a checked sample again, and returns its row. Raises: DataError: the file has changed since the check."""
    try:
        data = item.sample.path.read_bytes()
    except OSError as error:
        raise DataError(f"{item.sample.path}: deleted during the ingestion ({error}): run it again") from error
    if hashlib.sha256(data).hexdigest() != item.digest:
        raise DataError(
            f"{item.sample.path}: changed during the ingestion: run it again when nobody changes the source"
        )
    return make_row(row_id, item, data, category, site)
