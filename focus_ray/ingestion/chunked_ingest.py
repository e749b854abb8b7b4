"""Ingests categories in chunks: each file is read once, in this process or on many machines, and the results are then merged.

The rows, ids and rejects do not depend on the chunks; `ingest` in one process gives the same. A file that a version already
contains is not checked again. A file is recognised on S3 by its ETag, on a disk that many machines share by its size and time of
change, and on a local disk by its digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from focus_ray.data.commits import Commit, PartEntry
from focus_ray.data.importers.base import ImportPlan, ImportSettings, Sample
from focus_ray.data.read import load_commit_index
from focus_ray.data.schema import Reject
from focus_ray.data.source import SourcePath, read_source_stamp
from focus_ray.data.store import CommitDraft, Store
from focus_ray.ingestion.check import CheckedSample, FileDigest
from focus_ray.ingestion.chunks import (
    Chunk,
    ChunkResult,
    Mapper,
    build_index,
    list_source_files,
    make_chunks,
    rewrite_parts,
    write_chunk,
)
from focus_ray.ingestion.deduplicate import choose_unused_ids, deduplicate_against, make_row_ids, remove_duplicates
from focus_ray.ingestion.report import (
    CategoryOutcome,
    CategoryReport,
    GroupCounts,
    count_groups,
    count_rows,
    find_implausible_data,
    shared_groups_note,
)
from focus_ray.ingestion.source_manifest import (
    SourceManifest,
    SourceStamp,
    build_source_table,
    compute_source_fingerprint,
    list_plan_files,
    merge_source_tables,
    read_file_digest,
)

_NUM_PREPARERS, _NUM_FINISHERS = 16, 4  # threads that prepare and that finish categories


@dataclass(frozen=True)
class IngestOptions:
    """How to ingest categories in chunks.

    Attributes:
        site: name of the site, stored in each row.
        num_threads: threads per chunk that read and check images.
        append: add new images to the existing categories, instead of replacing the categories.
        trusts_stamps: whether a file with the same size and stamp counts as unchanged without being read.
        run: calls `write_chunk` and `rewrite_part` for many items.
    """

    store: Store
    settings: ImportSettings
    site: str
    num_threads: int
    append: bool
    trusts_stamps: bool
    run: Mapper


@dataclass(frozen=True)
class _BaseVersion:
    """The version that an append adds to.

    Attributes:
        index: `INDEX_COLUMNS` of all rows.
        sources: the source manifest, of `SOURCE_SCHEMA`; None if the version has none.
    """

    commit: Commit
    index: pa.Table
    sources: pa.Table | None


def _load_base(store: Store, category: str, commit: Commit) -> _BaseVersion:
    """Reads the index and the source manifest of a commit."""
    return _BaseVersion(commit, load_commit_index(store, category, commit), store.read_sources(category, commit))


@dataclass
class _CategoryState:
    """The state of one category during the ingestion.

    A stamp is the size of a file and its ETag or time of change (`read_source_stamp`); a digest is its size and SHA-256.

    Attributes:
        stamps: stamp of each source file.
        digests: digests of the files that need not be read again.
        num_existing: images that were recognised as existing rows without being read.
        num_regrouped: of these, images to which the source now gives another group.
        base: for an append, the version that was current when the category was prepared.
        chunks: the images that have to be read.
        results: result of each chunk; None while it is pending.
        outcome: set early if the category is unchanged.
    """

    plan: ImportPlan
    stamps: dict[SourcePath, SourceStamp]
    digests: dict[SourcePath, FileDigest]
    num_existing: int = 0
    num_regrouped: int = 0
    base: _BaseVersion | None = None
    chunks: list[Chunk] = field(default_factory=list)
    results: list[ChunkResult | None] = field(default_factory=list)
    outcome: CategoryOutcome | None = None


def ingest_in_chunks(plans: Sequence[ImportPlan], options: IngestOptions, progress: bool) -> list[CategoryOutcome]:
    """Ingests the categories of the plans, and publishes each category when all of its chunks are written.

    Args: progress: show a bar on standard error.

    Returns:
        The outcome of each plan.

    Raises:
        DataError: the storage fails.
    """
    with ThreadPoolExecutor(_NUM_PREPARERS) as pool:
        categories = list(pool.map(lambda plan: _prepare(plan, options), plans))
    if any(item.outcome is None for item in categories):
        options.store.check_writable()
    chunks = [(item, number) for item in categories for number in range(len(item.chunks))]
    bar = tqdm(total=sum(len(item.chunks[n].samples) for item, n in chunks), unit="image", disable=not progress)
    finished: dict[int, Future[CategoryOutcome]] = {}
    with bar, ThreadPoolExecutor(_NUM_FINISHERS) as pool:
        for item in categories:
            if item.outcome is None and not item.chunks:
                finished[id(item)] = pool.submit(_finish, item, options)
        for position, result in options.run(write_chunk, [item.chunks[number] for item, number in chunks]):
            item, number = chunks[position]
            item.results[number] = result
            bar.update(len(item.chunks[number].samples))
            if all(chunk_result is not None for chunk_result in item.results):
                finished[id(item)] = pool.submit(_finish, item, options)
            if any(future.done() and future.exception() for future in finished.values()):
                break  # a storage that fails for one category fails for all
    return [item.outcome if item.outcome is not None else finished[id(item)].result() for item in categories]


def _prepare(plan: ImportPlan, options: IngestOptions) -> _CategoryState:
    """Compares the plan of a category with the current version, and makes chunks of the images that have to be read."""
    store, category = options.store, plan.category
    paths = list_plan_files(plan)
    item = _CategoryState(plan, {path: read_source_stamp(path) for path in paths}, {})
    previous = store.read_commit(category)
    samples: Sequence[Sample] = plan.samples
    index: pa.Table | None = None
    if previous is not None:
        item.base = _load_base(store, category, previous) if options.append else None
        manifest = SourceManifest(item.base.sources if item.base else store.read_sources(category, previous), paths)
        item.digests = _find_digests(manifest, paths, item.stamps, options)
        if item.base:
            index = item.base.index
            _adopt_group_splits(plan, index)
            samples = _select_new_samples(item, manifest, index, options.settings)
        elif (
            len(item.digests) == len(paths)
            and previous["source_fingerprint"]
            == compute_source_fingerprint(plan, options.settings, options.site, item.digests)
            and store.is_complete(category, previous)
        ):
            item.outcome = report_unchanged(plan, store, previous, options.settings)
            return item
    site, settings, num_threads = options.site, options.settings, options.num_threads
    item.chunks = make_chunks(category, samples, item.stamps, store.uri, site, settings, num_threads, index)
    item.results = [None] * len(item.chunks)
    return item


def _find_digests(
    manifest: SourceManifest, paths: Sequence[SourcePath], stamps: dict[SourcePath, SourceStamp], options: IngestOptions
) -> dict[SourcePath, FileDigest]:
    """Returns the digests of source files that may be unchanged since the last ingestion.

    If stamps are trusted, a file with the size and stamp of the manifest counts as unchanged, and its digest is taken from the
    manifest. Otherwise, every file with the size of the manifest is read to compute its digest, which may have changed.

    Args:
        paths: the source files.
        stamps: stamp of each source file.
    """
    if options.trusts_stamps:
        return manifest.unchanged_digests(paths, stamps)
    candidates = [path for path in paths if manifest.has_same_size(path, stamps[path])]
    with ThreadPoolExecutor(options.num_threads) as pool:
        digests = pool.map(read_file_digest, candidates)
        return {path: digest for path, (digest, _) in zip(candidates, digests, strict=True)}


def _adopt_group_splits(plan: ImportPlan, index: pa.Table) -> None:
    """Moves normal images with a drawn split to the split of the existing rows of their group, so that no group is divided."""
    columns = (index[name].to_pylist() for name in ("group", "label", "split"))
    splits: dict[str, str] = {}
    for group, label, split in zip(*columns, strict=True):
        if group and not label and splits.get(group) != "train":
            splits[group] = split
    plan.samples = [
        replace(sample, split=splits.get(sample.group, sample.split))
        if sample.has_drawn_split and not sample.label
        else sample
        for sample in plan.samples
    ]


def _select_new_samples(
    item: _CategoryState, manifest: SourceManifest, index: pa.Table, settings: ImportSettings
) -> list[Sample]:
    """Returns the samples that have to be read, and counts the others in `item`.

    A sample need not be read if the manifest contains its content hash, and the index has a row with this hash, label and split.
    """
    columns = (index[name].to_pylist() for name in ("content_hash", "label", "split"))
    groups_by_row = dict(zip(zip(*columns, strict=True), index["group"].to_pylist(), strict=True))
    new_samples = []
    for sample in item.plan.samples:
        content = manifest.content_hash(sample.path, item.digests.get(sample.path, (-1, "")))
        splits = ("train", "test") if sample.has_drawn_split else (sample.split,)
        groups = [groups_by_row[key] for split in splits if (key := (content, sample.label, split)) in groups_by_row]
        if groups:
            item.num_existing += 1
            item.num_regrouped += settings.grouping is not None and sample.group not in groups
        else:
            new_samples.append(sample)
    return new_samples


def report_unchanged(
    plan: ImportPlan, store: Store, commit: Commit, settings: ImportSettings, num_existing: int = 0
) -> CategoryOutcome:
    """Returns the outcome of a category whose current version stays.

    Args:
        commit: of the current version.
        num_existing: images of the source that the version already contains, for an append.
    """
    category, counts = plan.category, commit["counts"]
    notes = find_implausible_data(category, counts, [], settings)
    num_groups = None
    if settings.grouping is not None:  # without a group rule there are no groups, and the index need not be read
        groups = count_groups(load_commit_index(store, category, commit))
        num_groups = groups.num_train
        notes += shared_groups_note(category, groups)
    report = CategoryReport(
        category,
        "unchanged",
        **counts,
        folders=tuple(plan.folders),
        num_existing=num_existing,
        num_train_groups=num_groups,
    )
    return report, store.read_rejects(category), notes


def _finish(item: _CategoryState, options: IngestOptions) -> CategoryOutcome:
    """Merges the results of the chunks of a category, and publishes the new version."""
    results = [result for result in item.results if result is not None]
    assert len(results) == len(item.chunks), "a category is finished when all of its chunks are written"
    builder = _DraftBuilder(item, options, results)
    is_published = options.store.publish(item.plan.category, builder.build_draft, builder.parts)
    outcome = builder.make_outcome(is_published)
    for data in (item.chunks, item.results, item.stamps, item.digests):  # gigabytes for a million images
        data.clear()
    item.base = None
    return outcome


class _DraftBuilder:
    """Merges the results of the chunks of one category into the draft of a new version.

    Attributes:
        parts: the part files of all chunks.
        items: the checked sample of each row of these part files.
        ids: the id of each of these rows.
        chunk_rejects: the files that were rejected while the chunks were checked.
        digests: digests of the files that were read in the chunks.
        kept_items: after `build_draft`, the images of the new version from this source.
        rejects: after `build_draft`, all rejected files of the source.
        counts: after `build_draft`, the row counts of the new version, see `count_rows`.
        num_existing, num_regrouped: after `build_draft`, see `_CategoryState`; with images that were read and then recognised.
        previous: after `build_draft`, the commit before the new version; None if there was none.
        groups: after `build_draft`, the counts of the groups.
    """

    def __init__(self, item: _CategoryState, options: IngestOptions, results: Sequence[ChunkResult]) -> None:
        self.item, self.options, self.plan = item, options, item.plan
        self.parts: list[PartEntry] = [entry for result in results for entry in result.parts]
        self.items = [checked for result in results for checked in result.items]
        self.ids = [row_id for result in results for row_id in result.ids]
        self.chunk_rejects = [reject for result in results for reject in result.rejects]
        read_paths = (path for chunk in item.chunks for path in list_source_files(chunk.samples))
        self.digests = dict(zip(read_paths, (digest for result in results for digest in result.digests), strict=True))
        self.kept_items: list[CheckedSample] = []
        self.rejects: list[Reject] = []
        self.counts: dict[str, int] = {}
        self.num_existing = self.num_regrouped = 0
        self.previous: Commit | None = None
        self.groups = GroupCounts(None, ())

    def build_draft(self, previous: Commit | None) -> CommitDraft | None:
        """Returns the draft of the version after `previous`, or None if there is no new image. May be called several times."""
        store, category, settings = self.options.store, self.plan.category, self.options.settings
        base = self._current_base(previous) if self.options.append and previous else None
        self.previous = previous
        # 1. Remove duplicates: against the existing rows (only for an append), then among the new images.
        displaced: dict[str, list[int]] = {}
        new_items = self.items
        rejects = [*self.plan.rejects, *self.chunk_rejects]
        self.num_existing, self.num_regrouped = self.item.num_existing, self.item.num_regrouped
        if base is not None:
            comparison = deduplicate_against(self.items, base.index, category, settings)
            new_items, displaced = comparison.new_items, comparison.displaced
            rejects += comparison.rejects
            self.num_existing += comparison.num_existing
            self.num_regrouped += comparison.num_regrouped
        self.kept_items, duplicates = remove_duplicates(new_items, category, settings)
        self.rejects = sorted([*rejects, *duplicates], key=lambda item: (item.path, item.reason))
        if not self.kept_items:
            if base is None:
                store.write_rejects(category, self.rejects)
            return None
        # 2. Remove and rename rows of the new part files.
        final_ids = self._final_ids(base.index if base else None)
        is_kept = np.array([id(item) in final_ids for item in self.items], dtype=bool)
        new_ids = {
            row: final_ids[id(item)]
            for row, item in enumerate(self.items)
            if id(item) in final_ids and final_ids[id(item)] != self.ids[row]
        }
        files, rewritten_files, _ = rewrite_parts(store, category, self.parts, is_kept, new_ids, self.options.run)
        rows = [item for item in self.items if id(item) in final_ids]
        new_index = build_index([final_ids[id(item)] for item in rows], rows, self.options.site)
        self.counts = count_rows(self.kept_items)
        sources = build_source_table({**self.item.digests, **self.digests}, self.item.stamps, self.items)
        if base is None:
            digests = {**self.item.digests, **self.digests}
            fingerprint = compute_source_fingerprint(self.plan, settings, self.options.site, digests)
            self.groups = count_groups(new_index)
            return CommitDraft(files, new_index, sources, fingerprint, self.counts, self.rejects, rewritten_files)
        # 3. For an append: remove existing training rows that a new test image displaces, and add the new rows.
        kept_hashes = {item.content_hash for item in self.kept_items}
        is_removed = np.zeros(base.index.num_rows, dtype=bool)
        removed_rows = [row for content, rows_of in displaced.items() if content in kept_hashes for row in rows_of]
        is_removed[removed_rows] = True
        base_files, rewritten_base_files, _ = rewrite_parts(
            store, category, base.commit["files"], ~is_removed, {}, self.options.run
        )
        self.counts = {name: count + base.commit["counts"][name] for name, count in self.counts.items()}
        self.counts["num_train"] -= int(is_removed.sum())
        fingerprint = _append_fingerprint(base.commit["source_fingerprint"], new_index["content_hash"].to_pylist())
        index = pa.concat_tables([base.index.filter(pa.array(~is_removed)), new_index])
        self.groups = count_groups(index)
        return CommitDraft(
            [*base_files, *files],
            index,
            merge_source_tables(base.sources, self._select_read_sources(sources)),
            fingerprint,
            self.counts,
            _merge_rejects(store.read_rejects(category), self.rejects, self.plan, settings),
            [*rewritten_files, *rewritten_base_files],
        )

    def _current_base(self, previous: Commit) -> _BaseVersion:
        """Returns the version to add to. It is loaded again if another version was published since the preparation."""
        base = self.item.base
        if base is None or base.commit["run_id"] != previous["run_id"]:
            base = self.item.base = _load_base(self.options.store, self.plan.category, previous)
        return base

    def _select_read_sources(self, sources: pa.Table) -> pa.Table:
        """Returns the manifest rows of the files that were read now. For all other files the base version has more details."""
        read_paths = pa.array([str(path) for path in self.digests], pa.string())
        return sources.filter(pc.is_in(sources["path"], value_set=read_paths))

    def _final_ids(self, index: pa.Table | None) -> dict[int, str]:
        """Returns the row id of each kept image, by `id()` of its checked sample. index: the existing rows."""
        row_ids = make_row_ids([item.sample for item in self.kept_items], self.plan.category)
        if index is not None:
            row_ids = choose_unused_ids(row_ids, self.kept_items, index)
        return {id(item): row_id for row_id, item in zip(row_ids, self.kept_items, strict=True)}

    def make_outcome(self, is_published: bool) -> CategoryOutcome:
        """Returns the outcome of the category after `build_draft`. is_published: whether a version was published."""
        category, settings = self.plan.category, self.options.settings
        notes = [f"{settings.relative(item.sample.path)}: {item.note}" for item in self.kept_items if item.note]
        is_append = self.options.append and self.previous is not None
        if self.num_regrouped:
            notes.append(
                f"{category}: {self.num_regrouped} images exist already with another group, which they keep: to change it, "
                "ingest all images again without --append"
            )
        if not is_published:
            if not is_append or self.previous is None or not self.num_existing:
                return None, self.rejects, notes
            outcome = report_unchanged(self.plan, self.options.store, self.previous, settings, self.num_existing)
            return outcome[0], self.rejects, [*notes, *outcome[2]]
        notes += find_implausible_data(category, self.counts, self.kept_items, settings)
        notes += shared_groups_note(category, self.groups)
        report = CategoryReport(
            category,
            "appended" if is_append else "written",
            **self.counts,
            folders=tuple(self.plan.folders),
            num_added=len(self.kept_items) if is_append else 0,
            num_existing=self.num_existing,
            num_train_groups=self.groups.num_train,
        )
        return report, self.rejects, notes


def _append_fingerprint(base_fingerprint: str, hashes: Sequence[str]) -> str:
    """Returns a fingerprint that no source has. So a later ingestion without append replaces the category.

    Args: hashes: content hashes of the added images.
    """
    return hashlib.sha256(json.dumps([base_fingerprint, "append", sorted(hashes)]).encode()).hexdigest()


def _merge_rejects(
    previous: Sequence[Reject], new: Sequence[Reject], plan: ImportPlan, settings: ImportSettings
) -> list[Reject]:
    """Returns the stored and the new rejects. For a file of the plan only the new rejects count."""
    planned_paths = {settings.relative(path) for path in list_plan_files(plan)} | {reject.path for reject in new}
    return sorted(
        [*(reject for reject in previous if reject.path not in planned_paths), *new],
        key=lambda reject: (reject.path, reject.reason),
    )
