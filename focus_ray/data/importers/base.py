"""What importers share: the plan that one makes of a folder, and how folders, images and masks are found."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from focus_ray.data.importers.groups import GroupRule, Place
from focus_ray.data.importers.vocabulary import is_good_name, is_unclear_name
from focus_ray.data.listing import IMAGE_SUFFIXES as IMAGE_SUFFIXES  # importers share the suffixes
from focus_ray.data.listing import is_hidden
from focus_ray.data.schema import Reject
from focus_ray.data.source import SourcePath
from focus_ray.errors import DataError
from focus_ray.names import NAME_WORDS, is_name, is_utf8

# Companions of the images that mean nothing here; any other suffix among them is rejected and said.
IGNORED_SUFFIXES = (
    *(".txt", ".md", ".rst", ".pdf", ".html"),
    *(".csv", ".json", ".xml", ".yaml", ".yml", ".log", ".db", ".ini"),
)
IGNORED_STEMS = ("license", "licence", "readme", "thumbs")


@dataclass(frozen=True, slots=True)
class Sample:
    """A source image and what the folders say of it."""

    path: SourcePath
    folder: str  # the part of the id that says where the image came from
    split: str
    label: int
    defect_type: str
    masks: tuple[SourcePath, ...] = ()
    drawn: bool = False  # the split is not the source's own but drawn
    below: str = ""  # subfolders between the folder of the images and the file, as in "part1/view2"
    group: str = ""  # the part or burst that the image shows; empty: the image is its own group


@dataclass
class ImportPlan:
    """What becomes of the files of one category. folders: what each folder was taken for, with its images' count."""

    category: str
    samples: list[Sample] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)

    def take_over(self, other: ImportPlan) -> None:
        """What another plan of the category found, but for its samples."""
        self.rejects += other.rejects
        self.notes += other.notes
        self.folders += other.folders


@dataclass(frozen=True)
class ImportSettings:
    """How the source is read.

    test_share: share of the normal images that becomes test data where the source has no split.  seed: chooses them.
    grouping: names the groups of images; None leaves each image its own group.
    """

    source: SourcePath
    test_share: float
    seed: int
    grouping: GroupRule | None = None

    @property
    def takes_subfolders(self) -> bool:
        """Whether images in subfolders of good/ and the like are taken."""
        return self.grouping is not None and self.grouping.takes_subfolders

    def name_groups(self, places: Sequence[Place]) -> list[str]:
        """Returns the group name of each image of one category and split; empty for an image that is its own group."""
        return [""] * len(places) if self.grouping is None else self.grouping.name_groups(places)

    def relative(self, path: SourcePath) -> str:
        """For people and reports: bytes that are no UTF-8 are shown as \\xff."""
        shown = path.relative_to(self.source).as_posix() if path.is_relative_to(self.source) else str(path)
        return shown.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class Importer(Protocol):
    """A shape of folders; its name in `IMPORTERS` is what --format takes.

    expected: what such a folder holds, for people.  has_table: whether a table says what there is, which stands above what
    folders are called; it lies in the source itself.
    """

    expected: str
    has_table: bool

    def fits(self, folder: SourcePath) -> bool:
        """Whether a folder is one category of this shape or, with a table, a set of them."""

    def plan(self, folder: SourcePath, categories: Sequence[str] | None, settings: ImportSettings) -> list[ImportPlan]:
        """A plan a category, empty for those that are not wanted; no file is opened but a table. Raises: DataError."""


@dataclass(frozen=True)
class FolderImporter:
    """An importer whose folders are a category each, told by a folder that they hold."""

    expected: str
    sign: Callable[[SourcePath], bool]  # of a folder that is one category
    plan_one: Callable[[SourcePath, str, ImportSettings], ImportPlan]
    has_table = False

    def fits(self, folder: SourcePath) -> bool:
        return self.sign(folder)

    def plan(self, folder: SourcePath, categories: Sequence[str] | None, settings: ImportSettings) -> list[ImportPlan]:
        name = folder_name(folder)
        if categories is not None and name not in categories:
            return [ImportPlan(name)]
        return [self.plan_one(folder, category_name(name, folder), settings)]


def held_for_test(names: Sequence[str], settings: ImportSettings, groups: Sequence[str] | None = None) -> list[bool]:
    """Returns whether each normal image becomes test data: a seeded share of the groups, with all of their images.

    The place of a group in the draw depends on its name and the seed alone. An image without a group is drawn by its own name.

    Args: groups: group name of each image; None or an empty name: the image is its own group.
    """

    def draw(unit: tuple[str, str]) -> str:
        group, name = unit
        text = f"{settings.seed}:group:{group}" if group else f"{settings.seed}:{name}"
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    groups = groups or [""] * len(names)
    units = [(group, "" if group else name) for name, group in zip(names, groups, strict=True)]
    num_units = len({group for group in groups if group}) + sum(not group for group in groups)
    count = round(settings.test_share * num_units)
    if settings.test_share > 0 and num_units > 1:
        count = min(max(count, 1), num_units - 1)
    held = set(sorted(set(units), key=draw)[:count])
    return [unit in held for unit in units]


def add_folder(
    plan: ImportPlan,
    folder: SourcePath,
    origin: str,
    split: str,
    label: int,
    defect: str,
    truth: SourcePath | None,
    settings: ImportSettings,
) -> None:
    """Adds a folder's images to the plan, with their masks from `truth`; what it cannot place is rejected or noted.

    Images in subfolders are taken if `settings.takes_subfolders`; their masks are in the same subfolders of `truth`.
    """
    num_images = 0
    passed_over: Counter[str] = Counter()
    for below, level in folder_levels(folder, settings):
        if not is_utf8(below):
            detail = "its name is not valid UTF-8: rename the folder"
            plan.rejects.append(Reject(settings.relative(level), plan.category, "file_name", detail))
            continue
        masks_folder = truth / below if truth and below else truth
        stems: set[str] = set()
        visible, companions = _listed_files(level)
        passed_over.update(companions)
        for path in visible:
            if is_lost(path):
                plan.rejects.append(Reject(settings.relative(path), plan.category, "unreadable", lost_words(path)))
            elif not path.is_file():
                detail = "no regular file: a pipe, a device or a socket is not read"
                plan.rejects.append(Reject(settings.relative(path), plan.category, "unsupported", detail))
            elif not is_utf8(path.name):
                detail = "its name is not valid UTF-8: rename it"
                plan.rejects.append(Reject(settings.relative(path), plan.category, "file_name", detail))
            elif path.suffix.lower() in IMAGE_SUFFIXES:
                stems.add(path.stem)
                masks = tuple(match_masks(masks_folder, path.stem)) if masks_folder else ()
                name = defect if label else "good"
                plan.samples.append(Sample(path, origin, split, label, name, masks, below=below))
            else:
                detail = f"suffix {path.suffix!r}: expected one of {', '.join(IMAGE_SUFFIXES)}"
                plan.rejects.append(Reject(settings.relative(path), plan.category, "unsupported", detail))
        num_images += len(stems)
        if masks_folder:
            reject_lone_masks(plan, masks_folder, stems, settings, subfolder_names(level, settings))
    if not settings.takes_subfolders:
        for nested in subfolders(folder):
            plan.notes.append(f"{settings.relative(nested)}: skipped, images are expected directly in {folder.name}/")
    if passed_over:
        shown = ", ".join(f"{count} {kind}" for kind, count in sorted(passed_over.items()))
        plan.notes.append(f"{settings.relative(folder)}: passed over {shown}")
    if folder.is_dir():
        meaning = (
            f"anomalous, {defect!r}, for the test"
            if label
            else f"normal, for {'the test' if split == 'test' else 'training'}"
        )
        plan.folders.append(f"{settings.relative(folder)}: {num_images} images, {meaning}")
        if label and is_unclear_name(defect):
            plan.notes.append(
                f"{settings.relative(folder)}: taken for a defect named {defect!r}; if its parts are good, rename it to good"
            )


def folder_levels(folder: SourcePath, settings: ImportSettings) -> Iterator[tuple[str, SourcePath]]:
    """Yields a folder of images and, if the settings take subfolders, all folders below it, each with its path below it."""
    pending = [("", folder)]
    while pending:
        below, level = pending.pop(0)
        yield below, level
        if settings.takes_subfolders:
            pending += [(f"{below}/{item.name}" if below else item.name, item) for item in subfolders(level)]


def subfolder_names(folder: SourcePath, settings: ImportSettings) -> set[str]:
    """Returns the names of the subfolders whose images are taken."""
    return {item.name for item in subfolders(folder)} if settings.takes_subfolders else set()


def match_masks(truth: SourcePath, stem: str) -> list[SourcePath]:
    """<stem>.png, <stem>_mask.png or every file of <stem>/, the last for several regions of one image (LOCO)."""
    if not truth.is_dir():
        return []
    found = [
        truth / f"{name}{suffix}"
        for name in (stem, f"{stem}_mask")
        for suffix in (*IMAGE_SUFFIXES, *(suffix.upper() for suffix in IMAGE_SUFFIXES))
    ]
    found = [path for path in found if path.is_file() or is_lost(path)]  # a lost mask must not pass for none
    return sorted(set(found)) + image_files(truth / stem)


def reject_lone_masks(
    plan: ImportPlan, truth: SourcePath, stems: set[str], settings: ImportSettings, parts: Collection[str] = ()
) -> None:
    """Rejects masks that belong to no image.

    Args: parts: names of subfolders of `truth` that are checked for themselves.
    """
    lone = [path for path in image_files(truth) if not {path.stem, path.stem.removesuffix("_mask")} & stems]
    for nested in subfolders(truth):
        if nested.name not in stems and nested.name not in parts:
            lone += image_files(nested)
    for path in lone:
        detail = "no image has this mask's name: rename one or remove the mask"
        plan.rejects.append(Reject(settings.relative(path), plan.category, "mask_without_image", detail))


def refuse_folders(root: SourcePath, known: set[str], expected: str) -> None:
    odd = [item.name for item in subfolders(root) if item.name not in known]
    if odd:
        shown = ", ".join(name if is_utf8(name) else ascii(name) for name in odd)
        raise DataError(f"{root}: did not expect the folder {shown} here: expected {expected}; move it away")


def skipped_folders(root: SourcePath, used: set[str], settings: ImportSettings) -> list[str]:
    """Notes on folders, and on images that lie beside them, of which nothing is taken."""
    notes = [
        f"{settings.relative(item)}: skipped, its name says nothing in this shape"
        for item in subfolders(root)
        if item.name not in used
    ]
    loose = len(image_files(root))
    if loose:
        notes.append(f"{settings.relative(root)}: {loose} images beside the folders are skipped: put them into one")
    return notes


def subfolders(folder: SourcePath) -> list[SourcePath]:
    if not folder.is_dir():
        return []
    return sorted(item for item in folder.iterdir() if item.is_dir() and not is_hidden(item.name))


def good_folders(folder: SourcePath) -> list[SourcePath]:
    """Its folders whose names say that they hold good parts."""
    return [item for item in subfolders(folder) if is_good_name(item.name)]


def is_lost(path: SourcePath) -> bool:
    """Whether it is a link to what is not there: data under version control that was not fetched."""
    return path.is_symlink() and not path.exists()


def lost_words(path: SourcePath) -> str:
    target = ascii(os.readlink(str(path)))
    return (
        f"a link to {target}, which is not there: fetch what it names (git annex get, dvc pull) or copy the file itself"
    )


def _listed_files(folder: SourcePath) -> tuple[list[SourcePath], dict[str, int]]:
    """What is no folder: what to look at, and how many of what kind are passed over as companions of images."""
    if not folder.is_dir():
        return [], {}
    visible: list[SourcePath] = []
    passed_over: dict[str, int] = {}
    for item in sorted(folder.iterdir()):
        if item.is_dir():
            continue
        if is_hidden(item.name):
            kind = "hidden"
        elif item.suffix.lower() in IGNORED_SUFFIXES or item.stem.lower() in IGNORED_STEMS:
            kind = item.suffix.lower() or item.name
        else:
            visible.append(item)
            continue
        passed_over[kind] = passed_over.get(kind, 0) + 1
    return visible, passed_over


def image_files(folder: SourcePath) -> list[SourcePath]:
    return [path for path in _listed_files(folder)[0] if path.suffix.lower() in IMAGE_SUFFIXES]


def folder_name(path: SourcePath) -> str:
    return (
        Path(os.path.abspath(path)).name if isinstance(path, Path) else path.name
    )  # of "." too, without following a link


def category_name(name: str, where: SourcePath) -> str:
    if not is_name(name):
        raise DataError(f"{where}: {name!r} cannot name a category: expected {NAME_WORDS}; rename it")
    return name
