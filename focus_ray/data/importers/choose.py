"""Which importer a folder is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from focus_ray.data.importers.base import ImportPlan, ImportSettings, image_files, subfolders
from focus_ray.data.schema import SPLITS
from focus_ray.data.source import SourcePath
from focus_ray.errors import DataError
from focus_ray.kinds import IMPORTERS


def _mend(source: SourcePath) -> str:
    """One line for what people have most often: images, and no folder that says what they are."""
    for place in (source, *subfolders(source)):
        images = image_files(place)
        if images:
            where = place / "good" if place == source else source / place.name / "good"
            return f". {len(images)} images lie in {place}: if their parts are good, put them into {where}/"
    return ""


def make_plans(
    source: SourcePath, format: str, categories: Sequence[str] | None, settings: ImportSettings
) -> tuple[str, list[ImportPlan], list[str]]:
    """Returns: the format taken, a plan for each category wanted, and notes."""
    wanted = list(IMPORTERS) if format == "auto" else [format]
    by_table = [name for name in wanted if IMPORTERS[name].has_table]
    roots = {name: [source] for name in by_table if IMPORTERS[name].fits(source)}
    for candidates in ([source], subfolders(source)):
        if roots:
            break  # one category: its train/, with good/ inside, must not pass for another
        fitting = {
            name: [path for path in candidates if IMPORTERS[name].fits(path)] for name in wanted if name not in by_table
        }
        roots = {name: found for name, found in fitting.items() if found}
    if not roots:
        listed = "; ".join(f"{name}: {IMPORTERS[name].expected}" for name in wanted)
        seen = ", ".join(sorted(item.name for item in source.iterdir())[:12]) or "nothing"
        raise DataError(
            f"{source}: no category found, here or one folder down. Expected {listed}. Found: {seen}{_mend(source)}"
        )
    if len(roots) > 1:
        mixed = "; ".join(f"{name}: {', '.join(path.name for path in found)}" for name, found in roots.items())
        raise DataError(f"{source}: holds folders of several shapes ({mixed}): choose one with format=")
    (chosen, found) = next(iter(roots.items()))

    notes: list[str] = []
    if found != [source]:
        others = [path.name for path in subfolders(source) if path not in found]
        notes += [f"{name}: skipped, not a category of the {chosen} shape" for name in others]
    plans = [plan for path in found for plan in IMPORTERS[chosen].plan(path, categories, settings)]
    available = [plan.category for plan in plans]
    if len(set(available)) != len(available):
        raise DataError(f"{source}: a category is named twice: {', '.join(sorted(available))}")
    if categories is not None:
        unknown = sorted(set(categories) - set(available))
        if unknown:
            raise DataError(f"{source}: no category {', '.join(unknown)}; there are: {', '.join(sorted(available))}")
        plans = [plan for plan in plans if plan.category in categories]
    assign_groups(plans, settings)
    return chosen, plans, notes


def assign_groups(plans: Sequence[ImportPlan], settings: ImportSettings) -> None:
    """Gives each sample the group that the settings' rule names, and notes how many images have none.

    Raises: DataError: no image of any category gets a group, or as the rule.
    """
    rule = settings.grouping
    samples = [sample for plan in plans for sample in plan.samples]
    if rule is None or not samples:
        return
    rule.check_sources(sample.path for sample in samples)
    for plan in plans:
        groups = [""] * len(plan.samples)
        for split in SPLITS:
            numbers = [number for number, sample in enumerate(plan.samples) if sample.split == split]
            names = rule.name_groups([(plan.samples[number].path, plan.samples[number].below) for number in numbers])
            for number, name in zip(numbers, names, strict=True):
                groups[number] = name
        plan.samples = [replace(sample, group=group) for sample, group in zip(plan.samples, groups, strict=True)]
        alone = [sample for sample in plan.samples if not sample.group]
        if alone:
            plan.notes.append(
                f"{plan.category}: {len(alone)} of {len(plan.samples)} images get no group from {rule.text!r}, and each counts "
                f"as a part of its own (the first: {settings.relative(alone[0].path)})"
            )
    if not any(sample.group for plan in plans for sample in plan.samples):
        raise DataError(f"group_by={rule.text!r} names the group of none of {len(samples)} images: {rule.hint}")
