"""Module with the table of the kinds of densities, by name. A new kind is one file in `density/kinds` and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from focus_ray.settings.kinds import LazyRegistry

if TYPE_CHECKING:
    from focus_ray.density.kinds.base import DensityKind

DENSITIES: LazyRegistry[DensityKind[Any]] = LazyRegistry(
    "density",
    {
        "gaussian": "focus_ray.density.kinds.gaussian:GAUSSIAN",
        "nearest": "focus_ray.density.kinds.nearest:NEAREST",
    },
)
