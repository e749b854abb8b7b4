"""MVTec AD, MVTec AD 2 and MVTec LOCO."""

from __future__ import annotations

from pathlib import Path

from focus_ray.data.importers.base import (
    FolderImporter,
    ImportPlan,
    ImportSettings,
    add_folder,
    refuse_folders,
    reject_lone_masks,
    subfolders,
)


def plan_mvtec(root: Path, category: str, settings: ImportSettings) -> ImportPlan:
    """MVTec AD, MVTec AD 2 and MVTec LOCO, told apart by their folders alone."""
    plan = ImportPlan(category)
    for folder in ("train", "validation"):
        if (root / folder).is_dir():
            refuse_folders(root / folder, {"good"}, "normal images only, in good/")
            add_folder(plan, root / folder / "good", folder, "train", 0, "good", None, settings)
    for folder, truth in (("test", root / "ground_truth"), ("test_public", root / "test_public" / "ground_truth")):
        for defect in subfolders(root / folder):
            if defect.name == "ground_truth":
                continue
            label = int(defect.name != "good")
            add_folder(plan, defect, folder, "test", label, defect.name, truth / defect.name, settings)
        for masks in subfolders(truth):
            if not (root / folder / masks.name).is_dir():
                reject_lone_masks(plan, masks, set(), settings)
    for private in sorted(root.glob("test_private*")):
        plan.notes.append(f"{settings.relative(private)}: skipped, its labels are not public")
    return plan


MVTEC = FolderImporter("train/good with test/ or test_public/", "train/good", plan_mvtec)
