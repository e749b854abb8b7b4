"""Settings of the data: path of the images, categories, held-out share, and regions of interest.

Each default names its source: [paper] arXiv 2110.04538, [kin] the paper's published relatives (RegAD, SimSiam, PaDiM), [ours] a
choice of this project.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from focus_ray.settings.sections import ConfigSection

Polygon = tuple[tuple[float, float], ...]


def _is_single_polygon(region: Any) -> bool:
    """Returns whether a region is a single polygon (a list of points), and not a list of polygons."""
    try:
        numbers = [number for point in region for number in point]
        return bool(numbers) and all(isinstance(number, (int, float)) for number in numbers)
    except TypeError:
        return False


class DataConfig(ConfigSection):
    """Path of the images, categories, held-out share, and regions of interest."""

    uri: str = Field(description="Root of a data set that `focus-ray ingest` made: a local path or an s3:// URI.")
    categories: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="The categories to train; each gets its own model. null trains all categories of the data set.",
    )
    holdout_fraction: float = Field(
        default=0.2,
        ge=0.0,
        lt=1.0,
        description="Share of the normal training images that is held out for calibration. These images neither train "
        "nor enter the density [ours]. Only calibration.method=split uses it.",
    )
    memory_budget_mb: float = Field(
        default=4096.0,
        ge=0.0,
        description="MiB of decoded images that a worker keeps in memory. If its images need more, it streams them "
        "again in each pass.",
    )
    regions: dict[str, str | tuple[Polygon, ...]] = Field(
        default={},
        description="Region of interest of each category; nothing is scored outside. A region is a polygon, a list of "
        "polygons, or the path or URI of a mask image that is white in the inspected area. A polygon is a "
        "list of points [x, y], given as shares of the image's width and height.",
    )

    @field_validator("regions", mode="before")
    @classmethod
    def _wrap_single_polygon(cls, value: Any) -> Any:
        """Turns the value of a region that is a single polygon into a list with this polygon."""
        if not isinstance(value, dict):
            return value
        return {name: [region] if _is_single_polygon(region) else region for name, region in value.items()}

    @field_validator("regions")
    @classmethod
    def _check_polygons(cls, value: dict[str, str | tuple[Polygon, ...]]) -> dict[str, str | tuple[Polygon, ...]]:
        """Checks that each region of interest has content, and that each polygon has at least 3 points inside the image frame.

        A polygon with a point outside the frame is refused.

        For a region given as the path of a mask, only checks that the path is not empty.

        Raises: ValueError: a region breaks one of these rules.
        """
        for name, region in value.items():
            if not region:
                raise ValueError(f"{name}: it is empty: give polygons or the path of a mask, or leave the category out")
            for polygon in () if isinstance(region, str) else region:
                if len(polygon) < 3:
                    raise ValueError(f"{name}: a polygon has {len(polygon)} points: give 3 at least")
                outside = [list(point) for point in polygon if not (0 <= point[0] <= 1 and 0 <= point[1] <= 1)]
                if outside:
                    raise ValueError(
                        f"{name}: the point {outside[0]} lies outside the image: points are [x, y], shares from 0 to 1 of its "
                        "width and height"
                    )
        return value

    @field_validator("categories", mode="before")
    @classmethod
    def _wrap_single_name(cls, value: Any) -> Any:
        """Turns a single category name into a tuple."""
        return (value,) if isinstance(value, str) else value

    @field_validator("categories")
    @classmethod
    def _check_unique_names(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """Checks that no category occurs twice. Raises: ValueError: a category occurs twice."""
        if value is not None and len(set(value)) != len(value):
            raise ValueError(f"categories lists a name twice: {list(value)}")
        return value
