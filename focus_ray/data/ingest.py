"""From folders of images to a data set: every file checked, each category published as a whole."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from focus_ray.data.images import ImageError, content_hash, encode_png, probe_mask, read_image
from focus_ray.data.importers.base import ImportPlan, ImportSettings, Sample, is_lost, lost_words
from focus_ray.data.importers.choose import make_plans
from focus_ray.data.schema import SCHEMA_VERSION, Reject, RejectReason, Row
from focus_ray.data.store import Store
from focus_ray.errors import DataError
from focus_ray.kinds import IMPORTERS
from focus_ray.storage import open_filesystem


@dataclass(frozen=True)
class CategoryReport:
    """What one category holds after an ingestion; counts are rows, ``num_masks`` anomalous rows with a mask.

    folders: what each folder of the source was taken for.
    """

    name: str
    status: Literal["written", "unchanged"]
    num_train: int
    num_test_normal: int
    num_test_anomalous: int
    num_masks: int
    folders: tuple[str, ...] = ()

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
            lines += [f"  {folder}" for folder in item.folders]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"rejected ({item.reason}): {item.path}: {item.detail}" for item in self.rejects]
        if self.rejects:
            counts = Counter(item.reason for item in self.rejects)
            lines.append(f"{len(self.rejects)} rejected: " + ", ".join(f"{n} {r}" for r, n in sorted(counts.items())))
        return "\n".join(lines)


@dataclass(frozen=True)
class _Checked:
    """A sample that can be used: its row but for the image's bytes, which are read again when written."""

    sample: Sample
    digest: str  # of the file, to see that it is the same when written
    width: int
    height: int
    content_hash: str
    mask: bytes | None
    note: str | None
    levels: int = 256  # different values of its pixels
    marked: float = 0.0  # the mask's share of the image
    mask_values: int = 1  # different ones above 0


def ingest(
    source: str | Path,
    destination: str | Path,
    format: str = "auto",
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
    if format != "auto" and format not in IMPORTERS.places:
        raise DataError(f"format={format!r}: expected auto, {', '.join(IMPORTERS)}")
    if not 0.0 <= test_share < 1.0:
        raise DataError(f"test_share={test_share}: expected a share in [0, 1)")
    if not site or site != site.strip() or not site.isprintable():
        raise DataError(f"site={site!r}: expected a name without spaces around it or control characters")
    settings = ImportSettings(root, test_share, seed)
    chosen, plans, notes = make_plans(root, format, categories, settings)

    filesystem, path = open_filesystem(destination)
    store = Store(str(destination), filesystem, path)
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
    plan: ImportPlan, store: Store, settings: ImportSettings, site: str, num_threads: int, progress: bool
) -> tuple[CategoryReport | None, list[Reject], list[str]]:
    bar = tqdm(total=len(plan.samples), desc=plan.category, unit="image", disable=not progress)
    with ThreadPoolExecutor(num_threads) as pool, bar:
        fingerprint = _source_fingerprint(plan, settings, site, pool)
        former = store.commit(plan.category)
        if former and former["source_fingerprint"] == fingerprint and store.is_whole(plan.category, former):
            counts = former["counts"]
            report = CategoryReport(plan.category, "unchanged", **counts, folders=tuple(plan.folders))
            return report, store.rejects(plan.category), _plausibility(plan.category, counts, [], settings)

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
            (_make_row(name, item, plan.category, site, settings) for name, item in rows),
            rejects,
            fingerprint,
            counts,
        )
    notes += _plausibility(plan.category, counts, kept, settings)
    return CategoryReport(plan.category, "written", **counts, folders=tuple(plan.folders)), rejects, notes


def _plausibility(
    category: str, counts: dict[str, int], kept: Sequence[_Checked], settings: ImportSettings
) -> list[str]:
    """What was taken as it is and is likely not meant, once a category and not once a file."""
    notes = []

    def told(found: list[_Checked], words: str) -> None:
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


def _source_fingerprint(plan: ImportPlan, settings: ImportSettings, site: str, pool: ThreadPoolExecutor) -> str:
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


def _check(sample: Sample, category: str, settings: ImportSettings) -> _Checked | Reject:
    def reject(reason: RejectReason, detail: str, path: Path = sample.path) -> Reject:
        return Reject(settings.relative(path), category, reason, detail)

    try:
        data = sample.path.read_bytes()
        info, pixels = read_image(data)
    except ImageError as error:
        return reject(error.reason, str(error))
    except OSError as error:
        return reject("unreadable", error.strerror or str(error))
    content = content_hash(pixels)
    levels = int(np.count_nonzero(np.bincount(pixels.reshape(-1), minlength=256)))
    del pixels

    joined: np.ndarray[Any, np.dtype[np.bool_]] | None = None
    mask_values = 0
    for path in sample.masks:
        if is_lost(path):
            return reject("mask_unreadable", f"its mask {settings.relative(path)} is {lost_words(path)}")
        try:
            mask, different = probe_mask(path.read_bytes())
            mask_values = max(mask_values, different)
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
            f"a normal image whose mask {settings.relative(sample.masks[0])} marks {int(joined.sum())} pixels"
            + (", nearly all, as an inverted mask does (defective is what is above 0)" if joined.mean() > 0.9 else "")
            + ": move the image to a defect's folder, or mend or remove the mask",
        )
    if joined is not None and sample.label and not joined.any():
        note = "its mask marks nothing although the image is anomalous; taken as an image without a mask"
    if info.see_through:
        note = "its alpha channel is 0 everywhere: it is taken as black; export it without transparency"
    encoded = encode_png(joined) if joined is not None and joined.any() else None
    digest = hashlib.sha256(data).hexdigest()
    marked = 0.0 if joined is None else float(joined.mean())
    return _Checked(sample, digest, info.width, info.height, content, encoded, note, levels, marked, mask_values)


def _without_duplicates(
    checked: Sequence[_Checked], category: str, settings: ImportSettings
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


def _make_ids(samples: Sequence[Sample], category: str) -> list[str]:
    """category/folder/defect/stem; the whole file name where stems clash, a number where names do."""

    def parts(sample: Sample) -> list[str]:
        defect = [] if sample.folder == sample.defect_type else [sample.defect_type]
        return [category, sample.folder, *defect]

    stems = ["/".join([*parts(sample), sample.path.stem]) for sample in samples]
    names = ["/".join([*parts(sample), sample.path.name]) for sample in samples]
    clashing = Counter(stems)
    ids = [name if clashing[stem] > 1 else stem for stem, name in zip(stems, names, strict=True)]
    paths = ["/".join([*parts(sample), *sample.path.parts[-3:]]) for sample in samples]
    clashing = Counter(ids)
    return [path if clashing[name] > 1 else name for name, path in zip(ids, paths, strict=True)]


def _make_row(name: str, item: _Checked, category: str, site: str, settings: ImportSettings) -> Row:
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
