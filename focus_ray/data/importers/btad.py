"""The importer for the public data set BTAD."""

from __future__ import annotations

from focus_ray.data.importers.base import (
    FolderImporter,
    ImportPlan,
    ImportSettings,
    add_folder_images,
    list_subfolders,
    refuse_unexpected_folders,
)
from focus_ray.data.source import SourcePath


def plan_btad_import(root: SourcePath, category: str, settings: ImportSettings) -> ImportPlan:
    """Makes the import plan of a category of BTAD, where ok/ contains good images and ko/ defective images.

    Raises: DataError: train/ or test/ contains another folder.
    """
    plan = ImportPlan(category)
    truth = root / "ground_truth"
    refuse_unexpected_folders(root / "train", {"ok"}, "normal images only, in ok/")
    refuse_unexpected_folders(root / "test", {"ok", "ko"}, "ok/ and ko/")
    add_folder_images(plan, root / "train" / "ok", "train", "train", 0, "good", None, settings)
    add_folder_images(plan, root / "test" / "ok", "test", "test", 0, "good", truth / "ok", settings)
    add_folder_images(plan, root / "test" / "ko", "test", "test", 1, "ko", truth / "ko", settings)
    return plan


def is_btad_folder(folder: SourcePath) -> bool:
    """Returns whether a folder is a category of BTAD: train/ contains only ok/, and test/ contains only ok/ or ko/."""
    train, test = ({item.name for item in list_subfolders(folder / name)} for name in ("train", "test"))
    return train == {"ok"} and test <= {"ok", "ko"}


BTAD = FolderImporter("train/ok with test/ok and test/ko", is_btad_folder, plan_btad_import)
