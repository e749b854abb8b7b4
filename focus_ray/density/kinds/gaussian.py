"""Module for the density kind `gaussian`: one Gaussian per location (PaDiM, arXiv 2011.08785)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from focus_ray.density.kinds.base import DensityKind
from focus_ray.density.kinds.shared import SharedDensitySettings

if TYPE_CHECKING:
    from torch import Tensor

    from focus_ray.density.base import NormalStatistics
    from focus_ray.density.gaussian import Gaussian, LeaveOneOutGaussian


class GaussianSettings(SharedDensitySettings):
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

    def find_unused_settings(self, config: GaussianSettings) -> dict[str, str]:
        """See `DensityKind.find_unused_settings`: returns key -> reason. Adds window, unless a projection is learnt."""
        reasons = super().find_unused_settings(config)
        if config.reduction != "discriminant":  # otherwise the search for the projection uses the window
            reasons["window"] = "density.kind is gaussian"
        return reasons

    def build(self, config: GaussianSettings, statistics: NormalStatistics) -> Gaussian:
        """See `DensityKind.build`: returns a `Gaussian`. Raises: ValueError: fewer than two images."""
        from focus_ray.density.gaussian import Gaussian, fit_gaussian
        from focus_ray.density.moments import compute_absolute_ridge

        moments = statistics.moments
        mean, factor = fit_gaussian(moments, compute_absolute_ridge(config, moments), config.pooling)
        return Gaussian(mean, factor, moments.height, moments.width)

    def build_leave_one_out_scorer(
        self, config: GaussianSettings, statistics: NormalStatistics, density: Gaussian
    ) -> LeaveOneOutGaussian:
        """See `DensityKind.build_leave_one_out_scorer`: returns a `LeaveOneOutGaussian`.

        Raises: ValueError: fewer than three images.
        """
        from focus_ray.density.gaussian import LeaveOneOutGaussian
        from focus_ray.density.moments import compute_absolute_ridge

        ridge = compute_absolute_ridge(config, statistics.moments)
        return LeaveOneOutGaussian(statistics.moments, ridge, config.pooling, statistics.bank)

    def collect_tensors(
        self, config: GaussianSettings, statistics: NormalStatistics, density: Gaussian
    ) -> dict[str, Tensor]:
        """See `DensityKind.collect_tensors`: returns the tensors mean and precision_factor (packed triangles)."""
        from focus_ray.density.moments import pack_lower_triangles

        return {"mean": density.mean, "precision_factor": pack_lower_triangles(density.precision_factor)}

    def restore(self, config: GaussianSettings, tensors: Mapping[str, Tensor], height: int, width: int) -> Gaussian:
        """See `DensityKind.restore`: returns a `Gaussian`.

        Raises: KeyError: a tensor is missing. ValueError: the shapes do not fit together.
        """
        from focus_ray.density.gaussian import Gaussian
        from focus_ray.density.moments import unpack_lower_triangles

        return Gaussian(tensors["mean"], unpack_lower_triangles(tensors["precision_factor"]), height, width)

    def make_exportable(self, density: Gaussian, half: bool) -> Gaussian:
        """See `DensityKind.make_exportable`: returns a `Gaussian`."""
        return density.make_exportable(half)


GAUSSIAN = GaussianKind()
