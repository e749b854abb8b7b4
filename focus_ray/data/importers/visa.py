"""The importer for the public data set VisA, and for other data sets with a table of the same columns."""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import compress
from pathlib import PurePosixPath

from focus_ray.data.importers.base import (
    ImportPlan,
    ImportSettings,
    SourceImage,
    get_folder_name,
    select_test_images,
)
from focus_ray.data.importers.vocabulary import means_good_parts
from focus_ray.data.schema import SPLITS, RejectedFile
from focus_ray.data.source import SourcePath
from focus_ray.errors import DataError
from focus_ray.names import make_valid_name

# labels of tables that state whether the part is anomalous
_NO = ("0", "0.0", "false", "no", "f", "n")
_YES = ("1", "1.0", "true", "yes", "t", "y")


def plan_visa_import(
    table: SourcePath, root: SourcePath, categories: Sequence[str] | None, settings: ImportSettings
) -> list[ImportPlan]:
    """Makes the import plans of the categories in a table with the columns object,split,label,image,mask.

    For rows without a split, the normal images are split at random by the seed, and all anomalous images are test images.

    Args:
        table: the CSV file.
        root: the folder that the paths in the table are relative to.
        categories: the categories to ingest; the plans of all others are empty. None takes all.
        settings: the settings of the ingestion.

    Raises: DataError: the table cannot be read, lacks a column, has an invalid line or category name, or names a path outside
        `root`.
    """
    try:
        reader = csv.DictReader(io.StringIO(table.read_bytes().decode("utf-8-sig"), newline=""))
        columns = set(reader.fieldnames or ())
        rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot read the table: {error}") from error
    required = {"image", "label"} | ({"object"} if table.name != "image_anno.csv" else set())
    missing = required - columns
    if missing:
        expected = f"expected object,split,label,image,mask, got {','.join(sorted(columns)) or 'nothing'}"
        raise DataError(f"{table}: no column {' or '.join(sorted(missing))}; {expected}")
    plans: dict[str, ImportPlan] = {}
    unsplit: dict[str, list[str]] = defaultdict(list)
    parsed = []
    for number, row in enumerate(rows, start=2):
        category = make_valid_name(row.get("object") or get_folder_name(table.parent))
        label_text, image_text = (row["label"] or "").strip(), (row["image"] or "").strip()
        split = (row.get("split") or "").strip().lower()
        if split not in ("", *SPLITS) or not label_text or not image_text:
            row_text = f"split={split!r}, label={label_text!r}, image={image_text!r}"
            raise DataError(
                f"{table}: line {number}: expected split train or test, a label and an image, got {row_text}"
            )
        label = int(not (means_good_parts(label_text) or label_text.casefold() in _NO))
        if label and split == "train":
            raise DataError(f"{table}: line {number}: an anomalous image ({label_text!r}) in train; move it to test")
        if not label and not split:
            unsplit[category].append(image_text)
        parsed.append((category, split, label, label_text, image_text, (row.get("mask") or "").strip()))
    test_images: dict[str, set[str]] = {}
    for category, names in unsplit.items():
        groups = settings.name_groups([(_resolve_table_path(name, root, table), "") for name in names])
        test_images[category] = set(compress(names, select_test_images(names, settings, groups)))
    for category, split, label, label_text, image_text, mask_text in parsed:
        plan = plans.setdefault(category, ImportPlan(category))
        if categories is not None and category not in categories:
            continue
        has_drawn_split = not split
        if has_drawn_split:
            split = "test" if label or image_text in test_images[category] else "train"
        image, mask = (_resolve_table_path(text, root, table) for text in (image_text, mask_text or image_text))
        missing_files = [text for text, path in ((image_text, image), (mask_text, mask)) if text and not path.is_file()]
        if missing_files:
            detail = f"{settings.describe_path(table)} names {missing_files[0]}, which does not exist"
            plan.rejects.append(RejectedFile(settings.describe_path(image), category, "missing_file", detail))
            continue
        label_name = "anomaly" if label_text.casefold() in _YES else label_text
        defect = re.sub(r"[^A-Za-z0-9._-]+", "_", label_name) if label else "good"
        plan.samples.append(
            SourceImage(image, split, split, label, defect, (mask,) if mask_text else (), has_drawn_split)
        )
    return [plans[name] for name in sorted(plans)]


def _resolve_table_path(text: str, root: SourcePath, table: SourcePath) -> SourcePath:
    """Returns the file that an entry of a table names, relative to the root or, if missing there, to the folder of the table.

    Raises: DataError: the entry leads out of the root.
    """
    parts = PurePosixPath(text.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        raise DataError(f"{table}: {text!r} leads out of the data set; expected a path relative to {root}")
    path_beside_table = table.parent / parts
    return path_beside_table if not (root / parts).is_file() and path_beside_table.is_file() else root / parts


def find_visa_tables(source: SourcePath) -> list[SourcePath]:
    """Returns the CSV tables of a source: the table of all categories if there is one, otherwise one table per category."""
    for table in (source / "split_csv" / "1cls.csv", source / "image_anno.csv"):
        if table.is_file():
            return [table]
    return sorted(source.glob("*/image_anno.csv"))


class _VisaImporter:
    """The importer for data sets with a split table in the format of VisA, see `Importer`."""

    expected = "split_csv/1cls.csv or image_anno.csv"
    has_table = True

    def matches_folder(self, folder: SourcePath) -> bool:
        """Returns whether a folder contains such a table."""
        return bool(find_visa_tables(folder))

    def plan_import(
        self, folder: SourcePath, categories: Sequence[str] | None, settings: ImportSettings
    ) -> list[ImportPlan]:
        """Returns the import plans of all categories in the tables of a folder. Raises: DataError: see `plan_visa_import`."""
        return [
            plan for table in find_visa_tables(folder) for plan in plan_visa_import(table, folder, categories, settings)
        ]


VISA = _VisaImporter()
