"""The metrics of the service, and the interface that records them. `serving.metrics` exports them to Prometheus through Ray."""

from __future__ import annotations

from typing import Literal, NamedTuple

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_MILLISECONDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)
# p-values of normal images are uniform: from 0.1 on, each bucket contains a tenth of the images
_P_VALUES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_SCORE_RATIOS = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)  # score / threshold
_CATEGORY = ("team", "category")
_VERSION = (*_CATEGORY, "version")
_ROLE = (*_VERSION, "role")


class ServiceMetric(NamedTuple):
    """The definition of a metric.

    Attributes:
        kind: class of `ray.util.metrics`.
        description: text for people.
        tags: names of the tags.
        buckets: upper bounds of the buckets of a histogram.
    """

    kind: Literal["Counter", "Gauge", "Histogram"]
    description: str
    tags: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


# name -> metric. Prometheus adds a prefix: ray_focus_ray_<name>, and ray_focus_ray_<name>_total for a counter
METRICS = {
    "requests": ServiceMetric("Counter", "Requests answered.", ("route", "method", "status")),
    "request_seconds": ServiceMetric("Histogram", "From a request's head to its answer.", ("route",), _SECONDS),
    "stage_milliseconds": ServiceMetric("Histogram", "Where an inspection's time went.", ("stage",), _MILLISECONDS),
    "batch_images": ServiceMetric("Histogram", "Images scored together.", (), _IMAGES),
    "batch_categories": ServiceMetric("Histogram", "Models in a batch.", (), _IMAGES),
    "passes": ServiceMetric("Counter", "Passes through a backbone."),
    "load_seconds": ServiceMetric("Histogram", "Until a version was in memory.", _CATEGORY, _SECONDS),
    "models_dropped": ServiceMetric("Counter", "Versions put out of memory.", _CATEGORY),
    "models": ServiceMetric("Gauge", "Versions in memory."),
    "model_bytes": ServiceMetric("Gauge", "Their size."),
    "in_flight_requests": ServiceMetric("Gauge", "Requests under way."),
    "in_flight_bytes": ServiceMetric("Gauge", "The bodies of requests under way."),
    "images": ServiceMetric("Counter", "Images inspected.", (*_ROLE, "verdict")),
    "p_value": ServiceMetric("Histogram", "p-values of images.", _ROLE, _P_VALUES),
    "score_to_threshold": ServiceMetric("Histogram", "Score over threshold.", _ROLE, _SCORE_RATIOS),
    "shift_p_value": ServiceMetric(
        "Gauge",
        "Chance that the latest images of a version score so much higher, or lower, than those that set its threshold.",
        (*_VERSION, "direction"),
    ),
    "shadow_images": ServiceMetric("Counter", "Images scored in shadow.", (*_VERSION, "differs")),
    "retries": ServiceMetric("Counter", "Calls made again after a replica was lost."),
    "sink_images": ServiceMetric("Counter", "What became of images for the sink.", ("outcome",)),
}


class Measures:
    """The interface that records metrics. This base class ignores them; a subclass records them."""

    def record(self, name: str, value: float = 1, **tags: str) -> None:
        """Adds a value to a counter or histogram, or sets a gauge to it. This base class ignores the value.

        Args:
            name: key of `METRICS`.
            tags: name of a tag -> value, for all tags of the metric.
        """
