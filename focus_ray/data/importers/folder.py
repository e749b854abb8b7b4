"""good/, bad*/ and masks/."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from focus_ray.data.importers.base import (
    FolderImporter,
    ImportPlan,
    ImportSettings,
    Sample,
    add_folder,
    folder_levels,
    good_folders,
    held_for_test,
    image_files,
    match_masks,
    refuse_folders,
    reject_lone_masks,
    skipped_folders,
    subfolder_names,
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

    held = [False] * len(normal.samples)
    if bad_folders:
        groups = settings.name_groups([(item.path, item.below) for item in normal.samples])
        names = [f"{item.below}/{item.path.name}" if item.below else item.path.name for item in normal.samples]
        held = held_for_test(names, settings, groups)
    if any(held):
        plan.folders.append(f"of the good images {sum(held)} are kept for the test, the others are for training")
    for sample, is_held in zip(normal.samples, held, strict=True):
        stem = sample.path.stem
        masks = match_masks(_masks_of(masks_root, sample), stem)
        masks = masks or ([] if stem in owners or sample.below else match_masks(masks_root, stem))
        split = "test" if is_held else "train"
        plan.samples.append(replace(sample, split=split, masks=tuple(masks), drawn=True))
    for bad in bad_folders:
        anomalous = ImportPlan(category)
        defect = bad.name[len("bad") :].lstrip("_-. ") if bad.name.lower().startswith("bad") else bad.name
        defect = defect or "bad"
        add_folder(anomalous, bad, bad.name, "test", 1, defect, None, settings)
        plan.take_over(anomalous)
        for sample in anomalous.samples:
            stem = sample.path.stem
            masks = match_masks(_masks_of(masks_root, sample), stem)
            if not masks and not sample.below:
                masks = match_masks(masks_root, stem)
                if masks and len(owners[stem]) > 1:
                    detail = (
                        f"{settings.relative(masks[0])} could belong to {stem} of {', '.join(owners[stem])}: "
                        "move it to masks/<folder of its image>/"
                    )
                    plan.rejects.append(Reject(settings.relative(sample.path), category, "mask_ambiguous", detail))
                    continue
            plan.samples.append(replace(sample, masks=tuple(masks)))

    image_folders = [*good, *bad_folders]
    stems = {folder.name: {path.stem for path in image_files(folder)} for folder in image_folders}
    reject_lone_masks(plan, masks_root, set().union(stems, *stems.values()), settings)
    for folder in image_folders:
        for below, level in folder_levels(folder, settings):
            place = masks_root / folder.name / below if below else masks_root / folder.name
            own = {path.stem for path in image_files(level)}
            reject_lone_masks(plan, place, own, settings, subfolder_names(level, settings))
    return plan


def _masks_of(masks_root: SourcePath, sample: Sample) -> SourcePath:
    """Returns the folder of an image's masks: masks/<folder of the image>/<its subfolders>."""
    place = masks_root / sample.folder
    return place / sample.below if sample.below else place


def _is_folder(folder: SourcePath) -> bool:
    if (folder / "good").is_dir():
        return True
    others = [item for item in subfolders(folder) if not (is_bad_name(item.name) or item.name == "masks")]
    return any(image_files(item) for item in good_folders(folder)) and others == good_folders(folder)


FOLDER = FolderImporter("good/ with bad*/ and masks/", _is_folder, plan_folder)
