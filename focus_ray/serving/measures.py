"""What the service counts; by itself nowhere. `serving.metrics` hands it to Prometheus through Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from focus_ray.bundle.registry import Version
from focus_ray.data.images import ImageError
from focus_ray.evaluation.inspection import Inspection
from focus_ray.evaluation.shift import Shift


class Measures:
    """Takes every figure and keeps none."""

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request was answered. route: the pattern, never the path."""

    def stages(self, milliseconds: Mapping[str, float]) -> None:
        """Where an inspection's time went."""

    def batch(self, num_images: int, num_categories: int, num_passes: int) -> None:
        """A batch was scored, in so many passes through a backbone."""

    def loaded(self, version: Version, seconds: float) -> None: ...

    def dropped(self, version: Version) -> None: ...

    def held(self, num_models: int, num_bytes: int) -> None: ...

    def in_flight(self, num_requests: int, num_bytes: int) -> None: ...

    def results(self, version: Version, results: Sequence[Inspection | ImageError], role: str) -> None:
        """What was found, or could not be read. role: answer, canary or shadow."""

    def shift(self, version: Version, shift: Shift) -> None:
        """The latest scores of a version were compared with the scores that set its threshold."""

    def shadow_difference(self, version: Version, differs: bool, score_change: float) -> None: ...

    def retried(self) -> None:
        """A replica was lost while it scored, and another was asked."""

    def sink(self, outcome: str, count: int) -> None:
        """outcome: kept or dropped, then written or failed; delayed too where the first attempt at writing failed."""
