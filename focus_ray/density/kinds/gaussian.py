"""Module for the density kind `gaussian`: one Gaussian per location (PaDiM, arXiv 2011.08785)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from focus_ray.density.kinds.base import DensityKind
from focus_ray.density.kinds.shared import SharedSettings

if TYPE_CHECKING:
    from torch import Tensor

    from focus_ray.density.base import Statistics
    from focus_ray.density.gaussian import Gaussian, LeaveOneOutGaussian


class GaussianSettings(SharedSettings):
    """The shared settings of densities, plus the settings that only the kind `gaussian` has."""

    pooling: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="gaussian: weight of the covariance pooled over all places, relative to a place's own covariance. "
        "0 uses only the place's own [ours].",
    )


class GaussianKind(DensityKind[GaussianSettings]):
    """The density kind `gaussian`. `DensityKind` describes the methods."""

    settings = GaussianSettings
    supports_leave_one_out = True

    def inert_settings(self, config: GaussianSettings) -> dict[str, str]:
        reasons = super().inert_settings(config)
        if config.reduction != "discriminant":  # otherwise the search for the projection uses the window
            reasons["window"] = "density.kind is gaussian"
        return reasons

    def build(self, config: GaussianSettings, statistics: Statistics) -> Gaussian:
        from focus_ray.density.gaussian import Gaussian, fit_gaussian
        from focus_ray.density.moments import absolute_ridge

        moments = statistics.moments
        mean, factor = fit_gaussian(moments, absolute_ridge(config, moments), config.pooling)
        return Gaussian(mean, factor, moments.height, moments.width)

    def leave_one_out_scorer(
        self, config: GaussianSettings, statistics: Statistics, density: Gaussian
    ) -> LeaveOneOutGaussian:
        from focus_ray.density.gaussian import LeaveOneOutGaussian
        from focus_ray.density.moments import absolute_ridge

        ridge = absolute_ridge(config, statistics.moments)
        return LeaveOneOutGaussian(statistics.moments, ridge, config.pooling, statistics.bank)

    def tensors(self, config: GaussianSettings, statistics: Statistics, density: Gaussian) -> dict[str, Tensor]:
        from focus_ray.density.moments import pack_lower

        return {"mean": density.mean, "precision_factor": pack_lower(density.precision_factor)}

    def load(self, config: GaussianSettings, tensors: Mapping[str, Tensor], height: int, width: int) -> Gaussian:
        from focus_ray.density.gaussian import Gaussian
        from focus_ray.density.moments import unpack_lower

        return Gaussian(tensors["mean"], unpack_lower(tensors["precision_factor"]), height, width)

    def exportable(self, density: Gaussian, half: bool) -> Gaussian:
        return density.exportable(half)


GAUSSIAN = GaussianKind()
