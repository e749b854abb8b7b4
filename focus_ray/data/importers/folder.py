"""The importer for the simple layout good/, bad*/ and masks/."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from focus_ray.data.importers.base import (
    FolderImporter,
    ImportPlan,
    ImportSettings,
    add_folder_images,
    describe_skipped_folders,
    find_mask_files,
    list_good_part_folders,
    list_image_files,
    list_subfolders,
    refuse_unexpected_folders,
    reject_unmatched_masks,
    select_test_images,
)
from focus_ray.data.importers.vocabulary import means_defective_parts
from focus_ray.data.schema import RejectedFile
from focus_ray.data.source import SourcePath


def plan_folder_import(root: SourcePath, category: str, settings: ImportSettings) -> ImportPlan:
    """Makes the import plan of a category with folders of good parts, of defective parts, and masks/: users' own images.

    Folders of good parts are good/ or a word for it (`vocabulary`); folders of defective parts are bad*/ or a word for it. If a
    folder of defective parts exists, some good images are drawn as test images. `find_mask_files` describes the names of masks.

    Raises: DataError: the category contains another folder.
    """
    plan = ImportPlan(category)
    good = list_good_part_folders(root)
    bad_folders = [item for item in list_subfolders(root) if means_defective_parts(item.name)]
    masks_root = root / "masks"
    allowed_names = {"masks", *(item.name for item in (*good, *bad_folders))}
    refuse_unexpected_folders(root, allowed_names, "good/, bad*/ and masks/")
    plan.notes += describe_skipped_folders(root, {item.name for item in list_subfolders(root)}, settings)

    for item in good:
        add_folder_images(plan, item, item.name, "train", 0, "good", masks_root / item.name, settings)
    normal, plan.samples = plan.samples, []
    # stem of a defective image -> names of the folders with such an image: a mask directly in masks/ must have one owner
    owners: dict[str, list[str]] = defaultdict(list)
    for bad in bad_folders:
        for path in list_image_files(bad):
            owners[path.stem].append(bad.name)

    is_test = [False] * len(normal)
    if bad_folders:
        groups = settings.name_groups([(item.path, item.subfolders) for item in normal])
        names = [f"{item.subfolders}/{item.path.name}" if item.subfolders else item.path.name for item in normal]
        is_test = select_test_images(names, settings, groups)
    if any(is_test):
        plan.folders.append(f"{sum(is_test)} of the good images are test images, the others are for training")
    for sample, is_drawn in zip(normal, is_test, strict=True):
        masks = sample.masks
        if not masks and not sample.subfolders and sample.path.stem not in owners:
            masks = tuple(find_mask_files(masks_root, sample.path.stem))
        split = "test" if is_drawn else "train"
        plan.samples.append(replace(sample, split=split, masks=masks, has_drawn_split=True))
    for bad in bad_folders:
        num_before = len(plan.samples)
        defect = bad.name[len("bad") :].lstrip("_-. ") if bad.name.lower().startswith("bad") else bad.name
        add_folder_images(plan, bad, bad.name, "test", 1, defect or "bad", masks_root / bad.name, settings)
        anomalous, plan.samples = plan.samples[num_before:], plan.samples[:num_before]
        for sample in anomalous:
            stem, masks = sample.path.stem, sample.masks
            if not masks and not sample.subfolders:
                masks = tuple(find_mask_files(masks_root, stem))
                if masks and len(owners[stem]) > 1:
                    could_be = f"{settings.describe_path(masks[0])} could belong to {stem} of {', '.join(owners[stem])}"
                    detail = f"{could_be}: move it to masks/<folder of its image>/"
                    plan.rejects.append(
                        RejectedFile(settings.describe_path(sample.path), category, "mask_ambiguous", detail)
                    )
                    continue
            plan.samples.append(replace(sample, masks=masks))

    image_folders = [*good, *bad_folders]
    stems = {path.stem for folder in image_folders for path in list_image_files(folder)}
    reject_unmatched_masks(plan, masks_root, stems, settings, [folder.name for folder in image_folders])
    return plan


def _is_good_and_bad_folder(folder: SourcePath) -> bool:
    """Returns whether a folder has the layout good/, bad*/, masks/.

    It contains good/; or images in folders whose names mean good parts, and no folder with an unknown meaning.
    """
    if (folder / "good").is_dir():
        return True
    other_folders = [
        item for item in list_subfolders(folder) if not (means_defective_parts(item.name) or item.name == "masks")
    ]
    good = list_good_part_folders(folder)
    return any(list_image_files(item) for item in good) and other_folders == good


FOLDER = FolderImporter("good/ with bad*/ and masks/", _is_good_and_bad_folder, plan_folder_import)
