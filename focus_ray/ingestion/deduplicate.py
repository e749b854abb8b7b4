"""Removes duplicate images and makes row ids unique, among new images and against the existing rows of a category."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from focus_ray.data.importers.base import ImportSettings, Sample
from focus_ray.data.schema import Reject, RejectReason
from focus_ray.ingestion.check import CheckedSample


def remove_duplicates(
    checked: Sequence[CheckedSample], category: str, settings: ImportSettings
) -> tuple[list[CheckedSample], list[Reject]]:
    """Removes images with equal pixels from new images of one category.

    Training images that are also test images are removed, and a repeated training image is kept once. If equal images have
    different labels, all of them are removed. docs/use/data.md has a table of the cases.

    Args: category: name of the category, for the records of rejected images.

    Returns:
        The images to keep, and the records of the rejected images.
    """
    by_content: dict[str, list[CheckedSample]] = defaultdict(list)
    for item in sorted(checked, key=lambda item: settings.relative(item.sample.path)):
        by_content[item.content_hash].append(item)
    kept_items: list[CheckedSample] = []
    rejects: list[Reject] = []

    def reject(item: CheckedSample, reason: RejectReason, detail: str) -> None:
        rejects.append(Reject(settings.relative(item.sample.path), category, reason, detail))

    for same_pixels in by_content.values():
        train = [item for item in same_pixels if item.sample.split == "train"]
        test = [item for item in same_pixels if item.sample.split == "test"]
        if len({item.sample.label for item in same_pixels}) > 1:
            for item in same_pixels:
                twin = next(other for other in same_pixels if other.sample.label != item.sample.label)
                other_path = settings.relative(twin.sample.path)
                word = "anomalous" if twin.sample.label else "normal"
                reject(item, "contradictory_label", f"the same pixels are {word} in {other_path}: remove the wrong one")
        elif train and test:
            kept_items += test
            for item in train:
                other_path = settings.relative(test[0].sample.path)
                reject(item, "duplicate_across_splits", f"the same pixels are test data in {other_path}, which is kept")
        else:
            kept_items += test + train[:1]
            for item in train[1:]:
                other_path = settings.relative(train[0].sample.path)
                reject(item, "duplicate_in_train", f"the same pixels are in {other_path}, which is kept")
    return kept_items, rejects


def make_row_ids(samples: Sequence[Sample], category: str) -> list[str]:
    """Returns unique row ids, category/folder/defect/subfolders/stem.

    If two ids are equal, they end with the file name instead of the stem. If they are still equal, they contain the last three
    parts of the path.
    """

    def prefix(sample: Sample) -> list[str]:
        defect = [] if sample.folder == sample.defect_type else [sample.defect_type]
        return [category, sample.folder, *defect, *([sample.subfolders] if sample.subfolders else [])]

    stems = ["/".join([*prefix(sample), sample.path.stem]) for sample in samples]
    names = ["/".join([*prefix(sample), sample.path.name]) for sample in samples]
    num_uses = Counter(stems)
    ids = [name if num_uses[stem] > 1 else stem for stem, name in zip(stems, names, strict=True)]
    paths = ["/".join([*prefix(sample), *sample.path.parts[-3:]]) for sample in samples]
    num_uses = Counter(ids)
    return [path if num_uses[row_id] > 1 else row_id for row_id, path in zip(ids, paths, strict=True)]


def id_with_hash(row_id: str, item: CheckedSample) -> str:
    """Returns the alternative id of an image whose id is already used: the id and the first digits of its content hash."""
    return f"{row_id}~{item.content_hash[:12]}"


def find_existing_ids(index: pa.Table, ids: Collection[str]) -> set[str]:
    """Returns the ids that rows of an index already use."""
    is_match = pc.is_in(index["id"], value_set=pa.array(sorted(set(ids)), pa.string()))
    return set(index["id"].filter(is_match).to_pylist())


def choose_unused_ids(ids: Sequence[str], items: Sequence[CheckedSample], index: pa.Table) -> list[str]:
    """Returns ids that no row of the index uses.

    An id that is already used is replaced by `id_with_hash`. If that id is used as well, a number is appended.
    """
    used_ids = find_existing_ids(index, [*ids, *map(id_with_hash, ids, items)])
    unused_ids = []
    for row_id, item in zip(ids, items, strict=True):
        candidate, number = row_id, 1
        while candidate in used_ids:
            candidate = id_with_hash(row_id, item) + (f"-{number}" if number > 1 else "")
            number += 1
        used_ids.add(candidate)
        unused_ids.append(candidate)
    return unused_ids


@dataclass(frozen=True)
class DeduplicationResult:
    """The result of comparing new images with the existing rows of a category.

    Attributes:
        new_items: images that the category does not contain yet.
        num_existing: images whose pixels, label and split the category already contains.
        rejects: images that contradict existing rows.
        displaced: content hash -> numbers of the training rows that a new test image with the same pixels replaces.
        num_regrouped: existing images to which the source now gives another group.
    """

    new_items: list[CheckedSample]
    num_existing: int
    rejects: list[Reject]
    displaced: dict[str, list[int]]
    num_regrouped: int = 0


def deduplicate_against(
    items: Sequence[CheckedSample], index: pa.Table, category: str, settings: ImportSettings
) -> DeduplicationResult:
    """Compares new images with the existing rows of a category. docs/use/data.md has a table of the cases.

    Args:
        items: the new images.
        index: the index of the existing rows.
    """
    rows_by_hash = find_index_rows(index, [item.content_hash for item in items])
    result = DeduplicationResult([], 0, [], {})
    num_existing = num_regrouped = 0
    for item in items:
        rows = rows_by_hash.get(item.content_hash, [])
        sample = item.sample
        path = settings.relative(sample.path)
        contradiction = next((row for row in rows if row.label != sample.label), None)
        if contradiction is not None:
            word = "anomalous" if contradiction.label else "normal"
            detail = f"the same pixels are {word} in the row {contradiction.id}, which is kept: remove the wrong one"
            result.rejects.append(Reject(path, category, "contradictory_label", detail))
        elif any(row.split == sample.split for row in rows) or (rows and sample.has_drawn_split):
            num_existing += 1
            num_regrouped += settings.grouping is not None and all(row.group != sample.group for row in rows)
        elif rows and sample.split == "train":
            detail = f"the same pixels are test data in the row {rows[0].id}, which is kept"
            result.rejects.append(Reject(path, category, "duplicate_across_splits", detail))
        else:
            result.new_items.append(item)
            if rows:
                result.displaced[item.content_hash] = [row.number for row in rows]
    return DeduplicationResult(result.new_items, num_existing, result.rejects, result.displaced, num_regrouped)


@dataclass(frozen=True, slots=True)
class IndexRow:
    """An existing row of a category. number: position of the row in the index."""

    number: int
    id: str
    label: int
    split: str
    group: str


def find_index_rows(index: pa.Table, hashes: Collection[str]) -> dict[str, list[IndexRow]]:
    """Returns the rows of an index with one of the content hashes, as content hash -> rows."""
    is_match = pc.is_in(index["content_hash"], value_set=pa.array(sorted(set(hashes)), pa.string()))
    numbers = pc.indices_nonzero(is_match)
    matches = index.take(numbers).select(["content_hash", "id", "label", "split", "group"])
    rows: dict[str, list[IndexRow]] = defaultdict(list)
    for number, row in zip(numbers.to_pylist(), matches.to_pylist(), strict=True):
        rows[row["content_hash"]].append(IndexRow(number, row["id"], row["label"], row["split"], row["group"]))
    return rows
