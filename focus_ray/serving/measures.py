"""The interface through which the service reports metrics. `serving.metrics` exports them to Prometheus through Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from focus_ray.bundle.registry import Version
from focus_ray.data.images import ImageError
from focus_ray.detect.inspection import Inspection
from focus_ray.detect.shift import Shift


class Measures:
    """Receives metrics and ignores them; a subclass records them."""

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Records an answered request. Args: route: the pattern of the path, which bounds the number of metric series."""

    def stages(self, milliseconds: Mapping[str, float]) -> None:
        """Records the milliseconds of each stage of an inspection."""

    def batch(self, num_images: int, num_categories: int, num_passes: int) -> None:
        """Records a scored batch. Args: num_passes: forward passes through a backbone."""

    def loaded(self, version: Version, seconds: float) -> None:
        """Records that a version was loaded."""

    def dropped(self, version: Version) -> None:
        """Records that a version was dropped from memory."""

    def in_memory(self, num_models: int, num_bytes: int) -> None:
        """Records the number and size of the models in memory."""

    def in_flight(self, num_requests: int, num_bytes: int) -> None:
        """Records the number of requests in flight and the size of their bodies."""

    def results(self, version: Version, results: Sequence[Inspection | ImageError], role: str) -> None:
        """Records the results of the images of a request. Args: role: answer, canary or shadow."""

    def shift(self, version: Version, shift: Shift) -> None:
        """Records a comparison of the latest scores of a version with its calibration scores."""

    def shadow_difference(self, version: Version, differs: bool, score_change: float) -> None:
        """Records whether the verdict of a shadow version differs, and the change of score / threshold."""

    def retried(self) -> None:
        """Records a retry after a replica was lost."""

    def sink(self, outcome: str, count: int) -> None:
        """Records an outcome of images in the sink: kept or dropped, then written or failed; delayed after a failed write."""
