"""The interface of importers, the plan that an importer makes of a folder, and the functions that all importers use."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from focus_ray.data.importers.groups import GroupRule, ImageLocation
from focus_ray.data.importers.vocabulary import is_ambiguous_name, means_good_parts
from focus_ray.data.listing import IMAGE_SUFFIXES as IMAGE_SUFFIXES  # importers share the suffixes
from focus_ray.data.listing import is_hidden
from focus_ray.data.schema import RejectedFile, RejectReason
from focus_ray.data.source import SourcePath, get_relative_path
from focus_ray.errors import DataError
from focus_ray.names import escape_invalid_utf8, is_valid_utf8, make_valid_name

# Files beside the images that are ignored. A file with any other suffix is rejected and reported.
IGNORED_SUFFIXES = {".txt", ".md", ".rst", ".pdf", ".html", ".log"}  # documents
IGNORED_SUFFIXES |= {".csv", ".json", ".xml", ".yaml", ".yml", ".ini", ".db"}  # tables and settings
IGNORED_STEMS = ("license", "licence", "readme", "thumbs")


@dataclass(frozen=True, slots=True)
class SourceImage:
    """A source image, with the properties that follow from its folder or from a table, such as label and masks."""

    path: SourcePath
    folder: str  # first part of the row id after the category: the source folder or split
    split: str
    label: int
    defect_type: str
    masks: tuple[SourcePath, ...] = ()
    has_drawn_split: bool = False  # the source defines no split, so the split was drawn at random
    subfolders: str = ""  # subfolders below the class folder (good/, scratch/), for example "part1/view2"
    group: str = ""  # name of the part or burst that the image shows; empty: the image is its own group


@dataclass
class ImportPlan:
    """The result of an importer for one category: lists of the images to ingest and of the files to reject.

    Attributes:
        category: name of the category.
        samples: the images to ingest.
        rejects: files that are rejected without being opened.
        notes: hints for the user.
        folders: for each folder, a text with its number of images and their meaning.
    """

    category: str
    samples: list[SourceImage] = field(default_factory=list)
    rejects: list[RejectedFile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ImportSettings:
    """The settings of an ingestion that all importers use.

    Attributes:
        source: root folder of the source images.
        test_share: share of the normal images that becomes test data if the source defines no split.
        seed: seed for the choice of these test images.
        grouping: rule that names the group of each image, i.e. images of the same physical part; None makes each image its own
            group.
    """

    source: SourcePath
    test_share: float
    seed: int
    grouping: GroupRule | None = None

    @property
    def takes_subfolders(self) -> bool:
        """Whether images in subfolders of a class folder (good/, scratch/) are ingested, for example good/part1/a.png."""
        return self.grouping is not None and self.grouping.takes_subfolders

    def name_groups(self, locations: Sequence[ImageLocation]) -> list[str]:
        """Returns the group name of each image; empty for an image that is its own group. Images of a group show the same part.

        Args: locations: the images of one category and split.
        """
        return [""] * len(locations) if self.grouping is None else self.grouping.name_groups(locations)

    def describe_path(self, path: SourcePath) -> str:
        """Returns a path relative to the source, as text for reports. Bytes that are not valid UTF-8 are shown as \\xff."""
        return escape_invalid_utf8(get_relative_path(path, self.source))


class Importer(Protocol):
    """The interface of an importer, which reads one folder layout. Its name in `IMPORTERS` is a value of --format.

    Attributes:
        expected: the expected content of a folder, for error messages.
        has_table: whether a table in the source lists the images. Such an importer is tried before importers that read folder
            names.
    """

    expected: str
    has_table: bool

    def matches_folder(self, folder: SourcePath) -> bool:
        """Returns whether a folder has this layout: it is a category or, for importers with a table, a folder of categories."""

    def plan_import(
        self, folder: SourcePath, categories: Sequence[str] | None, settings: ImportSettings
    ) -> list[ImportPlan]:
        """Returns one plan per category: the list of images to ingest. No file is opened except a table.

        Args:
            folder: a category or, for importers with a table, a folder of categories.
            categories: the categories to ingest; the plans of all others are empty. None takes all.
            settings: the settings of the ingestion.

        Raises: DataError: the folder or the table has unexpected content.
        """


@dataclass(frozen=True)
class FolderImporter:
    """An importer for layouts in which each folder is one category.

    Attributes:
        expected: the expected content of a folder, for error messages.
        matches_folder: function that returns whether a folder is a category in this layout.
        plan_category: function that makes the plan of a category from its folder, its name and the settings.
    """

    expected: str
    matches_folder: Callable[[SourcePath], bool]
    plan_category: Callable[[SourcePath, str, ImportSettings], ImportPlan]
    has_table = False

    def plan_import(
        self, folder: SourcePath, categories: Sequence[str] | None, settings: ImportSettings
    ) -> list[ImportPlan]:
        """Returns a list with the plan of the category, see `Importer.plan_import`. The category has the name of the folder, see
        `make_valid_name`.

        Raises: DataError: the folder has unexpected content.
        """
        title = get_folder_name(folder)
        name = make_valid_name(title)
        if categories is not None and name not in categories:
            return [ImportPlan(name)]
        plan = self.plan_category(folder, name, settings)
        plan.notes += [f"the category is called {name}, because {title!r} is no name"] if name != title else []
        return [plan]


def select_test_images(names: Sequence[str], settings: ImportSettings, groups: Sequence[str]) -> list[bool]:
    """Draws the normal images that become test data. Returns for each image whether it was drawn.

    A group (images of the same part) is drawn with all of its images. The rank of a group in the draw depends only on its name
    and the seed, so further images do not change it. An image without a group is drawn by its own name.

    Args:
        names: name of each image.
        settings: contain the share of the groups to draw, and the seed.
        groups: group name of each image; an empty name makes an image its own group.
    """

    def compute_draw_key(unit: tuple[str, str]) -> str:
        """Returns the hash of a group or an image and the seed. The groups with the smallest hashes are drawn."""
        group, name = unit
        text = f"{settings.seed}:group:{group}" if group else f"{settings.seed}:{name}"
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    units = [(group, "" if group else name) for name, group in zip(names, groups, strict=True)]
    num_units = len({*groups} - {""}) + groups.count("")
    count = round(settings.test_share * num_units)
    if settings.test_share > 0 and num_units > 1:
        count = min(max(count, 1), num_units - 1)
    drawn = set(sorted(set(units), key=compute_draw_key)[:count])
    return [unit in drawn for unit in units]


def add_folder_images(
    plan: ImportPlan,
    folder: SourcePath,
    origin: str,
    split: str,
    label: int,
    defect: str,
    mask_folder: SourcePath | None,
    settings: ImportSettings,
) -> None:
    """Adds the images of a class folder (good/, scratch/) to a plan, with their masks. Rejects or notes other files.

    Images in subfolders are added if `settings.takes_subfolders`; their masks are in the same subfolders of `mask_folder`.

    Args:
        plan: the plan of the category; the function extends its samples, rejects, notes and folders.
        folder: the folder of the images; it need not exist.
        origin: first part of the row ids after the category.
        split: train or test.
        label: 0 normal, 1 anomalous.
        defect: type of the defect, for label 1.
        mask_folder: folder of the masks; None if the images have no masks.
        settings: the settings of the ingestion.
    """
    num_images = 0
    num_skipped: Counter[str] = Counter()
    for below, level in _walk_image_folders(folder, settings):
        if not is_valid_utf8(below):
            detail = "its name is not valid UTF-8: rename the folder"
            plan.rejects.append(RejectedFile(settings.describe_path(level), plan.category, "file_name", detail))
            continue
        mask_subfolder = mask_folder / below if mask_folder and below else mask_folder
        stems: set[str] = set()
        files, skipped_here = _list_files(level)
        num_skipped.update(skipped_here)
        for path in files:
            problem = _find_reject_reason(path)
            if problem is not None:
                reason, detail = problem
                plan.rejects.append(RejectedFile(settings.describe_path(path), plan.category, reason, detail))
                continue
            stems.add(path.stem)
            masks = tuple(find_mask_files(mask_subfolder, path.stem)) if mask_subfolder else ()
            name = defect if label else "good"
            plan.samples.append(SourceImage(path, origin, split, label, name, masks, subfolders=below))
        num_images += len(stems)
        if mask_subfolder:
            names = {item.name for item in list_subfolders(level)} if settings.takes_subfolders else set()
            reject_unmatched_masks(plan, mask_subfolder, stems, settings, names)
    if not settings.takes_subfolders:
        for nested in list_subfolders(folder):
            plan.notes.append(
                f"{settings.describe_path(nested)}: skipped, images are expected directly in {folder.name}/"
            )
    if num_skipped:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(num_skipped.items()))
        plan.notes.append(f"{settings.describe_path(folder)}: skipped {counts}")
    if folder.is_dir():
        use = "the test" if split == "test" else "training"
        meaning = f"anomalous, {defect!r}, for the test" if label else f"normal, for {use}"
        plan.folders.append(f"{settings.describe_path(folder)}: {num_images} images, {meaning}")
        if label and is_ambiguous_name(defect):
            remedy = "if its parts are good, rename it to good"
            plan.notes.append(f"{settings.describe_path(folder)}: interpreted as a defect named {defect!r}; {remedy}")


def _find_reject_reason(path: SourcePath) -> tuple[RejectReason, str] | None:
    """Returns why a file in an image folder is rejected: reason code and explanation; None for an image that can be opened."""
    if is_broken_link(path):
        return "unreadable", describe_broken_link(path)
    if not path.is_file():
        return "unsupported", "not a regular file: pipes, devices and sockets are not read"
    if not is_valid_utf8(path.name):
        return "file_name", "its name is not valid UTF-8: rename the file"
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return "unsupported", f"suffix {path.suffix!r}: expected one of {', '.join(IMAGE_SUFFIXES)}"
    return None


def _walk_image_folders(folder: SourcePath, settings: ImportSettings) -> Iterator[tuple[str, SourcePath]]:
    """Generator: yields a class folder (good/, scratch/) and, if `settings.takes_subfolders`, all folders below it.

    Yields:
        The path relative to the class folder, empty for the class folder itself; and the folder.
    """
    pending = [("", folder)]
    while pending:
        below, level = pending.pop(0)
        yield below, level
        if settings.takes_subfolders:
            pending += [(f"{below}/{item.name}" if below else item.name, item) for item in list_subfolders(level)]


def find_mask_files(mask_folder: SourcePath, stem: str) -> list[SourcePath]:
    """Returns the mask files of an image, found by the name of the image.

    These are <stem> and <stem>_mask with any image suffix, and every image in the folder <stem>/. MVTec LOCO stores several
    regions of one image in such a folder. Broken links are included.

    Args:
        mask_folder: folder of the masks.
        stem: file name of the image without suffix.
    """
    if not mask_folder.is_dir():
        return []
    suffixes = (*IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES))
    candidates = [mask_folder / f"{name}{suffix}" for name in (stem, f"{stem}_mask") for suffix in suffixes]
    # a broken link counts as a mask: otherwise the image would be ingested without its mask
    masks = [path for path in candidates if path.is_file() or is_broken_link(path)]
    return sorted(set(masks)) + list_image_files(mask_folder / stem)


def reject_unmatched_masks(
    plan: ImportPlan,
    mask_folder: SourcePath,
    stems: set[str],
    settings: ImportSettings,
    skipped_names: Collection[str] = (),
) -> None:
    """Adds masks that belong to no image to the rejects of a plan.

    Args:
        plan: the plan of the category, which is changed.
        mask_folder: folder of the masks.
        stems: file names, without suffix, of the images.
        settings: the settings of the ingestion.
        skipped_names: names of subfolders of `mask_folder` that are not checked by this call.
    """
    unmatched = [
        path for path in list_image_files(mask_folder) if not {path.stem, path.stem.removesuffix("_mask")} & stems
    ]
    for nested in list_subfolders(mask_folder):
        if nested.name not in stems and nested.name not in skipped_names:
            unmatched += list_image_files(nested)
    for path in unmatched:
        detail = "no image has this mask's name: rename one or remove the mask"
        plan.rejects.append(RejectedFile(settings.describe_path(path), plan.category, "mask_without_image", detail))


def refuse_unexpected_folders(root: SourcePath, allowed_names: set[str], expected: str) -> None:
    """Checks that all visible subfolders of a folder have allowed names. Hidden and system folders do not count.

    Args:
        root: the folder; it need not exist.
        allowed_names: the allowed names of subfolders.
        expected: the expected content, for the error message.

    Raises: DataError: there is a subfolder with another name.
    """
    unexpected = [item.name for item in list_subfolders(root) if item.name not in allowed_names]
    if unexpected:
        names = ", ".join(name if is_valid_utf8(name) else ascii(name) for name in unexpected)
        raise DataError(f"{root}: did not expect the folder {names} here: expected {expected}; move it away")


def describe_skipped_folders(root: SourcePath, used_names: set[str], settings: ImportSettings) -> list[str]:
    """Returns notes for the user: one for each subfolder that is not used, and one on images that are directly in `root`.

    Images directly in `root` are skipped, because no folder gives their meaning.

    Args:
        root: folder of the category.
        used_names: names of the subfolders that are used.
        settings: the settings of the ingestion.
    """
    notes = [
        f"{settings.describe_path(item)}: skipped, its name has no meaning in this layout"
        for item in list_subfolders(root)
        if item.name not in used_names
    ]
    if num_loose := len(list_image_files(root)):
        remedy = "move them into a folder"
        notes.append(f"{settings.describe_path(root)}: {num_loose} images beside the folders are skipped: {remedy}")
    return notes


def list_subfolders(folder: SourcePath) -> list[SourcePath]:
    """Returns the sorted visible folders directly in a folder; an empty list if the folder does not exist."""
    if not folder.is_dir():
        return []
    return sorted(item for item in folder.iterdir() if item.is_dir() and not is_hidden(item.name))


def list_good_part_folders(folder: SourcePath) -> list[SourcePath]:
    """Returns the visible subfolders whose names mean good (normal) parts, such as good/ or ok/."""
    return [item for item in list_subfolders(folder) if means_good_parts(item.name)]


def is_broken_link(path: SourcePath) -> bool:
    """Returns whether a path is a link to a missing file, for instance a file under version control that was not fetched."""
    return isinstance(path, Path) and path.is_symlink() and not path.exists()  # S3 has no links


def describe_broken_link(path: SourcePath) -> str:
    """Returns the explanation of a broken link for a report: the target of the link and the remedy."""
    target = ascii(os.readlink(str(path)))
    return f"a link to {target}, which does not exist: fetch the file (git annex get, dvc pull) or copy the file itself"


def _list_files(folder: SourcePath) -> tuple[list[SourcePath], Counter[str]]:
    """Lists the files directly in a folder, and counts hidden files and documents such as readme.txt, which are ignored.

    Returns:
        The sorted files without ignored files; and kind -> number of ignored files ("hidden", a suffix or a name).
    """
    files: list[SourcePath] = []
    num_skipped: Counter[str] = Counter()
    items = folder.iterdir() if folder.is_dir() else ()
    for item in sorted(item for item in items if not item.is_dir()):
        if is_hidden(item.name):
            num_skipped["hidden"] += 1
        elif item.suffix.lower() in IGNORED_SUFFIXES or item.stem.lower() in IGNORED_STEMS:
            num_skipped[item.suffix.lower() or item.name] += 1
        else:
            files.append(item)
    return files, num_skipped


def list_image_files(folder: SourcePath) -> list[SourcePath]:
    """Returns the sorted visible image files directly in a folder; an empty list if the folder does not exist."""
    return [path for path in _list_files(folder)[0] if path.suffix.lower() in IMAGE_SUFFIXES]


def get_folder_name(path: SourcePath) -> str:
    """Returns the name of a folder, also for ".". A link is not followed."""
    return Path(os.path.abspath(path)).name if isinstance(path, Path) else path.name
