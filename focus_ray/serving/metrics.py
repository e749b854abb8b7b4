"""Exports the metrics of the service to Prometheus through Ray, which adds the prefix `ray_` to every name."""

from __future__ import annotations

from typing import Any

from ray.util import metrics

from focus_ray.serving.metrics import METRICS, Measures

_REPORT_METHODS = {"Counter": "inc", "Gauge": "set", "Histogram": "observe"}


class RayMeasures(Measures):
    """Records the metrics of `METRICS` with Ray. Each process that records metrics must create its own object."""

    def __init__(self) -> None:
        self._report_functions: dict[str, Any] = {}
        for name, metric in METRICS.items():
            options = {"boundaries": list(metric.buckets)} if metric.kind == "Histogram" else {}
            ray_metric = getattr(metrics, metric.kind)(
                f"focus_ray_{name}", metric.description, tag_keys=metric.tags, **options
            )
            self._report_functions[name] = getattr(ray_metric, _REPORT_METHODS[metric.kind])

    def record(self, name: str, value: float = 1, **tags: str) -> None:
        """Records a value with Ray: adds it to a counter or histogram, or sets a gauge to it (see `Measures.record`)."""
        self._report_functions[name](value, tags)
