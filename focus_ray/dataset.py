"""The Parquet data set: its schema, importers of the field's folder shapes, and readers of what was committed.

One category is one folder, ``<root>/category=<name>/``, with part files and ``_commit.json``, which lists the part
files that count. It is replaced as a whole, so a reader sees the old data or the new and never a mixture; a run that
dies leaves the old. docs/DATA.md has the schema, the folder shapes and what becomes of odd files.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import re
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs
from tqdm import tqdm

from focus_ray.errors import DataError
from focus_ray.images import ImageError, encode_png, read_image, read_mask
from focus_ray.storage import open_filesystem, open_input, read_file, storage_errors, sync_file, write_file

if TYPE_CHECKING:
    import ray.data

SCHEMA_VERSION = 1
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # category/folder/defect/stem, unique
        pa.field("category", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),  # train or test
        pa.field("label", pa.int8(), nullable=False),  # 0 normal, 1 anomalous
        pa.field("defect_type", pa.string(), nullable=False),  # "good" where label is 0
        pa.field("image", pa.binary(), nullable=False),  # the file as it came
        pa.field("mask", pa.binary()),  # 1-bit PNG, width x height; null where not known or label is 0
        pa.field("width", pa.int32(), nullable=False),  # pixels, after EXIF rotation
        pa.field("height", pa.int32(), nullable=False),
        pa.field("site", pa.string(), nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),  # SHA-256 of size and decoded RGB pixels
    ],
    metadata={"focus_ray.schema_version": str(SCHEMA_VERSION)},
)
SPLITS = ("train", "test")
INDEX_COLUMNS = ("id", "split", "label", "defect_type", "width", "height", "site", "content_hash")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm", ".pnm")
# Companions of the images that mean nothing here; any other suffix among them is rejected and said.
IGNORED_SUFFIXES = (
    *(".txt", ".md", ".rst", ".pdf", ".html"),
    *(".csv", ".json", ".xml", ".yaml", ".yml", ".log", ".db", ".ini"),
)
IGNORED_STEMS = ("license", "licence", "readme", "thumbs")

CATEGORY_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
COMMIT_NAME = "_commit.json"

# A row group is what a reader must hold: it closes at 256 rows, or from 64 rows on at 16 MiB, or at 64 MiB in any case.
MAX_ROW_GROUP_ROWS, MIN_ROW_GROUP_ROWS = 256, 64
ROW_GROUP_BYTES, MAX_ROW_GROUP_BYTES = 16 << 20, 64 << 20
FILE_BYTES = 64 << 20  # a part file takes no more row groups from here on
# Part files that no commit names are leftovers of a dead run, unless another run is just writing them.
STALE_AFTER = timedelta(hours=24)

Format = Literal["auto", "mvtec", "btad", "visa", "folder"]
RejectReason = Literal[
    "empty",
    "not_an_image",
    "unsupported",
    "truncated",
    "too_large",
    "unreadable",
    "missing_file",
    "mask_unreadable",
    "mask_size",
    "mask_on_good",
    "mask_ambiguous",
    "mask_without_image",
    "contradictory_label",
    "duplicate_across_splits",
    "duplicate_in_train",
]


@dataclass(frozen=True)
class Reject:
    """A source file that was left out: path relative to the source, and why."""

    path: str
    category: str
    reason: RejectReason
    detail: str


@dataclass(frozen=True)
class CategoryReport:
    """What one category holds after an ingestion; counts are rows, ``num_masks`` anomalous rows with a mask."""

    name: str
    status: Literal["written", "unchanged"]
    num_train: int
    num_test_normal: int
    num_test_anomalous: int
    num_masks: int

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
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"rejected ({item.reason}): {item.path}: {item.detail}" for item in self.rejects]
        if self.rejects:
            counts = Counter(item.reason for item in self.rejects)
            lines.append(f"{len(self.rejects)} rejected: " + ", ".join(f"{n} {r}" for r, n in sorted(counts.items())))
        return "\n".join(lines)


# Importers: from folders to a plan of samples; no file is opened but VisA's tables.


@dataclass(frozen=True)
class _Sample:
    path: Path
    folder: str  # the part of the id that says where the image came from
    split: str
    label: int
    defect_type: str
    masks: tuple[Path, ...] = ()


@dataclass
class _Plan:
    category: str
    samples: list[_Sample] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Settings:
    source: Path
    test_share: float
    seed: int

    def relative(self, path: Path) -> str:
        return path.relative_to(self.source).as_posix() if path.is_relative_to(self.source) else str(path)


def _plan_mvtec(root: Path, category: str, settings: _Settings) -> _Plan:
    """MVTec AD, MVTec AD 2 and MVTec LOCO, told apart by their folders alone."""
    plan = _Plan(category)
    for folder in ("train", "validation"):
        if (root / folder).is_dir():
            _refuse_folders(root / folder, {"good"}, "normal images only, in good/")
            _add_folder(plan, root / folder / "good", folder, "train", 0, "good", None, settings)
    for folder, truth in (("test", root / "ground_truth"), ("test_public", root / "test_public" / "ground_truth")):
        for defect in _subfolders(root / folder):
            if defect.name == "ground_truth":
                continue
            label = int(defect.name != "good")
            _add_folder(plan, defect, folder, "test", label, defect.name, truth / defect.name, settings)
        for masks in _subfolders(truth):
            if not (root / folder / masks.name).is_dir():
                _reject_lone_masks(plan, masks, set(), settings)
    for private in sorted(root.glob("test_private*")):
        plan.notes.append(f"{settings.relative(private)}: skipped, its labels are not public")
    return plan


def _plan_btad(root: Path, category: str, settings: _Settings) -> _Plan:
    """BTAD: ok and ko in place of good and a defect's name."""
    plan = _Plan(category)
    truth = root / "ground_truth"
    _refuse_folders(root / "train", {"ok"}, "normal images only, in ok/")
    _refuse_folders(root / "test", {"ok", "ko"}, "ok/ and ko/")
    _add_folder(plan, root / "train" / "ok", "train", "train", 0, "good", None, settings)
    _add_folder(plan, root / "test" / "ok", "test", "test", 0, "good", truth / "ok", settings)
    _add_folder(plan, root / "test" / "ko", "test", "test", 1, "ko", truth / "ko", settings)
    return plan


def _plan_folder(root: Path, category: str, settings: _Settings) -> _Plan:
    """good/, bad*/ and masks/: what somebody's own images most often are."""
    plan = _Plan(category)
    bad_folders = [item for item in _subfolders(root) if item.name.lower().startswith("bad")]
    masks_root = root / "masks"
    known = {"good", "masks", *(item.name for item in bad_folders)}
    _refuse_folders(root, known, "good/, bad*/ and masks/")

    normal = _Plan(category)
    _add_folder(normal, root / "good", "good", "train", 0, "good", None, settings)
    plan.rejects += normal.rejects
    plan.notes += normal.notes
    owners: dict[str, list[str]] = defaultdict(list)
    for bad in bad_folders:
        for path in _image_files(bad):
            owners[path.stem].append(bad.name)

    held = _held_for_test([item.path.name for item in normal.samples], settings) if bad_folders else set()
    for sample in normal.samples:
        stem = sample.path.stem
        masks = _match_masks(masks_root / "good", stem) or ([] if stem in owners else _match_masks(masks_root, stem))
        split = "test" if sample.path.name in held else "train"
        plan.samples.append(_Sample(sample.path, "good", split, 0, "good", tuple(masks)))
    for bad in bad_folders:
        anomalous = _Plan(category)
        defect = bad.name[len("bad") :].lstrip("_-. ") or "bad"
        _add_folder(anomalous, bad, bad.name, "test", 1, defect, None, settings)
        plan.rejects += anomalous.rejects
        plan.notes += anomalous.notes
        for sample in anomalous.samples:
            stem = sample.path.stem
            masks = _match_masks(masks_root / bad.name, stem)
            if not masks:
                masks = _match_masks(masks_root, stem)
                if masks and len(owners[stem]) > 1:
                    detail = (
                        f"{settings.relative(masks[0])} could belong to {stem} of {', '.join(owners[stem])}: "
                        "move it to masks/<folder of its image>/"
                    )
                    plan.rejects.append(Reject(settings.relative(sample.path), category, "mask_ambiguous", detail))
                    continue
            plan.samples.append(_Sample(sample.path, bad.name, "test", 1, defect, tuple(masks)))

    image_folders = [root / "good", *bad_folders]
    stems = {folder.name: {path.stem for path in _image_files(folder)} for folder in image_folders}
    _reject_lone_masks(plan, masks_root, set().union(stems, *stems.values()), settings)
    for name, own in stems.items():
        _reject_lone_masks(plan, masks_root / name, own, settings)
    return plan


def _plan_visa(table: Path, root: Path, categories: Sequence[str] | None, settings: _Settings) -> list[_Plan]:
    """VisA: a table of object,split,label,image,mask; without a split column, normal images are split by seed."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
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
    plans: dict[str, _Plan] = {}
    unsplit: dict[str, list[str]] = defaultdict(list)
    parsed = []
    for number, row in enumerate(rows, start=2):
        category = _category_name(row.get("object") or _folder_name(table.parent), table)
        label_text, image_text = (row["label"] or "").strip(), (row["image"] or "").strip()
        split = (row.get("split") or "").strip().lower()
        if split not in ("", *SPLITS) or not label_text or not image_text:
            raise DataError(
                f"{table}: line {number}: expected split train or test, a label and an image, got split={split!r}, "
                f"label={label_text!r}, image={image_text!r}"
            )
        label = int(label_text.lower() not in ("normal", "good", "ok", "0"))
        if label and split == "train":
            raise DataError(f"{table}: line {number}: an anomalous image ({label_text!r}) in train; move it to test")
        if not label and not split:
            unsplit[category].append(image_text)
        parsed.append((category, split, label, label_text, image_text, (row.get("mask") or "").strip()))
    held = {category: _held_for_test(names, settings) for category, names in unsplit.items()}
    for category, split, label, label_text, image_text, mask_text in parsed:
        if categories is not None and category not in categories:
            plans.setdefault(category, _Plan(category))
            continue
        plan = plans.setdefault(category, _Plan(category))
        if not split:
            split = "test" if label or image_text in held[category] else "train"
        image, mask = (_table_path(text, root, table) for text in (image_text, mask_text or image_text))
        lost = [text for text, path in ((image_text, image), (mask_text, mask)) if text and not path.is_file()]
        if lost:
            detail = f"{settings.relative(table)} names {lost[0]}, which is not there"
            plan.rejects.append(Reject(settings.relative(image), category, "missing_file", detail))
            continue
        defect = re.sub(r"[^A-Za-z0-9._-]+", "_", label_text) if label else "good"
        masks = (mask,) if mask_text else ()
        plan.samples.append(_Sample(image, split, split, label, defect, masks))
    return [plans[name] for name in sorted(plans)]


def _table_path(text: str, root: Path, table: Path) -> Path:
    """Resolves a table's entry against the data set's root, then the table's folder; never outside the root."""
    parts = PurePosixPath(text.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        raise DataError(f"{table}: {text!r} leaves the data set's folder; expected a path relative to {root}")
    beside = table.parent / parts
    return beside if not (root / parts).is_file() and beside.is_file() else root / parts


def _held_for_test(names: Sequence[str], settings: _Settings) -> set[str]:
    """The seeded share of normal images that becomes test data: each name's place depends on that name and the seed."""

    def draw(name: str) -> str:
        return hashlib.sha256(f"{settings.seed}:{name}".encode("utf-8", "surrogateescape")).hexdigest()

    count = round(settings.test_share * len(names))
    if settings.test_share > 0 and len(names) > 1:
        count = min(max(count, 1), len(names) - 1)
    return set(sorted(set(names), key=draw)[:count])


def _add_folder(
    plan: _Plan,
    folder: Path,
    origin: str,
    split: str,
    label: int,
    defect: str,
    truth: Path | None,
    settings: _Settings,
) -> None:
    stems: set[str] = set()
    for path in _visible_files(folder):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            stems.add(path.stem)
            masks = _match_masks(truth, path.stem) if truth else []
            plan.samples.append(_Sample(path, origin, split, label, defect if label else "good", tuple(masks)))
        else:
            detail = f"suffix {path.suffix!r}: expected one of {', '.join(IMAGE_SUFFIXES)}"
            plan.rejects.append(Reject(settings.relative(path), plan.category, "unsupported", detail))
    for nested in _subfolders(folder):
        plan.notes.append(f"{settings.relative(nested)}: skipped, images are expected directly in {folder.name}/")
    if truth:
        _reject_lone_masks(plan, truth, stems, settings)


def _match_masks(truth: Path, stem: str) -> list[Path]:
    """<stem>.png, <stem>_mask.png or every file of <stem>/, the last for several regions of one image (LOCO)."""
    if not truth.is_dir():
        return []
    found = [
        truth / f"{name}{suffix}"
        for name in (stem, f"{stem}_mask")
        for suffix in (*IMAGE_SUFFIXES, *(suffix.upper() for suffix in IMAGE_SUFFIXES))
    ]
    found = [path for path in found if path.is_file()]
    return sorted(set(found)) + _image_files(truth / stem)


def _reject_lone_masks(plan: _Plan, truth: Path, stems: set[str], settings: _Settings) -> None:
    lone = [path for path in _image_files(truth) if not {path.stem, path.stem.removesuffix("_mask")} & stems]
    for nested in _subfolders(truth):
        if nested.name not in stems:
            lone += _image_files(nested)
    for path in lone:
        detail = "no image has this mask's name: rename one or remove the mask"
        plan.rejects.append(Reject(settings.relative(path), plan.category, "mask_without_image", detail))


def _refuse_folders(root: Path, known: set[str], expected: str) -> None:
    odd = [item.name for item in _subfolders(root) if item.name not in known]
    if odd:
        raise DataError(f"{root}: did not expect the folder {', '.join(odd)} here: expected {expected}; move it away")


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(item for item in folder.iterdir() if item.is_dir() and not item.name.startswith((".", "__MACOSX")))


def _visible_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        item
        for item in folder.iterdir()
        if item.is_file()
        and not item.name.startswith(".")
        and item.suffix.lower() not in IGNORED_SUFFIXES
        and item.stem.lower() not in IGNORED_STEMS
    )


def _image_files(folder: Path) -> list[Path]:
    return [path for path in _visible_files(folder) if path.suffix.lower() in IMAGE_SUFFIXES]


_Planner = Callable[[Path, str, _Settings], _Plan]
_SHAPES: dict[str, tuple[Callable[[Path], bool], _Planner, str]] = {
    "mvtec": (lambda path: (path / "train" / "good").is_dir(), _plan_mvtec, "train/good with test/ or test_public/"),
    "btad": (lambda path: (path / "train" / "ok").is_dir(), _plan_btad, "train/ok with test/ok and test/ko"),
    "folder": (lambda path: (path / "good").is_dir(), _plan_folder, "good/ with bad*/ and masks/"),
}


def _visa_tables(source: Path) -> list[Path]:
    for table in (source / "split_csv" / "1cls.csv", source / "image_anno.csv"):
        if table.is_file():
            return [table]
    return sorted(source.glob("*/image_anno.csv"))


def _make_plans(
    source: Path, format: str, categories: Sequence[str] | None, settings: _Settings
) -> tuple[str, list[_Plan], list[str]]:
    """Returns: the format taken, a plan for each category wanted, and notes."""
    wanted = ["visa", *_SHAPES] if format == "auto" else [format]
    tables = _visa_tables(source) if "visa" in wanted else []
    roots: dict[str, list[Path]] = {"visa": tables} if tables else {}
    for candidates in ([source], _subfolders(source)):
        if roots:
            break  # one category: its train/, with good/ inside, must not pass for another
        fitting = {name: [path for path in candidates if _SHAPES[name][0](path)] for name in wanted if name in _SHAPES}
        roots = {name: found for name, found in fitting.items() if found}
    if not roots:
        shapes = {name: shape[2] for name, shape in _SHAPES.items()}
        shapes["visa"] = "split_csv/1cls.csv or image_anno.csv"
        listed = "; ".join(f"{name}: {shapes[name]}" for name in wanted)
        seen = ", ".join(sorted(item.name for item in source.iterdir())[:12]) or "nothing"
        raise DataError(f"{source}: no category found, here or one folder down. Expected {listed}. Found: {seen}")
    if len(roots) > 1:
        mixed = "; ".join(f"{name}: {', '.join(path.name for path in found)}" for name, found in roots.items())
        raise DataError(f"{source}: holds folders of several shapes ({mixed}): choose one with format=")
    (chosen, found) = next(iter(roots.items()))

    notes: list[str] = []
    if chosen == "visa":
        plans = [plan for table in found for plan in _plan_visa(table, source, categories, settings)]
    else:
        if found != [source]:
            others = [path.name for path in _subfolders(source) if path not in found]
            notes += [f"{name}: skipped, not a category of the {chosen} shape" for name in others]
        plan_one = _SHAPES[chosen][1]
        plans = [
            plan_one(path, _category_name(_folder_name(path), path), settings)
            if categories is None or _folder_name(path) in categories
            else _Plan(_folder_name(path))
            for path in found
        ]
    available = [plan.category for plan in plans]
    if len(set(available)) != len(available):
        raise DataError(f"{source}: a category is named twice: {', '.join(sorted(available))}")
    if categories is not None:
        unknown = sorted(set(categories) - set(available))
        if unknown:
            raise DataError(f"{source}: no category {', '.join(unknown)}; there are: {', '.join(sorted(available))}")
        plans = [plan for plan in plans if plan.category in categories]
    return chosen, plans, notes


def _folder_name(path: Path) -> str:
    return Path(os.path.abspath(path)).name  # of "." too, and without following a link


def _category_name(name: str, where: Path) -> str:
    if not CATEGORY_PATTERN.fullmatch(name):
        raise DataError(
            f"{where}: {name!r} cannot name a category: expected a letter or digit, then letters, digits, '.', '_' or "
            "'-'; rename it"
        )
    return name


# Checking and writing.


@dataclass(frozen=True)
class _Checked:
    """A sample that can be used: its row but for the image's bytes, which are read again when written."""

    sample: _Sample
    digest: str  # of the file, to see that it is the same when written
    width: int
    height: int
    content_hash: str
    mask: bytes | None
    note: str | None


def ingest(
    source: str | Path,
    destination: str | Path,
    format: Format = "auto",
    categories: Sequence[str] | None = None,
    site: str = "default",
    progress: bool = True,
    test_share: float = 0.2,
    seed: int = 0,
    num_threads: int | None = None,
) -> IngestReport:
    """Reads, checks and publishes folders of images as Parquet, category by category.

    A category whose files and settings are those of the last run is left as it is and reported as "unchanged"; any
    other is replaced as a whole. Of each category the memory holds row data, masks and a row group, not the images.

    Args:
        source: a local folder: one category, or a folder of categories.
        destination: root of the data set, a local path or an s3:// URI.
        format: the shape of the folders; auto recognises it and the report says which it took.
        categories: only these; None takes all.
        site: where the images come from, kept in each row.
        progress: show a bar on standard error.
        test_share: share of the normal images that becomes test data where the source has no split (folder, and VisA
            without its split table).  seed: chooses them.
        num_threads: threads that decode; None takes one a CPU, at most 8.

    Raises: DataError: no category, nothing usable in one (the others are published first), or a failing storage.
    """
    root = Path(source)
    if not root.is_dir():
        raise DataError(f"{source}: expected a local folder of images")
    if format not in ("auto", "visa", *_SHAPES):
        raise DataError(f"format={format!r}: expected auto, visa, {', '.join(_SHAPES)}")
    if not 0.0 <= test_share < 1.0:
        raise DataError(f"test_share={test_share}: expected a share in [0, 1)")
    if not site or site != site.strip() or not site.isprintable():
        raise DataError(f"site={site!r}: expected a name without spaces around it or control characters")
    settings = _Settings(root, test_share, seed)
    chosen, plans, notes = _make_plans(root, format, categories, settings)

    filesystem, path = open_filesystem(destination)
    store = _Store(str(destination), filesystem, path)
    threads = num_threads or min(8, os.cpu_count() or 1)
    reports: list[CategoryReport] = []
    rejects: list[Reject] = []
    unusable: list[str] = []
    for plan in plans:
        notes += plan.notes
        report, rejected, extra_notes = _ingest_category(plan, store, settings, site, threads, progress)
        rejects += rejected
        notes += extra_notes
        if report is None:
            first = "; ".join(f"{item.path}: {item.detail}" for item in rejected[:3]) or "it has no images"
            unusable.append(f"{plan.category} ({len(rejected)} rejected: {first})")
        else:
            reports.append(report)
    if unusable:
        raise DataError(
            f"{source}: nothing usable in {'; '.join(unusable)}. Published: "
            f"{', '.join(item.name for item in reports) or 'nothing'}"
        )
    return IngestReport(chosen, tuple(reports), tuple(rejects), tuple(notes))


def _ingest_category(
    plan: _Plan, store: _Store, settings: _Settings, site: str, num_threads: int, progress: bool
) -> tuple[CategoryReport | None, list[Reject], list[str]]:
    bar = tqdm(total=2 * len(plan.samples), desc=plan.category, unit="image", disable=not progress)
    with ThreadPoolExecutor(num_threads) as pool, bar:
        fingerprint = _source_fingerprint(plan, settings, site, pool)
        former = store.commit(plan.category)
        if former and former["source_fingerprint"] == fingerprint and store.is_whole(plan.category, former):
            return CategoryReport(plan.category, "unchanged", **former["counts"]), store.rejects(plan.category), []

        store.check_writable()
        checked: list[_Checked] = []
        rejects = list(plan.rejects)
        jobs = pool.map(lambda sample: _check(sample, plan.category, settings), plan.samples)
        for outcome in jobs:
            bar.update()
            if isinstance(outcome, Reject):
                rejects.append(outcome)
            else:
                checked.append(outcome)
        kept, duplicates = _without_duplicates(checked, plan.category, settings)
        rejects = sorted(rejects + duplicates, key=lambda item: (item.path, item.reason))
        notes = [f"{settings.relative(item.sample.path)}: {item.note}" for item in kept if item.note]
        bar.total = len(plan.samples) + len(kept)
        if not kept:
            store.write_rejects(plan.category, rejects)
            return None, rejects, notes
        ids = _make_ids([item.sample for item in kept], plan.category)
        rows = sorted(zip(ids, kept, strict=True), key=lambda pair: pair[0])
        counts = {
            "num_train": sum(item.sample.split == "train" for item in kept),
            "num_test_normal": sum(item.sample.split == "test" and not item.sample.label for item in kept),
            "num_test_anomalous": sum(item.sample.label for item in kept),
            "num_masks": sum(item.mask is not None for item in kept),
        }
        store.publish(
            plan.category,
            _progressing((_make_row(name, item, plan.category, site, settings) for name, item in rows), bar),
            rejects,
            {"source_fingerprint": fingerprint, "counts": counts},
        )
    return CategoryReport(plan.category, "written", **counts), rejects, notes


def _progressing(rows: Iterable[dict[str, Any]], bar: Any) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield row
        bar.update()


def _source_fingerprint(plan: _Plan, settings: _Settings, site: str, pool: ThreadPoolExecutor) -> str:
    """Over every file's name, size and bytes, what the importer made of it, and the settings."""
    samples = sorted(plan.samples, key=lambda item: settings.relative(item.path))
    paths = [path for sample in samples for path in (sample.path, *sample.masks)]
    facts = pool.map(_file_facts, paths)
    names = iter([[settings.relative(path), *sized] for path, sized in zip(paths, facts, strict=True)])
    described = [
        [item.folder, item.split, item.label, item.defect_type, *itertools.islice(names, 1 + len(item.masks))]
        for item in samples
    ]
    planned = sorted([item.path, item.reason, item.detail] for item in plan.rejects)
    text = json.dumps([SCHEMA_VERSION, plan.category, site, described, planned])
    return hashlib.sha256(text.encode()).hexdigest()


def _file_facts(path: Path) -> tuple[int, str]:
    try:
        with path.open("rb") as stream:
            digest = hashlib.sha256()
            size = 0
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
                size += len(chunk)
            return size, digest.hexdigest()
    except OSError as error:
        return -1, str(error.errno)  # rejected when it is checked


def _check(sample: _Sample, category: str, settings: _Settings) -> _Checked | Reject:
    def reject(reason: RejectReason, detail: str, path: Path = sample.path) -> Reject:
        return Reject(settings.relative(path), category, reason, detail)

    try:
        data = sample.path.read_bytes()
        info, pixels = read_image(data)
    except ImageError as error:
        return reject(error.reason, str(error))
    except OSError as error:
        return reject("unreadable", error.strerror or str(error))
    content = hashlib.sha256(f"{info.height}x{info.width}:".encode())
    content.update(pixels.data)
    del pixels

    joined: np.ndarray[Any, np.dtype[np.bool_]] | None = None
    for path in sample.masks:
        try:
            mask = read_mask(path.read_bytes())
        except (ImageError, OSError) as error:
            return reject("mask_unreadable", f"its mask {settings.relative(path)} cannot be read: {error}")
        if mask.shape != (info.height, info.width):
            return reject(
                "mask_size",
                f"its mask {settings.relative(path)} is {mask.shape[1]} x {mask.shape[0]} pixels, the image "
                f"{info.width} x {info.height}: export the mask again at the image's size",
            )
        joined = mask if joined is None else joined | mask
    note = None
    if joined is not None and not sample.label and joined.any():
        return reject(
            "mask_on_good",
            f"a normal image whose mask {settings.relative(sample.masks[0])} marks {int(joined.sum())} pixels: move "
            "the image to a defect's folder or remove the mask",
        )
    if joined is not None and sample.label and not joined.any():
        note = "its mask marks nothing although the image is anomalous; taken as an image without a mask"
    encoded = encode_png(joined) if joined is not None and joined.any() else None
    digest = hashlib.sha256(data).hexdigest()
    return _Checked(sample, digest, info.width, info.height, content.hexdigest(), encoded, note)


def _without_duplicates(
    checked: Sequence[_Checked], category: str, settings: _Settings
) -> tuple[list[_Checked], list[Reject]]:
    """Drops what would leak from test into train, count twice or contradict itself; docs/DATA.md has the table."""
    alike: dict[str, list[_Checked]] = defaultdict(list)
    for item in sorted(checked, key=lambda item: settings.relative(item.sample.path)):
        alike[item.content_hash].append(item)
    kept: list[_Checked] = []
    rejects: list[Reject] = []

    def reject(item: _Checked, reason: RejectReason, detail: str) -> None:
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


def _make_ids(samples: Sequence[_Sample], category: str) -> list[str]:
    """category/folder/defect/stem; the whole file name where stems clash, a number where names do."""

    def parts(sample: _Sample) -> list[str]:
        defect = [] if sample.folder == sample.defect_type else [sample.defect_type]
        return [category, sample.folder, *defect]

    stems = ["/".join([*parts(sample), sample.path.stem]) for sample in samples]
    names = ["/".join([*parts(sample), sample.path.name]) for sample in samples]
    clashing = Counter(stems)
    ids = [name if clashing[stem] > 1 else stem for stem, name in zip(stems, names, strict=True)]
    paths = ["/".join([*parts(sample), *sample.path.parts[-3:]]) for sample in samples]
    clashing = Counter(ids)
    return [path if clashing[name] > 1 else name for name, path in zip(ids, paths, strict=True)]


def _make_row(name: str, item: _Checked, category: str, site: str, settings: _Settings) -> dict[str, Any]:
    try:
        data = item.sample.path.read_bytes()
    except OSError as error:
        raise DataError(f"{item.sample.path}: vanished while being ingested ({error}): run it again") from error
    if hashlib.sha256(data).hexdigest() != item.digest:
        raise DataError(f"{item.sample.path}: changed while being ingested: run it again once the source rests")
    return {
        "id": name,
        "category": category,
        "split": item.sample.split,
        "label": item.sample.label,
        "defect_type": item.sample.defect_type,
        "image": data,
        "mask": item.mask,
        "width": item.width,
        "height": item.height,
        "site": site,
        "content_hash": item.content_hash,
    }


class _Store:
    """A data set's root: commits, part files and rejects on a local or S3 filesystem."""

    def __init__(self, uri: str, filesystem: fs.FileSystem, path: str) -> None:
        self.uri, self.filesystem, self.path = uri, filesystem, path
        self._writable = False

    def folder(self, category: str) -> str:
        return f"{self.path}/category={category}"

    def errors(self, action: str, path: str) -> Any:
        return storage_errors(action, self.uri, path)

    def categories(self) -> list[str]:
        """Names of the committed categories, sorted; empty where there is no data set."""
        with self.errors("list the data set", self.path):
            found = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
            names = [
                info.base_name[len("category=") :]
                for info in found
                if info.type == fs.FileType.Directory and info.base_name.startswith("category=")
            ]
            commits = self.filesystem.get_file_info([f"{self.folder(name)}/{COMMIT_NAME}" for name in names])
        return sorted(name for name, info in zip(names, commits, strict=True) if info.type == fs.FileType.File)

    def commit(self, category: str) -> dict[str, Any] | None:
        """The category's commit; None where it has none. Raises: DataError: damaged, or of another schema version."""
        path = f"{self.folder(category)}/{COMMIT_NAME}"
        with self.errors("read the commit file", path):
            data = read_file(self.filesystem, path)
        if data is None:
            return None
        try:
            commit = json.loads(data)
            version = commit["schema_version"]
            if version == SCHEMA_VERSION:
                for key in ("files", "num_rows", "source_fingerprint", "counts"):
                    commit[key]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.uri}: {path}: not a commit file ({error}): remove it and ingest again") from error
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{self.uri}: category {category!r} has schema version {version!r}, this program reads "
                f"{SCHEMA_VERSION}: ingest it again into another root, or use the version that wrote it"
            )
        return cast("dict[str, Any]", commit)

    def need_commit(self, category: str) -> dict[str, Any]:
        commit = self.commit(category)
        if commit is None:
            names = self.categories()
            if not names:
                raise DataError(
                    f"{self.uri}: no data set here: expected folders category=<name> with a {COMMIT_NAME}; ingest one "
                    f"first"
                )
            raise DataError(f"{self.uri}: no category {category!r}; there are: {', '.join(names)}")
        return commit

    def is_whole(self, category: str, commit: dict[str, Any]) -> bool:
        """Whether every part file that a commit names is there, at its size."""
        paths = [f"{self.folder(category)}/{entry['name']}" for entry in commit["files"]]
        with self.errors("look at part files", self.folder(category)):
            found = self.filesystem.get_file_info(paths)
        return [info.size for info in found] == [entry["num_bytes"] for entry in commit["files"]]

    def check_writable(self) -> None:
        """Finds out before the decoding, not after, that nothing may be written."""
        if not self._writable:
            path = f"{self.path}/_write_check-{uuid.uuid4().hex}"
            with self.errors("write", path):
                write_file(self.filesystem, path, b"focus_ray")
                self.filesystem.delete_file(path)
            self._writable = True

    def publish(
        self, category: str, rows: Iterable[dict[str, Any]], rejects: Sequence[Reject], facts: dict[str, Any]
    ) -> None:
        """Writes part files, then the commit that makes them count, then removes those that no longer do."""
        folder, run_id = self.folder(category), uuid.uuid4().hex[:12]
        if isinstance(self.filesystem, fs.LocalFileSystem):
            with self.errors("make the folder", folder):
                self.filesystem.create_dir(folder, recursive=True)
        files: list[dict[str, Any]] = []
        try:
            groups = _row_groups(rows)
            for group in groups:
                name = f"part-{run_id}-{len(files):05d}.parquet"
                files.append({"name": name, "row_group_rows": []})
                with self.errors("write a part file", f"{folder}/{name}"):
                    self._write_part(f"{folder}/{name}", itertools.chain([group], groups), files[-1])
        except BaseException:
            self._remove(f"{folder}/{item['name']}" for item in files)
            raise
        former = self.commit(category)
        self.write_rejects(category, rejects)
        commit = {
            "schema_version": SCHEMA_VERSION,
            "category": category,
            "run_id": run_id,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "files": files,
            "num_rows": sum(sum(item["row_group_rows"]) for item in files),
            **facts,
        }
        # From here on the parts stay whatever happens: a commit whose answer was lost may still have been made.
        with self.errors("write the commit file", f"{folder}/{COMMIT_NAME}"):
            write_file(self.filesystem, f"{folder}/{COMMIT_NAME}", json.dumps(commit, indent=1).encode())
        self._remove_unreferenced(folder, files, former)

    def _write_part(self, path: str, groups: Iterator[pa.Table], entry: dict[str, Any]) -> None:
        num_bytes = 0
        with (
            self.filesystem.open_output_stream(path) as sink,
            pq.ParquetWriter(
                sink,
                SCHEMA,
                compression="none",  # the images are compressed already
                use_dictionary=["category", "split", "defect_type", "site"],
                write_statistics=["id", "split", "label"],
            ) as writer,
        ):
            for group in groups:
                writer.write_table(group, row_group_size=group.num_rows)
                entry["row_group_rows"].append(group.num_rows)
                num_bytes += group.nbytes
                if num_bytes >= FILE_BYTES:
                    break
        sync_file(self.filesystem, path)
        entry["num_bytes"] = self.filesystem.get_file_info(path).size

    def _remove(self, paths: Iterable[str]) -> None:
        for path in paths:
            try:
                self.filesystem.delete_file(path)
            except OSError:  # an unnamed part file harms nobody, and the next run tries again
                continue

    def _remove_unreferenced(self, folder: str, files: list[dict[str, Any]], former: dict[str, Any] | None) -> None:
        current = {item["name"] for item in files}
        replaced = {item["name"] for item in former["files"]} if former else set()
        with self.errors("list part files", folder):
            found = self.filesystem.get_file_info(fs.FileSelector(folder))
        limit = datetime.now(timezone.utc) - STALE_AFTER
        for info in found:
            name = info.base_name
            leftover = name.startswith(("part-", ".tmp-")) and info.mtime is not None and info.mtime < limit
            if name not in current and (name in replaced or leftover):
                self._remove([f"{folder}/{name}"])

    def write_rejects(self, category: str, rejects: Sequence[Reject]) -> None:
        path = self._rejects_path(category)
        with self.errors("write the rejects", path):
            if rejects:
                columns = {
                    name: [getattr(item, name) for item in rejects] for name in ("path", "category", "reason", "detail")
                }
                sink = pa.BufferOutputStream()
                pq.write_table(pa.table(columns), sink)
                write_file(self.filesystem, path, sink.getvalue().to_pybytes())
            elif self.filesystem.get_file_info(path).type == fs.FileType.File:
                self.filesystem.delete_file(path)

    def rejects(self, category: str) -> list[Reject]:
        path = self._rejects_path(category)
        with self.errors("read the rejects", path):
            data = read_file(self.filesystem, path)
        return [Reject(**row) for row in pq.read_table(pa.BufferReader(data)).to_pylist()] if data else []

    def _rejects_path(self, category: str) -> str:
        return f"{self.path}/_rejects/category={category}.parquet"


def _row_groups(rows: Iterable[dict[str, Any]]) -> Iterator[pa.Table]:
    pending: list[dict[str, Any]] = []
    num_bytes = 0
    for row in rows:
        pending.append(row)
        num_bytes += len(row["image"]) + len(row["mask"] or b"")
        full = len(pending) >= MAX_ROW_GROUP_ROWS or num_bytes >= MAX_ROW_GROUP_BYTES
        if full or (len(pending) >= MIN_ROW_GROUP_ROWS and num_bytes >= ROW_GROUP_BYTES):
            yield pa.Table.from_pylist(pending, schema=SCHEMA)
            pending, num_bytes = [], 0
    if pending:
        yield pa.Table.from_pylist(pending, schema=SCHEMA)


# Readers: they open the files that the commit names, and no others.


def list_categories(uri: str | Path) -> list[str]:
    """Names of a data set's categories, sorted. Raises: DataError: no data set there."""
    store = _open_store(uri)
    names = store.categories()
    if not names:
        raise DataError(
            f"{uri}: no data set here: expected folders category=<name> with a {COMMIT_NAME}; ingest one first"
        )
    return names


def read_index(uri: str | Path, category: str, split: str | None = None) -> pa.Table:
    """The light columns of a category, in row order, without images and masks.

    Args: split: train or test; None takes both.

    Returns: ``INDEX_COLUMNS`` and ``row`` (int64), the row's number in the category, for ``read_rows``.

    Raises: DataError: no such data set, category or split; a damaged part file.
    """
    if split is not None and split not in SPLITS:
        raise DataError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    store = _open_store(uri)
    commit = store.need_commit(category)
    tables = []
    for entry in commit["files"]:
        with _open_part(store, category, entry) as part:
            tables.append(part.read(columns=list(INDEX_COLUMNS)))
    table = pa.concat_tables(tables).replace_schema_metadata(None)
    table = table.append_column("row", pa.array(np.arange(table.num_rows, dtype=np.int64)))
    if split is not None:
        table = table.filter(pc.equal(table["split"], split))
    return table


def read_rows(
    uri: str | Path,
    category: str,
    row_numbers: Sequence[int] | np.ndarray[Any, Any],
    columns: Sequence[str] = ("id", "label", "image", "mask"),
) -> Iterator[dict[str, Any]]:
    """Rows by number, reading only the row groups that hold them and holding one of them at a time.

    Args:
        row_numbers: strictly ascending, as ``read_index`` gives them in ``row``.
        columns: of ``SCHEMA``.

    Yields: a dict of Python values for each number, in their order.

    Raises: DataError, at the call and not at the first row: an unknown column, numbers out of order or out of range,
        no such category. While reading: a part file that is gone or damaged.
    """
    unknown = [name for name in columns if name not in SCHEMA.names]
    if unknown:
        raise DataError(f"no column {', '.join(unknown)}; there are: {', '.join(SCHEMA.names)}")
    store = _open_store(uri)
    commit = store.need_commit(category)
    numbers = np.asarray(row_numbers, dtype=np.int64)
    if numbers.ndim != 1 or (np.diff(numbers) <= 0).any():
        raise DataError("row numbers must be a flat list in strictly ascending order: sort them and drop repeats")
    if numbers.size and (numbers[0] < 0 or numbers[-1] >= commit["num_rows"]):
        raise DataError(
            f"row numbers from {numbers[0]} to {numbers[-1]}, but category {category!r} has {commit['num_rows']} rows "
            "(0-based): read the index again"
        )
    return _iterate_rows(store, category, commit, numbers, list(columns))


def _iterate_rows(
    store: _Store, category: str, commit: dict[str, Any], numbers: np.ndarray[Any, Any], columns: list[str]
) -> Iterator[dict[str, Any]]:
    start = 0
    for entry in commit["files"]:
        bounds = start + np.concatenate([[0], np.cumsum(entry["row_group_rows"])]).astype(np.int64)
        start = int(bounds[-1])
        cuts = np.searchsorted(numbers, bounds)
        if cuts[0] == cuts[-1]:
            continue
        with _open_part(store, category, entry) as part:
            for group in range(len(bounds) - 1):
                inside = numbers[cuts[group] : cuts[group + 1]] - bounds[group]
                if not inside.size:
                    continue
                table = part.read_row_group(group, columns=columns)
                for number in inside.tolist():
                    yield {name: table.column(name)[number].as_py() for name in columns}


def data_fingerprint(uri: str | Path, category: str) -> str:
    """SHA-256 hex over the sorted (content hash, label, split) of a category: what a model was made from.

    File names, order, encoding and masks do not enter.
    """
    table = read_index(uri, category)
    lines = zip(*(table[name].to_pylist() for name in ("content_hash", "label", "split")), strict=True)
    return hashlib.sha256("\n".join(sorted(f"{h} {label} {split}" for h, label, split in lines)).encode()).hexdigest()


def ray_dataset(
    uri: str | Path, category: str, split: str | None = None, columns: Sequence[str] | None = None
) -> ray.data.Dataset:
    """A Ray data set of exactly the committed files of a category.

    Turns DataSourceV2 off in this process's DataContext: with Ray 2.60 it starts 32 footer actors an epoch and reads
    small image sets about three times slower. On S3 each node uses its own credentials.

    Args: split: train or test; None takes both.  columns: of ``SCHEMA``; None takes all.

    Raises: DataError: as ``read_index``.
    """
    import ray.data
    from ray.data.expressions import col

    if split is not None and split not in SPLITS:
        raise DataError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    store = _open_store(uri)
    commit = store.need_commit(category)
    ray.data.DataContext.get_current().use_datasource_v2 = False
    paths = [f"{store.folder(category)}/{entry['name']}" for entry in commit["files"]]
    dataset = ray.data.read_parquet(paths, filesystem=store.filesystem, partitioning=None)
    if split is not None:
        dataset = dataset.filter(expr=col("split") == split)
    return dataset.select_columns(list(columns)) if columns is not None else dataset


def _open_store(uri: str | Path) -> _Store:
    filesystem, path = open_filesystem(uri)
    return _Store(str(uri), filesystem, path)


@contextmanager
def _open_part(store: _Store, category: str, entry: dict[str, Any]) -> Iterator[pq.ParquetFile]:
    """One part file, checked against its commit; what goes wrong while it is open becomes a DataError."""
    path = f"{store.folder(category)}/{entry['name']}"
    try:
        with (
            storage_errors("read a part file", store.uri, path),
            open_input(store.filesystem, path) as stream,
            pq.ParquetFile(stream) as part,
        ):
            version = (part.schema_arrow.metadata or {}).get(b"focus_ray.schema_version")
            if version != str(SCHEMA_VERSION).encode() or part.metadata.num_rows != sum(entry["row_group_rows"]):
                raise pa.ArrowInvalid(f"schema version {version!r}, {part.metadata.num_rows} rows")
            yield part
    except pa.ArrowException as error:
        raise DataError(
            f"{store.uri}: part file {path} is damaged ({error}): remove the category's {COMMIT_NAME} and ingest it "
            "again"
        ) from error
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DataError(
                f"{error}. If the category was ingested again meanwhile, start over; otherwise ingest it again"
            ) from error
        raise
