"""Exports the metrics of the service to Prometheus through Ray, which prefixes every name: `ray_focus_ray_...`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray.util.metrics import Counter, Gauge, Histogram

from focus_ray.bundle.registry import Version
from focus_ray.data.images import ImageError
from focus_ray.detect.inspection import Inspection
from focus_ray.detect.shift import Shift
from focus_ray.serving.measures import Measures

_SECONDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60]
_MILLISECONDS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]
_IMAGES = [1, 2, 4, 8, 16, 32, 64, 128]
# p-values of normal images are uniform: from 0.1 on, each bucket contains a tenth of the images
_P_VALUES = [0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
_SCORE_RATIOS = [0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0]  # score / threshold
_VERSION_TAGS = ("team", "category", "version", "role")


class RayMeasures(Measures):
    """Records metrics with Ray. Create it in the process that reports them."""

    def __init__(self) -> None:
        self._requests = Counter("focus_ray_requests", "Requests answered.", tag_keys=("route", "method", "status"))
        self._seconds = Histogram(
            "focus_ray_request_seconds", "From a request's head to its answer.", _SECONDS, ("route",)
        )
        self._stages = Histogram(
            "focus_ray_stage_milliseconds", "Where an inspection's time went.", _MILLISECONDS, ("stage",)
        )
        self._batch = Histogram("focus_ray_batch_images", "Images scored together.", _IMAGES)
        self._mixture = Histogram("focus_ray_batch_categories", "Models in a batch.", _IMAGES)
        self._passes = Counter("focus_ray_passes", "Passes through a backbone.")
        self._load = Histogram(
            "focus_ray_load_seconds", "Until a version was in memory.", _SECONDS, ("team", "category")
        )
        self._dropped = Counter("focus_ray_models_dropped", "Versions put out of memory.", ("team", "category"))
        self._models = Gauge("focus_ray_models", "Versions in memory.")
        self._model_bytes = Gauge("focus_ray_model_bytes", "Their size.")
        self._in_flight = Gauge("focus_ray_in_flight_requests", "Requests under way.")
        self._in_flight_bytes = Gauge("focus_ray_in_flight_bytes", "The bodies of requests under way.")
        self._images = Counter("focus_ray_images", "Images inspected.", (*_VERSION_TAGS, "verdict"))
        self._p_value = Histogram("focus_ray_p_value", "p-values of images.", _P_VALUES, _VERSION_TAGS)
        self._score = Histogram("focus_ray_score_to_threshold", "Score over threshold.", _SCORE_RATIOS, _VERSION_TAGS)
        self._shift = Gauge(
            "focus_ray_shift_p_value",
            "Chance that the latest images of a version score so much higher, or lower, than those that set its threshold.",
            ("team", "category", "version", "direction"),
        )
        self._shadow = Counter(
            "focus_ray_shadow_images", "Images scored in shadow.", ("team", "category", "version", "differs")
        )
        self._retries = Counter("focus_ray_retries", "Calls made again after a replica was lost.")
        self._sink = Counter("focus_ray_sink_images", "What became of images for the sink.", ("outcome",))

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Counts a request by route, method and status, and records its duration."""
        self._requests.inc(1, {"route": route, "method": method, "status": str(status)})
        self._seconds.observe(seconds, {"route": route})

    def stages(self, milliseconds: Mapping[str, float]) -> None:
        """Records the milliseconds of each stage of an inspection."""
        for stage, value in milliseconds.items():
            self._stages.observe(value, {"stage": stage})

    def batch(self, num_images: int, num_categories: int, num_passes: int) -> None:
        """Records images and categories of a batch, and counts its forward passes."""
        self._batch.observe(num_images)
        self._mixture.observe(num_categories)
        self._passes.inc(num_passes)

    def loaded(self, version: Version, seconds: float) -> None:
        """Records how long a version took to load."""
        self._load.observe(seconds, {"team": version.team, "category": version.category})

    def dropped(self, version: Version) -> None:
        """Counts a version that was dropped from memory."""
        self._dropped.inc(1, {"team": version.team, "category": version.category})

    def in_memory(self, num_models: int, num_bytes: int) -> None:
        """Sets the number and size of the models in memory."""
        self._models.set(num_models)
        self._model_bytes.set(num_bytes)

    def in_flight(self, num_requests: int, num_bytes: int) -> None:
        """Sets the number of requests in flight and the size of their bodies."""
        self._in_flight.set(num_requests)
        self._in_flight_bytes.set(num_bytes)

    def results(self, version: Version, results: Sequence[Inspection | ImageError], role: str) -> None:
        """Counts images by verdict, and records p-values and scores relative to the threshold."""
        tags = {"team": version.team, "category": version.category, "version": version.name, "role": role}
        for result in results:
            if isinstance(result, ImageError):
                self._images.inc(1, {**tags, "verdict": "unreadable"})
                continue
            self._images.inc(1, {**tags, "verdict": result.verdict})
            self._p_value.observe(result.p_value, tags)
            self._score.observe(result.score_to_threshold, tags)

    def shift(self, version: Version, shift: Shift) -> None:
        """Sets the p-values of the latest shift test of a version, for higher and lower scores."""
        tags = {"team": version.team, "category": version.category, "version": version.name}
        self._shift.set(shift.p_higher, {**tags, "direction": "higher"})
        self._shift.set(shift.p_lower, {**tags, "direction": "lower"})

    def shadow_difference(self, version: Version, differs: bool, score_change: float) -> None:
        """Counts an image of a shadow version, by whether its verdict differs."""
        tags = {"team": version.team, "category": version.category, "version": version.name}
        self._shadow.inc(1, {**tags, "differs": str(differs).lower()})

    def retried(self) -> None:
        """Counts a retry after a replica was lost."""
        self._retries.inc(1)

    def sink(self, outcome: str, count: int) -> None:
        """Counts images in the sink by outcome."""
        self._sink.inc(count, {"outcome": outcome})
