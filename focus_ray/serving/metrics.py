"""The metrics of the service, and their export to Prometheus through Ray, which adds the prefix `ray_` to every name."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_MILLISECONDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)
# p-values of normal images are uniform: from 0.1 on, each bucket contains a tenth of the images
_P_VALUES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_SCORE_RATIOS = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)  # score / threshold
_CATEGORY = ("team", "category")
_VERSION = (*_CATEGORY, "version")
_ROLE = (*_VERSION, "role")


class MetricDefinition(NamedTuple):
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
    "requests": MetricDefinition("Counter", "Requests answered.", ("route", "method", "status")),
    "request_seconds": MetricDefinition("Histogram", "From a request's head to its answer.", ("route",), _SECONDS),
    "stage_milliseconds": MetricDefinition("Histogram", "Where an inspection's time went.", ("stage",), _MILLISECONDS),
    "batch_images": MetricDefinition("Histogram", "Images scored together.", (), _IMAGES),
    "batch_categories": MetricDefinition("Histogram", "Models in a batch.", (), _IMAGES),
    "passes": MetricDefinition("Counter", "Passes through a backbone."),
    "load_seconds": MetricDefinition("Histogram", "Until a version was in memory.", _CATEGORY, _SECONDS),
    "models_dropped": MetricDefinition("Counter", "Versions put out of memory.", _CATEGORY),
    "models": MetricDefinition("Gauge", "Versions in memory."),
    "model_bytes": MetricDefinition("Gauge", "Their size."),
    "in_flight_requests": MetricDefinition("Gauge", "Requests under way."),
    "in_flight_bytes": MetricDefinition("Gauge", "The bodies of requests under way."),
    "images": MetricDefinition("Counter", "Images inspected.", (*_ROLE, "verdict")),
    "p_value": MetricDefinition("Histogram", "p-values of images.", _ROLE, _P_VALUES),
    "score_to_threshold": MetricDefinition("Histogram", "Score over threshold.", _ROLE, _SCORE_RATIOS),
    "shift_p_value": MetricDefinition(
        "Gauge",
        "Chance that the latest images of a version score so much higher, or lower, than those that set its threshold.",
        (*_VERSION, "direction"),
    ),
    "shadow_images": MetricDefinition("Counter", "Images scored in shadow.", (*_VERSION, "differs")),
    "retries": MetricDefinition("Counter", "Calls made again after a replica was lost."),
    "sink_images": MetricDefinition("Counter", "What became of images for the sink.", ("outcome",)),
}


class MetricsRecorder:
    """The interface that records metrics. This base class ignores them; a subclass records them."""

    def record(self, name: str, value: float = 1, **tags: str) -> None:
        """Adds a value to a counter or histogram, or sets a gauge to it. This base class ignores the value.

        Args:
            name: key of `METRICS`.
            tags: name of a tag -> value, for all tags of the metric.
        """


class RayMetricsRecorder(MetricsRecorder):
    """Records the metrics of `METRICS` with Ray. Each process that records metrics must create its own object."""

    def __init__(self) -> None:
        from ray.util import metrics  # late, because most users of this module need no Ray

        self._ray_metrics: dict[str, Any] = {}
        for name, metric in METRICS.items():
            options = {"boundaries": list(metric.buckets)} if metric.kind == "Histogram" else {}
            create_metric = getattr(metrics, metric.kind)
            self._ray_metrics[name] = create_metric(
                f"focus_ray_{name}", metric.description, tag_keys=metric.tags, **options
            )

    def record(self, name: str, value: float = 1, **tags: str) -> None:
        """Adds a value to a counter or histogram of Ray, or sets a gauge of Ray to it."""
        method = {"Counter": "inc", "Gauge": "set", "Histogram": "observe"}[METRICS[name].kind]
        getattr(self._ray_metrics[name], method)(value, tags)
