"""Ingests categories: finds the files that have to be read, reads them in chunks, and merges the results into new versions.

A chunk is a list of images that fills about one part file. The rows, ids and rejects do not depend on the chunks. If new images
are appended, images that the category already contains are not checked again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from focus_ray.data.commits import Commit
from focus_ray.data.importers.base import ImportPlan, SourceImage
from focus_ray.data.read import load_version_index
from focus_ray.data.schema import INDEX_SCHEMA, RejectedFile
from focus_ray.data.source import SourcePath, read_size_and_change_mark
from focus_ray.data.store import CommitDraft, open_data_set
from focus_ray.ingestion.check import CheckedSample, FileDigest
from focus_ray.ingestion.chunks import (
    ChunkResult,
    IngestOptions,
    divide_into_chunks,
    ingest_chunk,
    merge_chunk_results,
    rewrite_part_files,
)
from focus_ray.ingestion.deduplicate import (
    choose_unused_row_ids,
    compare_with_existing_rows,
    make_row_ids,
    remove_duplicates,
)
from focus_ray.ingestion.report import (
    CategoryReport,
    Status,
    count_rows_by_split_and_label,
    count_training_groups,
    find_implausible_data,
)
from focus_ray.ingestion.source_manifest import (
    ManifestRows,
    build_source_manifest,
    compute_source_fingerprint,
    derive_fingerprint_after_change,
    find_digests_of_unchanged_files,
    find_manifest_rows,
    find_stored_content_hash,
    list_source_files,
    merge_source_manifests,
)

_NUM_PREPARERS, _NUM_PUBLISHERS = 16, 4  # threads that prepare and that publish categories
_REJECT_ORDER = attrgetter("path", "reason")


def ingest_categories(plans: Sequence[ImportPlan], options: IngestOptions, progress: bool) -> list[CategoryIngestion]:
    """Ingests the categories of the plans, and publishes each category when all of its images are written.

    Args:
        plans: for each category, the images to ingest.
        options: how to ingest.
        progress: show a bar on standard error.

    Returns:
        The finished ingestion of each plan.

    Raises:
        DataError: the storage fails, or other processes publish the same category again and again.
    """
    with ThreadPoolExecutor(_NUM_PREPARERS) as pool:
        categories = list(pool.map(lambda plan: CategoryIngestion(plan, options), plans))
    changed = [item for item in categories if item.report is None]
    if changed:
        open_data_set(options.uri).check_writable()
    chunks = [(item, chunk) for item in changed for chunk in item.chunks]
    bar = tqdm(total=sum(len(chunk.samples) for _, chunk in chunks), unit="image", disable=not progress)
    with bar, ThreadPoolExecutor(_NUM_PUBLISHERS) as pool:
        publications: list[Future[None]] = [pool.submit(item.publish_version) for item in changed if not item.chunks]
        for number, result in options.run(ingest_chunk, [chunk for _, chunk in chunks]):
            item, chunk = chunks[number]
            item.results[number] = result
            bar.update(len(chunk.samples))
            if len(item.results) == len(item.chunks):
                publications.append(pool.submit(item.publish_version))
            if any(future.done() and future.exception() for future in publications):
                break  # a storage that fails for one category fails for all
    for future in publications:
        future.result()
    return categories


@dataclass(frozen=True)
class _BaseVersion:
    """The version of a category that new rows are added to. It has no rows if the ingestion replaces the category.

    Attributes:
        commit: description of the version; None for an ingestion that replaces the category, or if there is no category yet.
        index: table of all rows, with `INDEX_COLUMNS`.
        sources: the source manifest (list of the source files), of `SOURCE_SCHEMA`; None if the version has none.
    """

    commit: Commit | None
    index: pa.Table
    sources: pa.Table | None


class CategoryIngestion:
    """The ingestion of one category: compares the source with the current version, and publishes the new version.

    Attributes:
        plan: the images to ingest.
        chunks: the images that have to be read, in lists of about one part file.
        results: result of each written chunk, by the number of the chunk among the chunks of all categories.
        report: None before `publish_version`, except for an unchanged category; None afterwards if no image is usable.
        rejects: the rejected files.
        notes: hints for the user.
    """

    def __init__(self, plan: ImportPlan, options: IngestOptions) -> None:
        """Compares the plan with the current version, and divides the images that have to be read into chunks.

        Raises: DataError: the storage fails, or a file of the current version is damaged.
        """
        self.plan, self.options, self.store, self.category = plan, options, open_data_set(options.uri), plan.category
        self.results: dict[int, ChunkResult] = {}
        self.report: CategoryReport | None = None
        self.rejects: list[RejectedFile] = []
        self.notes: list[str] = []
        self._num_existing = self._num_regrouped = 0  # images that need not be read, see `ExistingRowComparison`
        self._stamps = {path: read_size_and_change_mark(path) for path in list_source_files(plan.samples)}
        previous = self.store.read_commit(self.category)
        self._base = self._load_base_version(previous)
        samples: Sequence[SourceImage] = plan.samples
        if previous is not None:
            sources = self._base.sources if options.append else self.store.read_source_manifest(self.category, previous)
            manifest = find_manifest_rows(sources, self._stamps)
            digests = find_digests_of_unchanged_files(
                manifest, self._stamps, options.trusts_stamps, options.num_threads
            )
            if options.append:
                self._assign_groups_to_existing_splits()
                samples = self._select_new_samples(manifest, digests)
            elif (
                len(digests) == len(self._stamps)
                and previous["source_fingerprint"] == self._compute_fingerprint(digests)
                and self.store.has_all_files(self.category, previous)
            ):
                self.rejects = self.store.read_reject_list(self.category)
                self._report_unchanged_category(previous)
                samples = []
        self.chunks = divide_into_chunks(self.category, samples, self._stamps, self._base.index, options)

    def _compute_fingerprint(self, digests: Mapping[SourcePath, FileDigest]) -> str:
        """Returns the fingerprint of the source, which is the same for an unchanged source."""
        return compute_source_fingerprint(self.plan, self.options.settings, self.options.site, digests)

    def _load_base_version(self, previous: Commit | None) -> _BaseVersion:
        """Returns the version to add rows to: the previous version for an append, otherwise a version without rows.

        Args: previous: the commit (description) of the current version; None if there is none.

        Raises: DataError: the storage fails, or the index is damaged.
        """
        if previous is None or not self.options.append:
            return _BaseVersion(None, INDEX_SCHEMA.empty_table(), None)
        index = load_version_index(self.store, self.category, previous)
        return _BaseVersion(previous, index, self.store.read_source_manifest(self.category, previous))

    def _assign_groups_to_existing_splits(self) -> None:
        """Moves new normal images to the split (train or test) of existing rows of their group, to keep groups together.

        It changes the plan. Only images whose split was drawn at random are moved. A group with rows in both splits counts as
        train.
        """
        columns = (self._base.index[name].to_pylist() for name in ("group", "label", "split"))
        splits: dict[str, str] = {}
        for group, label, split in zip(*columns, strict=True):
            if group and not label and splits.get(group) != "train":
                splits[group] = split
        self.plan.samples = [
            replace(sample, split=splits.get(sample.group, sample.split))
            if sample.has_drawn_split and not sample.label
            else sample
            for sample in self.plan.samples
        ]

    def _select_new_samples(
        self, manifest: ManifestRows, digests: Mapping[SourcePath, FileDigest]
    ) -> list[SourceImage]:
        """Returns the images that have to be read, and counts the images that the category already contains.

        An image need not be read if the source manifest contains its content hash, and the index has a row with this hash, label
        and split. For an image with a drawn split, a row in any split is enough.

        Args:
            manifest: path -> row of the source manifest.
            digests: digest of each source file that may be unchanged.
        """
        columns = (self._base.index[name].to_pylist() for name in ("content_hash", "label", "split"))
        groups_by_row = dict(zip(zip(*columns, strict=True), self._base.index["group"].to_pylist(), strict=True))
        new_samples = []
        for sample in self.plan.samples:
            content = find_stored_content_hash(manifest, sample.path, digests.get(sample.path))
            splits = ("train", "test") if sample.has_drawn_split else (sample.split,)
            keys = [(content, sample.label, split) for split in splits]
            groups = [groups_by_row[key] for key in keys if key in groups_by_row]
            if groups:
                self._num_existing += 1
                self._num_regrouped += self.options.settings.grouping is not None and sample.group not in groups
            else:
                new_samples.append(sample)
        return new_samples

    def publish_version(self) -> None:
        """Merges the results of the chunks, and publishes the new version if a new image remains.

        Sets `report`, `rejects` and `notes`.

        Afterwards the chunks and their results are deleted from memory.

        Raises: DataError: the storage fails, or other processes published first too often.
        """
        new = merge_chunk_results([result for _, result in sorted(self.results.items())])
        self.store.publish_version(self.category, partial(self._build_commit_draft, new), new.parts)
        for data in (self.chunks, self.results, self._stamps):  # gigabytes for a million images
            data.clear()
        self._base = self._load_base_version(None)

    def _build_commit_draft(self, new: ChunkResult, previous: Commit | None) -> CommitDraft | None:
        """Builds the content of the version after `previous`; returns None if no new image remains.

        It may be called several times. It removes duplicates, gives rows unique ids, rewrites part files where needed,
        and sets `report`, `rejects` and `notes`.

        Args:
            new: the merged results of all chunks.
            previous: the commit (description) of the current version; None if there is none.

        Raises: DataError: the storage fails, or a file of the previous version is damaged.
        """
        category, settings, run = self.category, self.options.settings, self.options.run
        if self.options.append and previous != self._base.commit:  # another version was published since the preparation
            self._base = self._load_base_version(previous)
        base = self._base
        # 1. Remove duplicates: against the existing rows, then among the new images.
        comparison = compare_with_existing_rows(new.items, base.index, category, settings)
        items, duplicates = remove_duplicates(comparison.new_items, category, settings)
        rejects = [*self.plan.rejects, *new.rejects, *comparison.rejects, *duplicates]
        self.rejects = sorted(rejects, key=_REJECT_ORDER)
        self.notes = [f"{settings.describe_path(item.sample.path)}: {item.note}" for item in items if item.note]
        num_existing = self._num_existing + comparison.num_existing
        num_regrouped = self._num_regrouped + comparison.num_regrouped
        if num_regrouped:
            self.notes.append(
                f"{category}: {num_regrouped} images exist already with another group, which they keep: to change it, ingest all "
                "images again without --append"
            )
        if not items:
            if base.commit is None:
                self.store.write_reject_list(category, self.rejects)
            elif num_existing:
                self._report_unchanged_category(base.commit, num_existing)
            return None
        # 2. Remove and rename rows of the new part files.
        row_ids = choose_unused_row_ids(make_row_ids([item.sample for item in items], category), items, base.index)
        final_ids = {id(item): row_id for row_id, item in zip(row_ids, items, strict=True)}
        ids = [final_ids.get(id(item)) for item in new.items]  # None for a duplicate
        changes = {row: ids[row] for row, old_id in enumerate(new.index["id"].to_pylist()) if ids[row] != old_id}
        new_files, _ = rewrite_part_files(self.store, category, new.parts, changes, run)
        id_column = pa.array(ids, pa.string())
        new_index = new.index.filter(id_column.is_valid())
        new_index = new_index.set_column(0, INDEX_SCHEMA.field("id"), id_column.drop_null())
        # 3. Remove existing training rows that a new test image displaces, and add the new rows.
        kept_hashes = {item.content_hash for item in items}
        displaced = [
            row for content, rows in comparison.displaced_rows.items() if content in kept_hashes for row in rows
        ]
        base_parts = base.commit["files"] if base.commit else []
        base_files, num_removed_masks = rewrite_part_files(
            self.store, category, base_parts, dict.fromkeys(displaced), run
        )
        remains = np.ones(base.index.num_rows, dtype=bool)
        remains[displaced] = False
        index = pa.concat_tables([base.index.filter(pa.array(remains)), new_index])
        num_masks = sum(item.mask is not None for item in items) - num_removed_masks
        if base.commit is None:
            fingerprint = self._compute_fingerprint(new.digests)
        else:
            num_masks += base.commit["counts"]["num_masks"]
            fingerprint = derive_fingerprint_after_change(base.commit, "append", new_index["content_hash"].to_pylist())
        counts = {**count_rows_by_split_and_label(index), "num_masks": num_masks}
        self._set_report("appended" if base.commit else "written", counts, index, items, num_existing)
        sources = merge_source_manifests(base.sources, build_source_manifest(new.digests, self._stamps, new.items))
        files = [*base_files, *new_files]
        return CommitDraft(files, index, sources, fingerprint, counts, self._merge_rejected_files())

    def _merge_rejected_files(self) -> list[RejectedFile]:
        """Returns the rejected files and, for an append, the stored rejected files that are not in the plan."""
        stored = self.store.read_reject_list(self.category) if self._base.commit else []
        new_paths = {self.options.settings.describe_path(path) for path in self._stamps}
        new_paths.update(item.path for item in self.rejects)
        return sorted([*(item for item in stored if item.path not in new_paths), *self.rejects], key=_REJECT_ORDER)

    def _report_unchanged_category(self, commit: Commit, num_existing: int = 0) -> None:
        """Sets the report of a category whose current version stays, see `_set_report`.

        Args:
            commit: the description of the current version.
            num_existing: images of the source that the version already contains.
        """
        index = INDEX_SCHEMA.empty_table()
        if self.options.settings.grouping is not None:  # without a group rule there are no groups to count
            index = load_version_index(self.store, self.category, commit)
        self._set_report("unchanged", commit["counts"], index, [], num_existing)

    def _set_report(
        self, status: Status, counts: dict[str, int], index: pa.Table, items: Sequence[CheckedSample], num_existing: int
    ) -> None:
        """Sets the report of the category, and adds notes on implausible data and on groups to `notes`.

        Args:
            status: "written", "appended" or "unchanged".
            counts: the row counts of `CategoryReport`.
            index: table of the rows of the category, to count its groups.
            items: the new images.
            num_existing: images of the source that the previous version already contained.
        """
        num_groups, group_notes = count_training_groups(self.category, index)
        self.report = CategoryReport(
            self.category,
            status,
            **counts,
            folders=tuple(self.plan.folders),
            num_added=len(items) if status == "appended" else 0,
            num_existing=num_existing,
            num_train_groups=num_groups,
        )
        self.notes += find_implausible_data(self.category, counts, items, self.options.settings) + group_notes
