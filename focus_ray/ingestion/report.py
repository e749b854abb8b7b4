"""The report of an ingestion: counts, interpretation of the folders, notes on implausible data, and rejected files."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from focus_ray.data.importers.base import ImportSettings
from focus_ray.data.schema import RejectedFile
from focus_ray.ingestion.check import CheckedSample

MAX_MASK_VALUES = 16  # masks that distinguish types of defects use fewer values

Status = Literal["written", "appended", "unchanged"]


@dataclass(frozen=True)
class CategoryReport:
    """The content of one category after an ingestion. All counts are numbers of rows, if not stated otherwise.

    Attributes:
        name: name of the category.
        status: "written" (new or replaced), "appended" or "unchanged".
        num_train: training rows.
        num_test_normal, num_test_anomalous: test rows.
        num_masks: anomalous rows with a mask.
        folders: for each folder of the source, a text with its interpretation.
        num_added: images that an append added.
        num_existing: images of the source that an append found in the category.
        num_train_groups: groups of the training images, where each image without a group counts as one group; None if no image
            has a group.
    """

    name: str
    status: Status
    num_train: int
    num_test_normal: int
    num_test_anomalous: int
    num_masks: int
    folders: tuple[str, ...] = ()
    num_added: int = 0
    num_existing: int = 0
    num_train_groups: int | None = None

    @property
    def num_rows(self) -> int:
        """The number of rows of the category."""
        return self.num_train + self.num_test_normal + self.num_test_anomalous


@dataclass(frozen=True)
class IngestReport:
    """The result of ``ingest`` for all categories. ``str()`` returns the text for the user.

    Attributes:
        format: name of the folder layout.
        categories: report of each published or unchanged category.
        rejects: the rejected files.
        notes: hints for the user.
    """

    format: str
    categories: tuple[CategoryReport, ...]
    rejects: tuple[RejectedFile, ...]
    notes: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """The number of rows of all categories."""
        return sum(category.num_rows for category in self.categories)

    @property
    def exit_status(self) -> int:
        """The exit status of the command: 3 if a file was rejected, also in an unchanged category, otherwise 0.

        A duplicate does not count: its pixels are in the data set.
        """
        return 3 if any(not item.reason.startswith("duplicate_") for item in self.rejects) else 0

    def __str__(self) -> str:
        lines = [f"format: {self.format}"]
        for item in self.categories:
            lines.append(
                f"{item.name}: {item.status}, {item.num_train} train, {item.num_test_normal} normal and "
                f"{item.num_test_anomalous} anomalous test images, {item.num_masks} masks"
            )
            if item.num_added or item.num_existing:
                lines.append(f"  {item.num_added} images are new, {item.num_existing} existed already")
            if item.num_train_groups is not None:
                lines.append(f"{item.name}: {item.num_train} training images of {item.num_train_groups} parts")
            lines += [f"  {folder}" for folder in item.folders]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"rejected ({item.reason}): {item.path}: {item.detail}" for item in self.rejects]
        if self.rejects:
            counts = Counter(item.reason for item in self.rejects)
            lines.append(f"{len(self.rejects)} rejected: " + ", ".join(f"{n} {r}" for r, n in sorted(counts.items())))
        return "\n".join(lines)


def count_rows_by_split_and_label(index: pa.Table) -> dict[str, int]:
    """Counts the rows of an index table. Returns field of `CategoryReport` -> number, for all counts except `num_masks`."""
    num_rows = Counter(zip(index["split"].to_pylist(), index["label"].to_pylist(), strict=True))
    return {
        "num_train": num_rows["train", 0],
        "num_test_normal": num_rows["test", 0],
        "num_test_anomalous": num_rows["test", 1],
    }


def count_training_groups(category: str, index: pa.Table) -> tuple[int | None, list[str]]:
    """Counts the groups of the training images. An image without a group counts as one group.

    Args:
        category: name of the category.
        index: table of the rows of the category, with the columns split, label and group.

    Returns:
        The number, or None if no image of the category has a group; and a list of notes. The list has one note if training
        images and good test images show the same part; otherwise it is empty.
    """
    names: dict[tuple[str, int], set[str]] = defaultdict(set)
    num_ungrouped = 0
    for split, label, group in zip(*(index[name].to_pylist() for name in ("split", "label", "group")), strict=True):
        if group:
            names[split, label].add(group)
        elif split == "train":
            num_ungrouped += 1
    if not names:
        return None, []
    notes = []
    shared = sorted(names["train", 0] & names["test", 0])
    if shared:
        notes.append(
            f"{category}: {len(shared)} {'part is' if len(shared) == 1 else 'parts are'} in both the training images and the "
            f"good test images (the first: {shared[0]!r}): false alarms on known parts say little about new parts"
        )
    return len(names["train", 0]) + num_ungrouped, notes


def find_implausible_data(
    category: str, counts: dict[str, int], items: Sequence[CheckedSample], settings: ImportSettings
) -> list[str]:
    """Returns notes on ingested data that is probably wrong, such as inverted masks. There is one note per problem.

    Args:
        category: name of the category.
        counts: the row counts of `CategoryReport`.
        items: the ingested images of the category.
        settings: the settings of the ingestion.
    """
    notes = []
    if counts["num_test_anomalous"] and not counts["num_test_normal"]:
        notes.append(
            f"{category}: no good test image: false alarms and image AUROC cannot be measured; put good parts that are not for "
            "training into test/good"
        )
    num_levels = max((item.num_levels for item in items), default=256)
    if num_levels <= 3:
        problem = "a single colour" if num_levels == 1 else "only two or three pixel values"
        notes.append(
            f"{category}: all {len(items)} images have {problem}: are they masks, or exported with a wrong range?"
        )
    masked = [item for item in items if item.mask is not None]
    many_values = (
        "have many values above 0, as after JPEG, blur or scaling; every value above 0 means defective: save masks"
    )
    items_by_problem = {
        f"masks {many_values} as PNG with 0 and 255": [
            item for item in masked if item.num_mask_values > MAX_MASK_VALUES
        ],
        "masks mark more than half of their image; values above 0 mean defective: are the masks inverted?": [
            item for item in masked if item.mask_share > 0.5
        ],
    }
    for problem, affected in items_by_problem.items():
        if affected:
            first = settings.describe_path(affected[0].sample.masks[0])
            notes.append(f"{category}: {len(affected)} {problem} (the first: {first})")
    return notes
