"""Removes duplicate images and makes row ids unique, among new images and against the existing rows of a category."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from focus_ray.data.importers.base import ImportSettings, SourceImage
from focus_ray.data.schema import RejectedFile, RejectReason
from focus_ray.ingestion.check import CheckedSample


def remove_duplicates(
    checked: Sequence[CheckedSample], category: str, settings: ImportSettings
) -> tuple[list[CheckedSample], list[RejectedFile]]:
    """Finds new images of one category that have equal pixels, and keeps only the images that are allowed to stay.

    Training images that are also test images are removed, and a repeated training image is kept once. Repeated test images are
    all kept. Equal images with different labels are all removed. docs/use/data.md has a table of the cases.

    Args:
        checked: the new images.
        category: name of the category, for the rejections.
        settings: the settings of the ingestion.

    Returns:
        The images to keep, and the rejected images with their reasons.
    """
    by_content: dict[str, list[CheckedSample]] = defaultdict(list)
    for item in sorted(checked, key=lambda item: settings.describe_path(item.sample.path)):
        by_content[item.content_hash].append(item)
    kept_items: list[CheckedSample] = []
    rejects: list[RejectedFile] = []

    def add_reject(item: CheckedSample, reason: RejectReason, detail: str) -> None:
        rejects.append(RejectedFile(settings.describe_path(item.sample.path), category, reason, detail))

    for same_pixels in by_content.values():
        if len({item.sample.label for item in same_pixels}) > 1:
            for item in same_pixels:
                twin = next(other for other in same_pixels if other.sample.label != item.sample.label)
                word = "anomalous" if twin.sample.label else "normal"
                other_path = settings.describe_path(twin.sample.path)
                add_reject(
                    item, "contradictory_label", f"the same pixels are {word} in {other_path}: remove the wrong one"
                )
            continue
        train = [item for item in same_pixels if item.sample.split == "train"]
        test = [item for item in same_pixels if item.sample.split == "test"]
        kept_items += test or train[:1]
        for item in train if test else train[1:]:
            other_path = settings.describe_path((test or train)[0].sample.path)
            if test:
                add_reject(
                    item, "duplicate_across_splits", f"the same pixels are test data in {other_path}, which is kept"
                )
            else:
                add_reject(item, "duplicate_in_train", f"the same pixels are in {other_path}, which is kept")
    return kept_items, rejects


def make_row_ids(samples: Sequence[SourceImage], category: str) -> list[str]:
    """Returns a row id for each image: category/folder/defect/subfolders/stem, where the stem is the file name without suffix.

    If two ids are equal, they end with the file name instead of the stem. If they are still equal, they end with the last three
    parts of the path.
    """

    def list_id_parts(sample: SourceImage) -> list[str]:
        defect = [] if sample.folder == sample.defect_type else [sample.defect_type]
        return [category, sample.folder, *defect, *([sample.subfolders] if sample.subfolders else [])]

    stems = ["/".join([*list_id_parts(sample), sample.path.stem]) for sample in samples]
    names = ["/".join([*list_id_parts(sample), sample.path.name]) for sample in samples]
    num_uses = Counter(stems)
    ids = [name if num_uses[stem] > 1 else stem for stem, name in zip(stems, names, strict=True)]
    paths = ["/".join([*list_id_parts(sample), *sample.path.parts[-3:]]) for sample in samples]
    num_uses = Counter(ids)
    return [path if num_uses[row_id] > 1 else row_id for row_id, path in zip(ids, paths, strict=True)]


def append_hash_to_id(row_id: str, item: CheckedSample) -> str:
    """Returns the alternative id of an image whose id is already used: the id, "~" and 12 digits of its content hash."""
    return f"{row_id}~{item.content_hash[:12]}"


def find_rows_by_value(index: pa.Table, column: str, values: Collection[str]) -> pa.Table:
    """Returns the rows of an index table whose column has one of the values, plus a column `number`, the row position."""
    numbers = pc.indices_nonzero(pc.is_in(index[column], value_set=pa.array(sorted(set(values)), pa.string())))
    return index.take(numbers).append_column("number", numbers)


def find_used_row_ids(index: pa.Table, ids: Collection[str]) -> set[str]:
    """Returns the row ids in `ids` that rows of the index table already use."""
    return set(find_rows_by_value(index, "id", ids)["id"].to_pylist())


def choose_unused_row_ids(ids: Sequence[str], items: Sequence[CheckedSample], index: pa.Table) -> list[str]:
    """Returns a row id for each image that no row of the index uses.

    An id that is already used is replaced by `append_hash_to_id`. If that id is used as well, a number is appended.

    Args:
        ids: preferred id of each image.
        items: the images.
        index: table of the existing rows.
    """
    used_ids = find_used_row_ids(index, [*ids, *map(append_hash_to_id, ids, items)])
    unused_ids = []
    for row_id, item in zip(ids, items, strict=True):
        candidate, number = row_id, 1
        while candidate in used_ids:
            candidate = append_hash_to_id(row_id, item) + (f"-{number}" if number > 1 else "")
            number += 1
        used_ids.add(candidate)
        unused_ids.append(candidate)
    return unused_ids


class ExistingRowComparison(NamedTuple):
    """The result of comparing new images with the existing rows of a category.

    Attributes:
        new_items: images that the category does not contain yet.
        rejects: images that contradict existing rows.
        displaced_rows: content hash -> numbers of the training rows that a new test image with the same pixels replaces.
        num_existing: images whose pixels and label the category already contains in the same split (in any split if it was
            drawn).
        num_regrouped: how many of these images now have another group in the source.
    """

    new_items: list[CheckedSample]
    rejects: list[RejectedFile]
    displaced_rows: dict[str, list[int]]
    num_existing: int
    num_regrouped: int


def compare_with_existing_rows(
    items: Sequence[CheckedSample], index: pa.Table, category: str, settings: ImportSettings
) -> ExistingRowComparison:
    """Compares new images with the existing rows of a category by their pixels. docs/use/data.md has a table of the cases.

    Args:
        items: the new images.
        index: table of the existing rows.
        category: name of the category, for the rejections.
        settings: the settings of the ingestion.
    """
    rows_by_hash: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in find_rows_by_value(index, "content_hash", [item.content_hash for item in items]).to_pylist():
        rows_by_hash[row["content_hash"]].append(row)
    new_items: list[CheckedSample] = []
    rejects: list[RejectedFile] = []
    displaced_rows: dict[str, list[int]] = {}
    num_existing = num_regrouped = 0
    for item in items:
        rows, sample = rows_by_hash.get(item.content_hash, []), item.sample
        path = settings.describe_path(sample.path)
        contradiction = next((row for row in rows if row["label"] != sample.label), None)
        if contradiction is not None:
            word = "anomalous" if contradiction["label"] else "normal"
            detail = f"the same pixels are {word} in the row {contradiction['id']}, which is kept: remove the wrong one"
            rejects.append(RejectedFile(path, category, "contradictory_label", detail))
        elif any(row["split"] == sample.split for row in rows) or (rows and sample.has_drawn_split):
            num_existing += 1
            num_regrouped += settings.grouping is not None and all(row["group"] != sample.group for row in rows)
        elif rows and sample.split == "train":
            detail = f"the same pixels are test data in the row {rows[0]['id']}, which is kept"
            rejects.append(RejectedFile(path, category, "duplicate_across_splits", detail))
        else:
            new_items.append(item)
            if rows:
                displaced_rows[item.content_hash] = [row["number"] for row in rows]
    return ExistingRowComparison(new_items, rejects, displaced_rows, num_existing, num_regrouped)
