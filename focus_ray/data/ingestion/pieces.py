"""Ingestion in pieces: each file is read once, on this machine or on many, and what counts is settled when all are done.

The rows, ids and rejects are those that `ingest` gives in one process, whatever the pieces are. A file of which a version knows
what it holds is not checked again: on S3 it is known by its ETag, on a disk that many machines share by size and time of change,
on a local one by its digest.
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
from focus_ray.data.ingestion.check import Checked, Facts
from focus_ray.data.ingestion.chunks import (
    Chunk,
    Mapper,
    Written,
    files_of,
    index_of_items,
    make_chunks,
    settle_parts,
    write_chunk,
)
from focus_ray.data.ingestion.known import (
    Known,
    Stamp,
    all_files,
    joined_sources,
    read_facts,
    source_fingerprint,
    source_table,
)
from focus_ray.data.ingestion.report import (
    CategoryReport,
    GroupCounts,
    Outcome,
    count_groups,
    count_rows,
    plausibility,
    shared_groups_note,
)
from focus_ray.data.ingestion.unique import against, free_ids, make_ids, without_duplicates
from focus_ray.data.read import index_of
from focus_ray.data.schema import Reject
from focus_ray.data.source import SourcePath, stamp_of
from focus_ray.data.store import Draft, Store

_LOOKERS, _FINISHERS = 16, 4  # categories looked up, and finished, at once


@dataclass(frozen=True)
class Pieces:
    """How to ingest. append: to what is there, instead of in its place.  trusts_stamps: whether a file of the same size and
    stamp counts as the same without being read."""

    store: Store
    settings: ImportSettings
    site: str
    num_threads: int
    append: bool
    trusts_stamps: bool
    run: Mapper


@dataclass(frozen=True)
class _Base:
    """A version that is added to. index: `INDEX_COLUMNS`.  sources: `SOURCE_COLUMNS`, where they are known."""

    commit: Commit
    index: pa.Table
    sources: pa.Table | None


def _base(store: Store, category: str, commit: Commit) -> _Base:
    return _Base(commit, index_of(store, category, commit), store.sources(category, commit))


@dataclass
class _Category:
    """A category on its way. facts: of files that are known.  base: as looked up.  done: where nothing is to be read."""

    plan: ImportPlan
    stamps: dict[SourcePath, Stamp]
    facts: dict[SourcePath, Facts]
    num_there: int = 0
    num_regrouped: int = 0
    base: _Base | None = None
    chunks: list[Chunk] = field(default_factory=list)
    results: list[Written | None] = field(default_factory=list)
    done: Outcome | None = None


def ingest_pieces(plans: Sequence[ImportPlan], how: Pieces, progress: bool) -> list[Outcome]:
    """Returns: of each plan its report, None where nothing in it is usable, its rejects and notes."""
    with ThreadPoolExecutor(_LOOKERS) as pool:
        categories = list(pool.map(lambda plan: _look(plan, how), plans))
    if any(item.done is None for item in categories):
        how.store.check_writable()
    chunks = [(item, number) for item in categories for number in range(len(item.chunks))]
    bar = tqdm(total=sum(len(item.chunks[n].samples) for item, n in chunks), unit="image", disable=not progress)
    finished: dict[int, Future[Outcome]] = {}
    with bar, ThreadPoolExecutor(_FINISHERS) as pool:
        for item in categories:
            if item.done is None and not item.chunks:
                finished[id(item)] = pool.submit(_finish, item, how)
        for place, written in how.run(write_chunk, [item.chunks[number] for item, number in chunks]):
            item, number = chunks[place]
            item.results[number] = written
            bar.update(len(item.chunks[number].samples))
            if all(result is not None for result in item.results):
                finished[id(item)] = pool.submit(_finish, item, how)
            if any(future.done() and future.exception() for future in finished.values()):
                break  # a storage that fails for one fails for all
    return [item.done if item.done is not None else finished[id(item)].result() for item in categories]


def _look(plan: ImportPlan, how: Pieces) -> _Category:
    """What of a category has to be read."""
    store, category = how.store, plan.category
    paths = all_files(plan)
    item = _Category(plan, {path: stamp_of(path) for path in paths}, {})
    former = store.commit(category)
    samples: Sequence[Sample] = plan.samples
    index: pa.Table | None = None
    if former is not None:
        item.base = _base(store, category, former) if how.append else None
        known = Known(item.base.sources if item.base else store.sources(category, former), paths)
        item.facts = _known_facts(known, paths, item.stamps, how)
        if item.base:
            index = item.base.index
            _join_groups(plan, index)
            samples = _not_there(item, known, index, how.settings)
        elif (
            len(item.facts) == len(paths)
            and former["source_fingerprint"] == source_fingerprint(plan, how.settings, how.site, item.facts)
            and store.is_whole(category, former)
        ):
            item.done = unchanged_outcome(plan, store, former, how.settings)
            return item
    item.chunks = make_chunks(category, samples, item.stamps, store.uri, how.site, how.settings, how.num_threads, index)
    item.results = [None] * len(item.chunks)
    return item


def _known_facts(
    known: Known, paths: Sequence[SourcePath], stamps: dict[SourcePath, Stamp], how: Pieces
) -> dict[SourcePath, Facts]:
    if how.trusts_stamps:
        return known.facts(paths, stamps)
    again = [path for path in paths if known.has_size(path, stamps[path])]
    with ThreadPoolExecutor(how.num_threads) as pool:
        return {path: facts for path, (facts, _) in zip(again, pool.map(read_facts, again), strict=True)}


def _join_groups(plan: ImportPlan, index: pa.Table) -> None:
    """Moves normal images with a drawn split to the split of the rows of their group, so that no group is divided."""
    columns = (index[name].to_pylist() for name in ("group", "label", "split"))
    splits: dict[str, str] = {}
    for group, label, split in zip(*columns, strict=True):
        if group and not label and splits.get(group) != "train":
            splits[group] = split
    plan.samples = [
        replace(sample, split=splits.get(sample.group, sample.split)) if sample.drawn and not sample.label else sample
        for sample in plan.samples
    ]


def _not_there(item: _Category, known: Known, index: pa.Table, settings: ImportSettings) -> list[Sample]:
    """The samples but for those whose pixels, as is known without a look at them, are there with their label and split."""
    columns = (index[name].to_pylist() for name in ("content_hash", "label", "split"))
    rows = dict(zip(zip(*columns, strict=True), index["group"].to_pylist(), strict=True))
    left = []
    for sample in item.plan.samples:
        content = known.content_hash(sample.path, item.facts.get(sample.path, (-1, "")))
        splits = ("train", "test") if sample.drawn else (sample.split,)
        there = [rows[key] for split in splits if (key := (content, sample.label, split)) in rows]
        if there:
            item.num_there += 1
            item.num_regrouped += settings.grouping is not None and sample.group not in there
        else:
            left.append(sample)
    return left


def unchanged_outcome(
    plan: ImportPlan, store: Store, former: Commit, settings: ImportSettings, num_there: int = 0
) -> Outcome:
    """Returns the outcome of a category of which nothing is written."""
    category, counts = plan.category, former["counts"]
    notes = plausibility(category, counts, [], settings)
    num_groups = None
    if settings.grouping is not None:  # else the index is not read: there are no groups
        groups = count_groups(index_of(store, category, former))
        num_groups = groups.num_train
        notes += shared_groups_note(category, groups)
    report = CategoryReport(
        category,
        "unchanged",
        **counts,
        folders=tuple(plan.folders),
        num_there=num_there,
        num_train_groups=num_groups,
    )
    return report, store.rejects(category), notes


def _finish(item: _Category, how: Pieces) -> Outcome:
    """Settles what counts of a category's pieces, and publishes it."""
    results = [result for result in item.results if result is not None]
    assert len(results) == len(item.chunks), "a category is finished when all of its pieces are there"
    made = _Made(item, how, results)
    changed = how.store.publish(item.plan.category, made.draft, made.parts)
    outcome = made.outcome(changed)
    for held in (item.chunks, item.results, item.stamps, item.facts):  # of a million images, gigabytes
        held.clear()
    item.base = None
    return outcome


class _Made:
    """The pieces of one category, and what a version is made of them."""

    def __init__(self, item: _Category, how: Pieces, results: Sequence[Written]) -> None:
        self.item, self.how, self.plan = item, how, item.plan
        self.parts: list[PartEntry] = [entry for result in results for entry in result.parts]
        self.items = [checked for result in results for checked in result.items]
        self.ids = [name for result in results for name in result.ids]
        self.rejected = [reject for result in results for reject in result.rejects]
        read = (path for chunk in item.chunks for path in files_of(chunk.samples))
        self.facts = dict(zip(read, (facts for result in results for facts in result.facts), strict=True))
        self.kept: list[Checked] = []
        self.rejects: list[Reject] = []
        self.counts: dict[str, int] = {}
        self.num_there = self.num_regrouped = 0
        self.former: Commit | None = None
        self.groups = GroupCounts(None, ())

    def draft(self, former: Commit | None) -> Draft | None:
        """The next version after `former`; None where nothing is new."""
        store, category, settings = self.how.store, self.plan.category, self.how.settings
        base = self._base(former) if self.how.append and former else None
        self.former = former
        displaced: dict[str, list[int]] = {}
        fresh = self.items
        rejects = [*self.plan.rejects, *self.rejected]
        self.num_there, self.num_regrouped = self.item.num_there, self.item.num_regrouped
        if base is not None:
            held = against(self.items, base.index, category, settings)
            fresh, displaced = held.fresh, held.displaced
            rejects += held.rejects
            self.num_there += held.num_there
            self.num_regrouped += held.num_regrouped
        self.kept, duplicates = without_duplicates(fresh, category, settings)
        self.rejects = sorted([*rejects, *duplicates], key=lambda item: (item.path, item.reason))
        if not self.kept:
            if base is None:
                store.write_rejects(category, self.rejects)
            return None
        names = self._names(base.index if base else None)
        keep = np.array([id(item) in names for item in self.items], dtype=bool)
        renamed = {
            row: names[id(item)]
            for row, item in enumerate(self.items)
            if id(item) in names and names[id(item)] != self.ids[row]
        }
        files, made, _ = settle_parts(store, category, self.parts, keep, renamed, self.how.run)
        rows = [item for item in self.items if id(item) in names]
        light = index_of_items([names[id(item)] for item in rows], rows, self.how.site)
        self.counts = count_rows(self.kept)
        sources = source_table({**self.item.facts, **self.facts}, self.item.stamps, self.items)
        if base is None:
            facts = {**self.item.facts, **self.facts}
            print_of = source_fingerprint(self.plan, settings, self.how.site, facts)
            self.groups = count_groups(light)
            return Draft(files, light, sources, print_of, self.counts, self.rejects, made)
        kept_hashes = {item.content_hash for item in self.kept}
        gone = np.zeros(base.index.num_rows, dtype=bool)
        gone[[row for content, numbers in displaced.items() if content in kept_hashes for row in numbers]] = True
        before, remade, _ = settle_parts(store, category, base.commit["files"], ~gone, {}, self.how.run)
        self.counts = {name: count + base.commit["counts"][name] for name, count in self.counts.items()}
        self.counts["num_train"] -= int(gone.sum())
        print_of = _after(base.commit["source_fingerprint"], "append", light["content_hash"].to_pylist())
        index = pa.concat_tables([base.index.filter(pa.array(~gone)), light])
        self.groups = count_groups(index)
        return Draft(
            [*before, *files],
            index,
            joined_sources(base.sources, self._new_sources(sources)),
            print_of,
            self.counts,
            _joined_rejects(store.rejects(category), self.rejects, self.plan, settings),
            [*made, *remade],
        )

    def _base(self, former: Commit) -> _Base:
        """What is added to: as it was looked up, unless another version has come since."""
        found = self.item.base
        if found is None or found.commit["run_id"] != former["run_id"]:
            found = self.item.base = _base(self.how.store, self.plan.category, former)
        return found

    def _new_sources(self, sources: pa.Table) -> pa.Table:
        """Of the files that were read now: of the others the former version knows more."""
        read = pa.array([str(path) for path in self.facts], pa.string())
        return sources.filter(pc.is_in(sources["path"], value_set=read))

    def _names(self, index: pa.Table | None) -> dict[int, str]:
        """What each row that counts is called, by the identity of its item."""
        names = make_ids([item.sample for item in self.kept], self.plan.category)
        if index is not None:
            names = free_ids(names, self.kept, index)
        return {id(item): name for name, item in zip(names, self.kept, strict=True)}

    def outcome(self, changed: bool) -> Outcome:
        """What to tell of it. changed: whether a version was published."""
        category, settings = self.plan.category, self.how.settings
        notes = [f"{settings.relative(item.sample.path)}: {item.note}" for item in self.kept if item.note]
        appended = self.how.append and self.former is not None
        if self.num_regrouped:
            notes.append(
                f"{category}: {self.num_regrouped} images are there already with another group, which they keep: to change it, "
                "ingest all images again without --append"
            )
        if not changed:
            if not appended or self.former is None or not self.num_there:
                return None, self.rejects, notes
            outcome = unchanged_outcome(self.plan, self.how.store, self.former, settings, self.num_there)
            return outcome[0], self.rejects, [*notes, *outcome[2]]
        notes += plausibility(category, self.counts, self.kept, settings)
        notes += shared_groups_note(category, self.groups)
        report = CategoryReport(
            category,
            "appended" if appended else "written",
            **self.counts,
            folders=tuple(self.plan.folders),
            num_added=len(self.kept) if appended else 0,
            num_there=self.num_there,
            num_train_groups=self.groups.num_train,
        )
        return report, self.rejects, notes


def _after(former: str, what: str, hashes: Sequence[str]) -> str:
    """A fingerprint that no source has: ingesting the source itself then puts it in place of what is there."""
    return hashlib.sha256(json.dumps([former, what, sorted(hashes)]).encode()).hexdigest()


def _joined_rejects(
    former: Sequence[Reject], new: Sequence[Reject], plan: ImportPlan, settings: ImportSettings
) -> list[Reject]:
    """Of a file that the plan names, what is new."""
    planned = {settings.relative(path) for path in all_files(plan)} | {item.path for item in new}
    return sorted(
        [*(item for item in former if item.path not in planned), *new], key=lambda item: (item.path, item.reason)
    )
