"""Module for the section `density` of the configuration: settings of all densities, and settings that each kind adds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import create_model

from focus_ray.density.registry import DENSITIES

if TYPE_CHECKING:  # code outside a kind uses only the shared settings
    from focus_ray.density.kinds.shared import SharedDensitySettings as DensityConfig
else:
    from focus_ray.density.kinds.shared import SharedDensitySettings

    _OWN = [DENSITIES[name].settings for name in DENSITIES if DENSITIES[name].settings is not SharedDensitySettings]
    DensityConfig = create_model(
        "DensityConfig",
        __doc__=SharedDensitySettings.__doc__,
        __module__=__name__,
        __base__=(*_OWN, SharedDensitySettings),
    )
