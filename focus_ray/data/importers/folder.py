"""good/, bad*/ and masks/."""

from __future__ import annotations

from collections import defaultdict

from focus_ray.data.importers.base import (
    FolderImporter,
    ImportPlan,
    ImportSettings,
    Sample,
    add_folder,
    good_folders,
    held_for_test,
    image_files,
    match_masks,
    refuse_folders,
    reject_lone_masks,
    skipped_folders,
    subfolders,
)
from focus_ray.data.importers.vocabulary import is_bad_name
from focus_ray.data.schema import Reject
from focus_ray.data.source import SourcePath


def plan_folder(root: SourcePath, category: str, settings: ImportSettings) -> ImportPlan:
    """good/, bad*/ and masks/: what somebody's own images most often are."""
    plan = ImportPlan(category)
    good = good_folders(root)
    bad_folders = [item for item in subfolders(root) if is_bad_name(item.name)]
    masks_root = root / "masks"
    refuse_folders(root, {"masks", *(item.name for item in (*good, *bad_folders))}, "good/, bad*/ and masks/")
    plan.notes += skipped_folders(root, {item.name for item in subfolders(root)}, settings)

    normal = ImportPlan(category)
    for item in good:
        add_folder(normal, item, item.name, "train", 0, "good", None, settings)
    plan.take_over(normal)
    owners: dict[str, list[str]] = defaultdict(list)
    for bad in bad_folders:
        for path in image_files(bad):
            owners[path.stem].append(bad.name)

    held = held_for_test([item.path.name for item in normal.samples], settings) if bad_folders else set()
    if held:
        plan.folders.append(f"of the good images {len(held)} are kept for the test, the others are for training")
    for sample in normal.samples:
        stem = sample.path.stem
        masks = match_masks(masks_root / sample.folder, stem)
        masks = masks or ([] if stem in owners else match_masks(masks_root, stem))
        split = "test" if sample.path.name in held else "train"
        plan.samples.append(Sample(sample.path, sample.folder, split, 0, "good", tuple(masks), drawn=True))
    for bad in bad_folders:
        anomalous = ImportPlan(category)
        defect = bad.name[len("bad") :].lstrip("_-. ") if bad.name.lower().startswith("bad") else bad.name
        defect = defect or "bad"
        add_folder(anomalous, bad, bad.name, "test", 1, defect, None, settings)
        plan.take_over(anomalous)
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

    image_folders = [*good, *bad_folders]
    stems = {folder.name: {path.stem for path in image_files(folder)} for folder in image_folders}
    reject_lone_masks(plan, masks_root, set().union(stems, *stems.values()), settings)
    for name, own in stems.items():
        reject_lone_masks(plan, masks_root / name, own, settings)
    return plan


def _is_folder(folder: SourcePath) -> bool:
    if (folder / "good").is_dir():
        return True
    others = [item for item in subfolders(folder) if not (is_bad_name(item.name) or item.name == "masks")]
    return any(image_files(item) for item in good_folders(folder)) and others == good_folders(folder)


FOLDER = FolderImporter("good/ with bad*/ and masks/", _is_folder, plan_folder)
