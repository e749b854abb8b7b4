"""Which importer a folder is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from focus_ray.data.importers.base import ImportPlan, ImportSettings, _Planner, category_name, folder_name, subfolders
from focus_ray.data.importers.btad import plan_btad
from focus_ray.data.importers.folder import plan_folder
from focus_ray.data.importers.mvtec import plan_mvtec
from focus_ray.data.importers.visa import plan_visa, visa_tables
from focus_ray.errors import DataError

_SHAPES: dict[str, tuple[Callable[[Path], bool], _Planner, str]] = {
    "mvtec": (lambda path: (path / "train" / "good").is_dir(), plan_mvtec, "train/good with test/ or test_public/"),
    "btad": (lambda path: (path / "train" / "ok").is_dir(), plan_btad, "train/ok with test/ok and test/ko"),
    "folder": (lambda path: (path / "good").is_dir(), plan_folder, "good/ with bad*/ and masks/"),
}


def make_plans(
    source: Path, format: str, categories: Sequence[str] | None, settings: ImportSettings
) -> tuple[str, list[ImportPlan], list[str]]:
    """Returns: the format taken, a plan for each category wanted, and notes."""
    wanted = ["visa", *_SHAPES] if format == "auto" else [format]
    tables = visa_tables(source) if "visa" in wanted else []
    roots: dict[str, list[Path]] = {"visa": tables} if tables else {}
    for candidates in ([source], subfolders(source)):
        if roots:
            break  # one category: its train/, with good/ inside, must not pass for another
        fitting = {name: [path for path in candidates if _SHAPES[name][0](path)] for name in wanted if name in _SHAPES}
        roots = {name: found for name, found in fitting.items() if found}
    if not roots:
        shapes = {name: shape[2] for name, shape in _SHAPES.items()}
        shapes["visa"] = "split_csv/1cls.csv or image_anno.csv"
        listed = "; ".join(f"{name}: {shapes[name]}" for name in wanted)
        seen = ", ".join(sorted(item.name for item in source.iterdir())[:12]) or "nothing"
        raise DataError(f"{source}: no category found, here or one folder down. Expected {listed}. Found: {seen}")
    if len(roots) > 1:
        mixed = "; ".join(f"{name}: {', '.join(path.name for path in found)}" for name, found in roots.items())
        raise DataError(f"{source}: holds folders of several shapes ({mixed}): choose one with format=")
    (chosen, found) = next(iter(roots.items()))

    notes: list[str] = []
    if chosen == "visa":
        plans = [plan for table in found for plan in plan_visa(table, source, categories, settings)]
    else:
        if found != [source]:
            others = [path.name for path in subfolders(source) if path not in found]
            notes += [f"{name}: skipped, not a category of the {chosen} shape" for name in others]
        plan_one = _SHAPES[chosen][1]
        plans = [
            plan_one(path, category_name(folder_name(path), path), settings)
            if categories is None or folder_name(path) in categories
            else ImportPlan(folder_name(path))
            for path in found
        ]
    available = [plan.category for plan in plans]
    if len(set(available)) != len(available):
        raise DataError(f"{source}: a category is named twice: {', '.join(sorted(available))}")
    if categories is not None:
        unknown = sorted(set(categories) - set(available))
        if unknown:
            raise DataError(f"{source}: no category {', '.join(unknown)}; there are: {', '.join(sorted(available))}")
        plans = [plan for plan in plans if plan.category in categories]
    return chosen, plans, notes
