"""The importer for the public data sets MVTec AD, MVTec AD 2 and MVTec LOCO."""

from __future__ import annotations

from focus_ray.data.importers.base import (
    FolderImporter,
    ImportPlan,
    ImportSettings,
    add_folder_images,
    describe_skipped_folders,
    list_good_part_folders,
    list_subfolders,
    refuse_unexpected_folders,
    reject_unmatched_masks,
)
from focus_ray.data.importers.vocabulary import means_good_parts
from focus_ray.data.source import SourcePath
from focus_ray.errors import DataError
from focus_ray.names import is_valid_utf8


def plan_mvtec_import(root: SourcePath, category: str, settings: ImportSettings) -> ImportPlan:
    """Makes the import plan of a category of MVTec AD, AD 2, LOCO or BTAD: reads all folders of any of these data sets.

    Raises: DataError: train/ or validation/ contains a folder whose name does not mean good parts, or a folder name is not valid
        UTF-8.
    """
    plan = ImportPlan(category)
    for folder in ("train", "validation"):
        good = list_good_part_folders(root / folder)
        refuse_unexpected_folders(root / folder, {item.name for item in good}, "normal images only, in good/")
        for item in good:
            add_folder_images(plan, item, folder, "train", 0, "good", None, settings)
    for folder, truth in (("test", root / "ground_truth"), ("test_public", root / "test_public" / "ground_truth")):
        for defect in list_subfolders(root / folder):
            if defect.name == "ground_truth":
                continue
            if not is_valid_utf8(defect.name):
                raise DataError(f"{settings.describe_path(defect)}: its name is not valid UTF-8: rename the folder")
            label = int(not means_good_parts(defect.name))
            add_folder_images(plan, defect, folder, "test", label, defect.name, truth / defect.name, settings)
        for masks in list_subfolders(truth):
            if not (root / folder / masks.name).is_dir():
                reject_unmatched_masks(plan, masks, set(), settings)
    private = sorted(item for item in root.glob("test_private*"))
    plan.notes += [f"{settings.describe_path(item)}: skipped, its labels are not public" for item in private]
    used_names = {"train", "validation", "test", "test_public", "ground_truth", *(item.name for item in private)}
    plan.notes += describe_skipped_folders(root, used_names, settings)
    return plan


def is_btad_folder(folder: SourcePath) -> bool:
    """Returns whether a folder is a category of BTAD: train/ contains only ok/, and test/ contains only ok/ or ko/."""
    train, test = ({item.name for item in list_subfolders(folder / name)} for name in ("train", "test"))
    return train == {"ok"} and test <= {"ok", "ko"}


def _is_mvtec_folder(folder: SourcePath) -> bool:
    """Returns whether a folder has the layout of MVTec: train/ contains a folder of good parts, and the layout is not BTAD."""
    return bool(list_good_part_folders(folder / "train")) and not is_btad_folder(folder)


MVTEC = FolderImporter("train/good with test/ or test_public/", _is_mvtec_folder, plan_mvtec_import)
