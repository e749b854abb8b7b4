"""No picture twice and no id twice: within what is read, and against what is there already."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from focus_ray.data.importers.base import ImportSettings, Sample
from focus_ray.data.ingestion.check import Checked
from focus_ray.data.schema import Reject, RejectReason


def without_duplicates(
    checked: Sequence[Checked], category: str, settings: ImportSettings
) -> tuple[list[Checked], list[Reject]]:
    """Drops what would leak from test into train, count twice or contradict itself; docs/use/data.md has the table."""
    alike: dict[str, list[Checked]] = defaultdict(list)
    for item in sorted(checked, key=lambda item: settings.relative(item.sample.path)):
        alike[item.content_hash].append(item)
    kept: list[Checked] = []
    rejects: list[Reject] = []

    def reject(item: Checked, reason: RejectReason, detail: str) -> None:
        rejects.append(Reject(settings.relative(item.sample.path), category, reason, detail))

    for group in alike.values():
        train = [item for item in group if item.sample.split == "train"]
        test = [item for item in group if item.sample.split == "test"]
        if len({item.sample.label for item in group}) > 1:
            for item in group:
                twin = next(other for other in group if other.sample.label != item.sample.label)
                other = settings.relative(twin.sample.path)
                word = "anomalous" if twin.sample.label else "normal"
                reject(item, "contradictory_label", f"the same pixels are {word} in {other}: remove the wrong one")
        elif train and test:
            kept += test
            for item in train:
                other = settings.relative(test[0].sample.path)
                reject(item, "duplicate_across_splits", f"the same pixels are test data in {other}, which is kept")
        else:
            kept += test + train[:1]
            for item in train[1:]:
                other = settings.relative(train[0].sample.path)
                reject(item, "duplicate_in_train", f"the same pixels are in {other}, which is kept")
    return kept, rejects


def make_ids(samples: Sequence[Sample], category: str) -> list[str]:
    """category/folder/defect/subfolders/stem; the whole file name where stems clash, more of the path where names do."""

    def parts(sample: Sample) -> list[str]:
        defect = [] if sample.folder == sample.defect_type else [sample.defect_type]
        return [category, sample.folder, *defect, *([sample.below] if sample.below else [])]

    stems = ["/".join([*parts(sample), sample.path.stem]) for sample in samples]
    names = ["/".join([*parts(sample), sample.path.name]) for sample in samples]
    clashing = Counter(stems)
    ids = [name if clashing[stem] > 1 else stem for stem, name in zip(stems, names, strict=True)]
    paths = ["/".join([*parts(sample), *sample.path.parts[-3:]]) for sample in samples]
    clashing = Counter(ids)
    return [path if clashing[name] > 1 else name for name, path in zip(ids, paths, strict=True)]


def other_id(name: str, item: Checked) -> str:
    """What an image is called whose name another has: that, and the first digits of its pixels' hash."""
    return f"{name}~{item.content_hash[:12]}"


def ids_there(index: pa.Table, ids: Collection[str]) -> set[str]:
    """Which of the ids are those of rows of an index."""
    hit = pc.is_in(index["id"], value_set=pa.array(sorted(set(ids)), pa.string()))
    return set(index["id"].filter(hit).to_pylist())


def free_ids(ids: Sequence[str], items: Sequence[Checked], index: pa.Table) -> list[str]:
    """The ids; of those that rows of the index have, `other_id`, and a number should that be taken too."""
    used = ids_there(index, [*ids, *map(other_id, ids, items)])
    free = []
    for name, item in zip(ids, items, strict=True):
        chosen, number = name, 1
        while chosen in used:
            chosen = other_id(name, item) + (f"-{number}" if number > 1 else "")
            number += 1
        used.add(chosen)
        free.append(chosen)
    return free


@dataclass(frozen=True)
class Against:
    """What became of images that were held against those that are there.

    fresh: not there yet.  num_there: the same pixels, label and split are there.  num_regrouped: of these, images to which the
    source now gives another group.  displaced: content hash -> number of a row of
    the training data that a fresh test image takes out.
    """

    fresh: list[Checked]
    num_there: int
    rejects: list[Reject]
    displaced: dict[str, list[int]]
    num_regrouped: int = 0


def against(items: Sequence[Checked], index: pa.Table, category: str, settings: ImportSettings) -> Against:
    """Holds new images against a category's index; docs/use/data.md has the table."""
    rows = rows_alike(index, [item.content_hash for item in items])
    found = Against([], 0, [], {})
    num_there = num_regrouped = 0
    for item in items:
        there = rows.get(item.content_hash, [])
        sample = item.sample
        path = settings.relative(sample.path)
        other = next((row for row in there if row.label != sample.label), None)
        if other is not None:
            word = "anomalous" if other.label else "normal"
            detail = f"the same pixels are {word} in the row {other.id}, which is kept: remove the wrong one"
            found.rejects.append(Reject(path, category, "contradictory_label", detail))
        elif any(row.split == sample.split for row in there) or (there and sample.drawn):
            num_there += 1
            num_regrouped += settings.grouping is not None and all(row.group != sample.group for row in there)
        elif there and sample.split == "train":
            detail = f"the same pixels are test data in the row {there[0].id}, which is kept"
            found.rejects.append(Reject(path, category, "duplicate_across_splits", detail))
        else:
            found.fresh.append(item)
            if there:
                found.displaced[item.content_hash] = [row.number for row in there]
    return Against(found.fresh, num_there, found.rejects, found.displaced, num_regrouped)


@dataclass(frozen=True, slots=True)
class There:
    """A row that is there."""

    number: int
    id: str
    label: int
    split: str
    group: str


def rows_alike(index: pa.Table, hashes: Collection[str]) -> dict[str, list[There]]:
    """Content hash -> the rows of an index that have it, of those hashes alone."""
    hit = pc.is_in(index["content_hash"], value_set=pa.array(sorted(set(hashes)), pa.string()))
    numbers = pc.indices_nonzero(hit)
    part = index.take(numbers).select(["content_hash", "id", "label", "split", "group"])
    found: dict[str, list[There]] = defaultdict(list)
    for number, row in zip(numbers.to_pylist(), part.to_pylist(), strict=True):
        found[row["content_hash"]].append(There(number, row["id"], row["label"], row["split"], row["group"]))
    return found
