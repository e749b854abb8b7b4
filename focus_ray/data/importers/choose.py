"""Which importer a folder is for."""

from __future__ import annotations

from collections.abc import Sequence

from focus_ray.data.importers.base import ImportPlan, ImportSettings, image_files, subfolders
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
    return chosen, plans, notes
