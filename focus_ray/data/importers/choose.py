"""Chooses the importer that fits a source, and makes the import plan of each category."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from focus_ray.data.importers.base import ImportPlan, ImportSettings, list_image_files, list_subfolders
from focus_ray.data.importers.registry import IMPORTERS
from focus_ray.data.schema import SPLITS
from focus_ray.data.source import SourcePath
from focus_ray.errors import DataError
from focus_ray.names import make_valid_name


def _advise_moving_images_to_good_folder(source: SourcePath) -> str:
    """Returns the end of an error message: advice to move the images of the first folder with images into a folder good/.

    Looks in the source and its direct subfolders. The text is empty if they contain no image."""
    for folder in (source, *list_subfolders(source)):
        images = list_image_files(folder)
        if images:
            target = folder / "good" if folder == source else source / folder.name / "good"
            return f". {len(images)} images lie in {folder}: if their parts are good, move them to {target}/"
    return ""


def make_import_plans(
    source: SourcePath, format: str, categories: Sequence[str] | None, settings: ImportSettings
) -> tuple[str, list[ImportPlan], list[str]]:
    """Chooses the importer of a source, and returns the images to ingest of each category (the import plans).

    Args:
        source: root folder of the source images.
        format: name of an importer, or "auto".
        categories: the categories to ingest; None takes all.
        settings: the settings of the ingestion.

    Returns:
        The name of the chosen importer, one plan per category, and notes for the user.

    Raises:
        DataError: no category is found, the layout is ambiguous, a category does not exist, two categories have the
            same name, a folder or table has unexpected content, or the group rule does not fit the images.
    """
    categories = None if categories is None else [make_valid_name(title) for title in categories]
    names = list(IMPORTERS) if format == "auto" else [format]
    table_names = [name for name in names if IMPORTERS[name].has_table]
    # importer -> folders that fit it; importers with a table come first
    roots = {name: [source] for name in table_names if IMPORTERS[name].matches_folder(source)}
    for candidates in ([source], list_subfolders(source)):
        if roots:
            break  # the source is one category: its train/, which contains good/, must not count as a further category
        for name in (name for name in names if name not in table_names):
            folders = [path for path in candidates if IMPORTERS[name].matches_folder(path)]
            roots |= {name: folders} if folders else {}
    if not roots:
        expected = "; ".join(f"{name}: {IMPORTERS[name].expected}" for name in names)
        content = ", ".join(sorted(item.name for item in source.iterdir())[:12]) or "nothing"
        content_text = f"Found: {content}{_advise_moving_images_to_good_folder(source)}"
        raise DataError(f"{source}: no category found, here or one folder down. Expected {expected}. {content_text}")
    if len(roots) > 1:
        layouts = "; ".join(f"{name}: {', '.join(path.name for path in folders)}" for name, folders in roots.items())
        raise DataError(f"{source}: contains folders of several layouts ({layouts}): choose one with format=")
    (chosen, folders) = next(iter(roots.items()))

    notes: list[str] = []
    if folders != [source]:
        other_names = [path.name for path in list_subfolders(source) if path not in folders]
        notes += [f"{name}: skipped, not a category of the {chosen} layout" for name in other_names]
    plans = [plan for path in folders for plan in IMPORTERS[chosen].plan_import(path, categories, settings)]
    available = [plan.category for plan in plans]
    if len(set(available)) != len(available):
        raise DataError(f"{source}: two categories have the same name: {', '.join(sorted(available))}")
    if categories is not None:
        unknown = sorted(set(categories) - set(available))
        if unknown:
            raise DataError(f"{source}: no category {', '.join(unknown)}; it has {', '.join(sorted(available))}")
        plans = [plan for plan in plans if plan.category in categories]
    assign_groups(plans, settings)
    return chosen, plans, notes


def assign_groups(plans: Sequence[ImportPlan], settings: ImportSettings) -> None:
    """Sets the group of each image in the plans by the rule of the settings, and adds a note on images without a group.

    Images of a group show the same part. Without a rule nothing changes.

    Raises: DataError: no image of any category gets a group, or the rule does not fit the images of the source.
    """
    rule = settings.grouping
    samples = [sample for plan in plans for sample in plan.samples]
    if rule is None or not samples:
        return
    rule.check_source_images(sample.path for sample in samples)
    for plan in plans:
        groups: dict[SourcePath, str] = {}
        for split in SPLITS:
            locations = [(sample.path, sample.subfolders) for sample in plan.samples if sample.split == split]
            names = rule.name_groups(locations)
            groups |= {path: name for (path, _), name in zip(locations, names, strict=True)}
        plan.samples = [replace(sample, group=groups[sample.path]) for sample in plan.samples]
        ungrouped = [sample for sample in plan.samples if not sample.group]
        if ungrouped:
            plan.notes.append(
                f"{plan.category}: {len(ungrouped)} of {len(plan.samples)} images get no group from {rule.text!r}, and each "
                f"counts as a separate part (the first: {settings.describe_path(ungrouped[0].path)})"
            )
    if not any(sample.group for plan in plans for sample in plan.samples):
        raise DataError(f"group_by={rule.text!r} gives none of {len(samples)} images a group: {rule.hint}")
