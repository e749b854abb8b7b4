"""What an ingestion tells: counts, what folders were taken for, what is likely not meant, what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from focus_ray.data.importers.base import ImportSettings
from focus_ray.data.ingestion.check import Checked
from focus_ray.data.schema import Reject


@dataclass(frozen=True)
class CategoryReport:
    """What one category holds after an ingestion; counts are rows, ``num_masks`` anomalous rows with a mask.

    folders: what each folder of the source was taken for.  num_added: of an append, images that it brought.  num_there: images of
    the source that were there before it.  num_train_groups: groups of the training images, counting each image without a group;
    None if no image has a group.
    """

    name: str
    status: Literal["written", "appended", "unchanged"]
    num_train: int
    num_test_normal: int
    num_test_anomalous: int
    num_masks: int
    folders: tuple[str, ...] = ()
    num_added: int = 0
    num_there: int = 0
    num_train_groups: int | None = None

    @property
    def num_rows(self) -> int:
        """All rows."""
        return self.num_train + self.num_test_normal + self.num_test_anomalous


@dataclass(frozen=True)
class IngestReport:
    """The outcome of ``ingest``. ``str()`` gives the text to show."""

    format: str
    categories: tuple[CategoryReport, ...]
    rejects: tuple[Reject, ...]
    notes: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Rows of all categories."""
        return sum(category.num_rows for category in self.categories)

    @property
    def exit_status(self) -> int:
        """0 when every file was taken, 3 when any was rejected (now, or in the unchanged data at hand)."""
        return 3 if self.rejects else 0

    def __str__(self) -> str:
        lines = [f"format: {self.format}"]
        for item in self.categories:
            lines.append(
                f"{item.name}: {item.status}, {item.num_train} train, {item.num_test_normal} normal and "
                f"{item.num_test_anomalous} anomalous test images, {item.num_masks} masks"
            )
            if item.num_added or item.num_there:
                lines.append(f"  {item.num_added} images are new, {item.num_there} were there already")
            if item.num_train_groups is not None:
                lines.append(f"{item.name}: {item.num_train} training images of {item.num_train_groups} parts")
            lines += [f"  {folder}" for folder in item.folders]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"rejected ({item.reason}): {item.path}: {item.detail}" for item in self.rejects]
        if self.rejects:
            counts = Counter(item.reason for item in self.rejects)
            lines.append(f"{len(self.rejects)} rejected: " + ", ".join(f"{n} {r}" for r, n in sorted(counts.items())))
        return "\n".join(lines)


Outcome = tuple[CategoryReport | None, list[Reject], list[str]]
"""Of a category: its report, None where nothing in it is usable; what was left out; notes."""


def count_rows(kept: Sequence[Checked]) -> dict[str, int]:
    """The counts of `CategoryReport`."""
    return {
        "num_train": sum(item.sample.split == "train" for item in kept),
        "num_test_normal": sum(item.sample.split == "test" and not item.sample.label for item in kept),
        "num_test_anomalous": sum(item.sample.label for item in kept),
        "num_masks": sum(item.mask is not None for item in kept),
    }


@dataclass(frozen=True)
class GroupCounts:
    """Groups of a category.

    num_train: groups of the training images, counting each image without a group; None if no image of the category has one.
    shared: names of the groups with both training images and good test images, sorted.
    """

    num_train: int | None
    shared: tuple[str, ...]


def count_groups(index: pa.Table) -> GroupCounts:
    """Counts the groups in an index of a category."""
    named: dict[str, set[str]] = {"train": set(), "good test": set(), "bad test": set()}
    num_alone = 0
    for split, label, group in zip(*(index[name].to_pylist() for name in ("split", "label", "group")), strict=True):
        if group:
            named["train" if split == "train" else "bad test" if label else "good test"].add(group)
        elif split == "train":
            num_alone += 1
    if not any(named.values()):
        return GroupCounts(None, ())
    return GroupCounts(len(named["train"]) + num_alone, tuple(sorted(named["train"] & named["good test"])))


def shared_groups_note(category: str, groups: GroupCounts) -> list[str]:
    """Returns a note if parts are photographed in both training images and good test images."""
    if not groups.shared:
        return []
    count = len(groups.shared)
    return [
        f"{category}: {count} {'part is' if count == 1 else 'parts are'} in both the training images and the good test images "
        f"(the first: {groups.shared[0]!r}): false alarms on known parts say little about new parts"
    ]


def plausibility(category: str, counts: dict[str, int], kept: Sequence[Checked], settings: ImportSettings) -> list[str]:
    """What was taken as it is and is likely not meant, once a category and not once a file."""
    notes = []

    def told(found: list[Checked], words: str) -> None:
        if found:
            first = settings.relative((found[0].sample.masks or (found[0].sample.path,))[0])
            notes.append(f"{category}: {words.format(count=len(found))} (the first: {first})")

    if counts["num_test_anomalous"] and not counts["num_test_normal"]:
        notes.append(
            f"{category}: no good test image: false alarms and image AUROC cannot be measured; put good parts that are not for "
            "training into test/good"
        )
    if kept and max(item.levels for item in kept) <= 3:
        what = "are of one colour" if max(item.levels for item in kept) == 1 else "have two or three values only"
        notes.append(f"{category}: all {len(kept)} images {what}: are they masks, or exported with a wrong range?")
    masked = [item for item in kept if item.mask is not None]
    told(
        [item for item in masked if item.mask_values > MASK_VALUES],
        "{count} masks have many values above 0, as after JPEG, blur or scaling; each of them counts as defective: save masks as "
        "PNG with 0 and 255",
    )
    told(
        [item for item in masked if item.marked > 0.5],
        "{count} masks mark more than half of their image: defective is what is above 0, are they inverted?",
    )
    return notes


MASK_VALUES = 16  # more than kinds of defects are told apart by
