"""good/, bad*/ and masks/."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from focus_ray.data.importers.base import (
    FolderImporter,
    ImportPlan,
    ImportSettings,
    Sample,
    add_folder,
    held_for_test,
    image_files,
    match_masks,
    refuse_folders,
    reject_lone_masks,
    subfolders,
)
from focus_ray.data.schema import Reject


def plan_folder(root: Path, category: str, settings: ImportSettings) -> ImportPlan:
    """good/, bad*/ and masks/: what somebody's own images most often are."""
    plan = ImportPlan(category)
    bad_folders = [item for item in subfolders(root) if item.name.lower().startswith("bad")]
    masks_root = root / "masks"
    known = {"good", "masks", *(item.name for item in bad_folders)}
    refuse_folders(root, known, "good/, bad*/ and masks/")

    normal = ImportPlan(category)
    add_folder(normal, root / "good", "good", "train", 0, "good", None, settings)
    plan.rejects += normal.rejects
    plan.notes += normal.notes
    owners: dict[str, list[str]] = defaultdict(list)
    for bad in bad_folders:
        for path in image_files(bad):
            owners[path.stem].append(bad.name)

    held = held_for_test([item.path.name for item in normal.samples], settings) if bad_folders else set()
    for sample in normal.samples:
        stem = sample.path.stem
        masks = match_masks(masks_root / "good", stem) or ([] if stem in owners else match_masks(masks_root, stem))
        split = "test" if sample.path.name in held else "train"
        plan.samples.append(Sample(sample.path, "good", split, 0, "good", tuple(masks)))
    for bad in bad_folders:
        anomalous = ImportPlan(category)
        defect = bad.name[len("bad") :].lstrip("_-. ") or "bad"
        add_folder(anomalous, bad, bad.name, "test", 1, defect, None, settings)
        plan.rejects += anomalous.rejects
        plan.notes += anomalous.notes
        for sample in anomalous.samples:
            stem = sample.path.stem
            masks = match_masks(masks_root / bad.name, stem)
            if not masks:
                masks = match_masks(masks_root, stem)
                if masks and len(owners[stem]) > 1:
                    detail = (
                        f"{settings.relative(masks[0])} could belong to {stem} of {', '.join(owners[stem])}: "
                        "move it to masks/<folder of its image>/"
                    )
                    plan.rejects.append(Reject(settings.relative(sample.path), category, "mask_ambiguous", detail))
                    continue
            plan.samples.append(Sample(sample.path, bad.name, "test", 1, defect, tuple(masks)))

    image_folders = [root / "good", *bad_folders]
    stems = {folder.name: {path.stem for path in image_files(folder)} for folder in image_folders}
    reject_lone_masks(plan, masks_root, set().union(stems, *stems.values()), settings)
    for name, own in stems.items():
        reject_lone_masks(plan, masks_root / name, own, settings)
    return plan


FOLDER = FolderImporter("good/ with bad*/ and masks/", "good", plan_folder)
