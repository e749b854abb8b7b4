"""VisA."""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

from focus_ray.data.importers.base import ImportPlan, ImportSettings, Sample, category_name, folder_name, held_for_test
from focus_ray.data.importers.vocabulary import is_good_name
from focus_ray.data.schema import SPLITS, Reject
from focus_ray.data.source import SourcePath
from focus_ray.errors import DataError

_NO = ("0", "0.0", "false", "no", "f", "n")  # of a column that says whether the part is anomalous
_YES = ("1", "1.0", "true", "yes", "t", "y")


def plan_visa(
    table: SourcePath, root: SourcePath, categories: Sequence[str] | None, settings: ImportSettings
) -> list[ImportPlan]:
    """VisA: a table of object,split,label,image,mask; without a split column, normal images are split by seed."""
    try:
        reader = csv.DictReader(io.StringIO(table.read_bytes().decode("utf-8-sig"), newline=""))
        columns = set(reader.fieldnames or ())
        rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot read the table: {error}") from error
    needed = {"image", "label"} | ({"object"} if table.name != "image_anno.csv" else set())
    missing = needed - columns
    if missing:
        raise DataError(
            f"{table}: no column {' or '.join(sorted(missing))}; expected object,split,label,image,mask, "
            f"got {','.join(sorted(columns)) or 'nothing'}"
        )
    plans: dict[str, ImportPlan] = {}
    unsplit: dict[str, list[str]] = defaultdict(list)
    parsed = []
    for number, row in enumerate(rows, start=2):
        category = category_name(row.get("object") or folder_name(table.parent), table)
        label_text, image_text = (row["label"] or "").strip(), (row["image"] or "").strip()
        split = (row.get("split") or "").strip().lower()
        if split not in ("", *SPLITS) or not label_text or not image_text:
            raise DataError(
                f"{table}: line {number}: expected split train or test, a label and an image, got split={split!r}, "
                f"label={label_text!r}, image={image_text!r}"
            )
        label = int(not (is_good_name(label_text) or label_text.casefold() in _NO))
        if label and split == "train":
            raise DataError(f"{table}: line {number}: an anomalous image ({label_text!r}) in train; move it to test")
        if not label and not split:
            unsplit[category].append(image_text)
        parsed.append((category, split, label, label_text, image_text, (row.get("mask") or "").strip()))
    held: dict[str, set[str]] = {}
    for category, names in unsplit.items():
        groups = (
            settings.name_groups([(_table_path(name, root, table), "") for name in names])
            if settings.grouping
            else None
        )
        chosen = held_for_test(names, settings, groups)
        held[category] = {name for name, is_held in zip(names, chosen, strict=True) if is_held}
    for category, split, label, label_text, image_text, mask_text in parsed:
        if categories is not None and category not in categories:
            plans.setdefault(category, ImportPlan(category))
            continue
        plan = plans.setdefault(category, ImportPlan(category))
        drawn = not split
        if drawn:
            split = "test" if label or image_text in held[category] else "train"
        image, mask = (_table_path(text, root, table) for text in (image_text, mask_text or image_text))
        lost = [text for text, path in ((image_text, image), (mask_text, mask)) if text and not path.is_file()]
        if lost:
            detail = f"{settings.relative(table)} names {lost[0]}, which is not there"
            plan.rejects.append(Reject(settings.relative(image), category, "missing_file", detail))
            continue
        named = "anomaly" if label_text.casefold() in _YES else label_text
        defect = re.sub(r"[^A-Za-z0-9._-]+", "_", named) if label else "good"
        masks = (mask,) if mask_text else ()
        plan.samples.append(Sample(image, split, split, label, defect, masks, drawn))
    return [plans[name] for name in sorted(plans)]


def _table_path(text: str, root: SourcePath, table: SourcePath) -> SourcePath:
    """Resolves a table's entry against the data set's root, then the table's folder; never outside the root."""
    parts = PurePosixPath(text.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        raise DataError(f"{table}: {text!r} leaves the data set's folder; expected a path relative to {root}")
    beside = table.parent / parts
    return beside if not (root / parts).is_file() and beside.is_file() else root / parts


def visa_tables(source: SourcePath) -> list[SourcePath]:
    for table in (source / "split_csv" / "1cls.csv", source / "image_anno.csv"):
        if table.is_file():
            return [table]
    return sorted(source.glob("*/image_anno.csv"))


class _VisaImporter:
    expected = "split_csv/1cls.csv or image_anno.csv"
    has_table = True

    def fits(self, folder: SourcePath) -> bool:
        return bool(visa_tables(folder))

    def plan(self, folder: SourcePath, categories: Sequence[str] | None, settings: ImportSettings) -> list[ImportPlan]:
        return [plan for table in visa_tables(folder) for plan in plan_visa(table, folder, categories, settings)]


VISA = _VisaImporter()
