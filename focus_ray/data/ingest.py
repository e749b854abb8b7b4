"""From folders of images to a data set: every file checked, each category published as a whole, or added to."""

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
from focus_ray.data.ingestion.check import Checked, check, make_row, read_files
from focus_ray.data.ingestion.chunks import Mapper, map_here
from focus_ray.data.ingestion.known import all_files, read_facts, source_fingerprint, source_table
from focus_ray.data.ingestion.pieces import Pieces, ingest_pieces, unchanged_outcome
from focus_ray.data.ingestion.report import (
    CategoryReport,
    IngestReport,
    Outcome,
    count_groups,
    count_rows,
    plausibility,
    shared_groups_note,
)
from focus_ray.data.ingestion.unique import make_ids, without_duplicates
from focus_ray.data.schema import Reject, Row
from focus_ray.data.source import open_source
from focus_ray.data.store import Draft, Store, open_store
from focus_ray.errors import DataError
from focus_ray.kinds import IMPORTERS
from focus_ray.storage import is_s3

_S3_THREADS = 16  # that read and decode: most of a small file's time is the store's answer


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
    """Reads, checks and publishes folders of images as Parquet, category by category.

    A category whose files and settings are those of the last run is left as it is and reported as "unchanged"; any
    other is replaced as a whole, or added to. Of each category the memory holds row data, masks and a row group, not the
    images; from S3, and for an append, a part file's images.

    Args:
        source: a local folder or an s3:// prefix: one category, or a folder of categories.
        destination: root of the data set, a local path or an s3:// URI.
        format: the shape of the folders; auto recognises it and the report says which it took.
        categories: only these; None takes all.
        site: where the images come from, kept in each row.
        progress: show a bar on standard error.
        test_share: share of the normal images that becomes test data where the source has no split (folder, and VisA
            without its split table).  seed: chooses them.
        num_threads: threads that decode; None takes one a CPU, at most 8, and 16 from S3.
        append: add what a category does not have yet, instead of replacing it.
        group_by: names the part or burst that each image shows: name:REGEX, folder:LEVEL, table:FILE:COLUMN or time:SECONDS;
            docs/use/data.md explains them. None: each image is its own group.
        run: where pieces are read and written, as `cluster.ingest.on_cluster` gives it; None takes this process.

    Raises: DataError: no category, nothing usable in one (the others are published first), a failing storage, or a group rule
        that is malformed or fits no image.
    """
    if format != "auto" and format not in IMPORTERS.places:
        raise DataError(f"format={format!r}: expected auto, {', '.join(IMPORTERS)}")
    if not 0.0 <= test_share < 1.0:
        raise DataError(f"test_share={test_share}: expected a share in [0, 1)")
    if not site or site != site.strip() or not site.isprintable():
        raise DataError(f"site={site!r}: expected a name without spaces around it or control characters")
    root = open_source(source)
    rule = parse_group_rule(group_by, root) if isinstance(group_by, str) else group_by
    settings = ImportSettings(root, test_share, seed, rule)
    chosen, plans, notes = make_plans(root, format, categories, settings)

    store = open_store(destination)
    threads = num_threads or (_S3_THREADS if is_s3(source) else min(8, os.cpu_count() or 1))
    if append or run is not None or is_s3(source):
        trusts = is_s3(source) or run is not None
        how = Pieces(store, settings, site, threads, append, trusts, run or map_here)
        outcomes = ingest_pieces(plans, how, progress)
    else:
        outcomes = [_ingest_category(plan, store, settings, site, threads, progress) for plan in plans]
    reports: list[CategoryReport] = []
    rejects: list[Reject] = []
    unusable: list[str] = []
    for plan, (report, rejected, extra_notes) in zip(plans, outcomes, strict=True):
        rejects += rejected
        notes += plan.notes + extra_notes
        if report is None:
            first = "; ".join(f"{item.path}: {item.detail}" for item in rejected[:3]) or "it has no images"
            unusable.append(f"{plan.category} ({len(rejected)} rejected: {first})")
        else:
            reports.append(report)
    if unusable:
        raise DataError(
            f"{source}: nothing usable in {'; '.join(unusable)}. Published: "
            f"{', '.join(item.name for item in reports) or 'nothing'}"
        )
    return IngestReport(chosen, tuple(reports), tuple(rejects), tuple(notes))


def _ingest_category(
    plan: ImportPlan, store: Store, settings: ImportSettings, site: str, num_threads: int, progress: bool
) -> Outcome:
    """One category of a local folder in this process: all is checked first, and read again as it is written."""
    bar = tqdm(total=len(plan.samples), desc=plan.category, unit="image", disable=not progress)
    with ThreadPoolExecutor(num_threads) as pool, bar:
        paths = all_files(plan)
        read = dict(zip(paths, pool.map(read_facts, paths), strict=True))
        facts = {path: found for path, (found, _) in read.items()}
        fingerprint = source_fingerprint(plan, settings, site, facts)
        former = store.commit(plan.category)
        if former and former["source_fingerprint"] == fingerprint and store.is_whole(plan.category, former):
            return unchanged_outcome(plan, store, former, settings)

        store.check_writable()
        checked: list[Checked] = []
        rejects = list(plan.rejects)
        jobs = pool.map(lambda sample: check(sample, read_files(sample), plan.category, settings), plan.samples)
        for outcome in jobs:
            bar.update()
            if isinstance(outcome, Reject):
                rejects.append(outcome)
            else:
                checked.append(outcome)
        kept, duplicates = without_duplicates(checked, plan.category, settings)
        rejects = sorted(rejects + duplicates, key=lambda item: (item.path, item.reason))
        notes = [f"{settings.relative(item.sample.path)}: {item.note}" for item in kept if item.note]
        if not kept:
            store.write_rejects(plan.category, rejects)
            return None, rejects, notes
        ids = make_ids([item.sample for item in kept], plan.category)
        named = sorted(zip(ids, kept, strict=True), key=lambda pair: pair[0])
        counts = count_rows(kept)
        parts, index = store.write_parts(
            plan.category, (_read_row(name, item, plan.category, site) for name, item in named)
        )
        sources = source_table(facts, {path: stamp for path, (_, stamp) in read.items()}, checked)

        def draft(former: Commit | None) -> Draft:
            return Draft(parts, index, sources, fingerprint, counts, rejects)

        store.publish(plan.category, draft, parts)
    notes += plausibility(plan.category, counts, kept, settings)
    groups = count_groups(index)
    notes += shared_groups_note(plan.category, groups)
    report = CategoryReport(
        plan.category, "written", **counts, folders=tuple(plan.folders), num_train_groups=groups.num_train
    )
    return report, rejects, notes


def _read_row(name: str, item: Checked, category: str, site: str) -> Row:
    try:
        data = item.sample.path.read_bytes()
    except OSError as error:
        raise DataError(f"{item.sample.path}: vanished while being ingested ({error}): run it again") from error
    if hashlib.sha256(data).hexdigest() != item.digest:
        raise DataError(f"{item.sample.path}: changed while being ingested: run it again once the source rests")
    return make_row(name, item, data, category, site)
