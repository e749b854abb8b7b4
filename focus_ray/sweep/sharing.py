"""What no trial changes, made once, on the whole cluster, before trials fill it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from focus_ray.cluster.connect import resources_per_worker
from focus_ray.cluster.failures import reason_of
from focus_ray.config import Config
from focus_ray.data.shards import fits_memory
from focus_ray.data.split import Split
from focus_ray.errors import DataError
from focus_ray.names import Log
from focus_ray.sweep.settings import Point, SweepConfig, grid_points, value_of
from focus_ray.sweep.shared import features_key, num_bytes_of_features, num_bytes_of_images
from focus_ray.sweep.worker import embed_task, load_task


class SharedWork:
    """References to what was made, in Ray's object stores, for as long as this lives.

    images: (category, size) -> `CategoryImages`.  features: `features_key` -> `Features`.
    """

    def __init__(
        self,
        config: SweepConfig,
        base: Config,
        splits: Mapping[str, Split],
        use_gpu: bool,
        stopping: threading.Event,
        log: Log,
    ) -> None:
        self.config, self.base, self.splits, self.use_gpu = config, base, splits, use_gpu
        self.stopping, self.log = stopping, log
        self.images: dict[tuple[str, int], Any] = {}
        self.features: dict[str, Any] = {}

    def clear(self) -> None:
        """Lets the stores free it."""
        self.images.clear()
        self.features.clear()

    def make(self) -> None:
        """Makes what no trial changes, once, on the whole cluster, before trials fill it."""
        import ray

        if not self.config.share_work:
            self.log("shared work: none (share_work=false)")
            return
        budget = self._budget()
        ends: dict[Any, Any] = {}  # of each piece of work: a small result that is there once it is
        sizes = self._values("model.image_size_px")
        planned = {(category, size) for category in self.splits for size in sizes}
        for category, size in sorted(planned):
            config = self._sized(size)
            if not fits_memory(config, self.splits[category]):
                self.log(f"shared work: {category} is over data.memory_budget_mb: every trial streams it")
                continue
            needed = num_bytes_of_images(config, self.splits[category], self.config.objective, size)
            if needed > budget:
                self.log(_too_large(f"decoded images of {category} at {size} px", needed, budget))
                continue
            budget -= needed
            task = ray.remote(num_returns=2, **self._asked(gpu=False))(load_task)
            self.images[category, size], ends[category, size] = task.remote(
                self.reference(), self.splits[category], self.config.objective, size
            )
            self.log(f"shared work: decoding {category} at {size} px, {needed / 2**20:.0f} MiB")
        for key, (config, category) in self._shareable().items():
            size = config.model.image_size_px
            if (category, size) not in self.images:
                continue
            needed = num_bytes_of_features(config, self.splits[category], self.config.objective)
            if needed > budget:
                self.log(_too_large(f"features of {category}", needed, budget))
                continue
            budget -= needed
            embed = ray.remote(num_returns=2, **self._asked(self.use_gpu))(embed_task)
            self.features[key], ends[key] = embed.remote(config, self.images[category, size])
            self.log(f"shared work: features of {category}, {needed / 2**20:.0f} MiB")
        self._await(ends)

    def _asked(self, gpu: bool) -> dict[str, Any]:
        """What a task that does a worker's work asks of Ray."""
        worker = resources_per_worker(self.base.cluster, gpu)
        return {
            "num_cpus": worker["CPU"],
            "num_gpus": worker.get("GPU", 0.0),
            "memory": worker.get("memory"),
            "label_selector": dict(self.base.cluster.labels) or None,
        }

    def _budget(self) -> float:
        import ray

        if self.config.shared_budget_mb is not None:
            return self.config.shared_budget_mb * 2**20
        return float(ray.cluster_resources().get("object_store_memory", 0.0)) / 2

    def _values(self, key: str) -> list[Any]:
        """All values that a key takes over the trials; of a range, those of its samples."""
        domain = self.config.space.get(key)
        if domain is not None:
            return list(domain.samples())
        return [value_of(self.base, key)]

    def _sized(self, size: int) -> Config:
        return self.base.model_copy(update={"model": self.base.model.model_copy(update={"image_size_px": size})})

    def reference(self) -> Config:
        """The base at the largest size of all trials: synthetic defects are drawn there, the same for every size."""
        return self._sized(max(self._values("model.image_size_px")))

    def _shareable(self) -> dict[str, tuple[Config, str]]:
        """Keys of the features that several trials will ask for, with a configuration that leads to each."""
        ahead = {key: domain for key, domain in self.config.space.items() if _comes_before_features(key)}
        if any(domain.choice is None for domain in ahead.values()):
            self.log("shared work: no features, since trials draw from a range before them")
            return {}
        points: list[Point] = [{}]
        if ahead:
            points = grid_points(self.config.model_copy(update={"space": ahead}))
        if len(points) * 2 > self.config.planned_trials:
            self.log(
                f"shared work: no features, since {len(points)} kinds would serve {self.config.planned_trials} trials"
            )
            return {}
        found: dict[str, tuple[Config, str]] = {}
        for point in points:
            config = self.config.base_config(point)
            for category in self.splits:
                key = features_key(config, category)
                if key is not None:
                    found[key] = (config, category)
        return found

    def _await(self, ends: Mapping[Any, Any]) -> None:
        """Waits until all is made. Raises: DataError: there are no images. Without features trials make their own."""
        import ray

        waiting = {end: key for key, end in ends.items()}
        while waiting and not self.stopping.is_set():
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=0.5)
            for end in done:
                key = waiting.pop(end)
                try:
                    ray.get(end)
                except Exception as error:
                    if key not in self.features:
                        raise DataError(f"{key[0]}: cannot make the images to judge on: {reason_of(error)}") from None
                    self.log(f"shared work: features failed ({reason_of(error)}): every trial makes its own")
                    del self.features[key]
        for end in waiting:
            ray.cancel(end, force=True)


def _comes_before_features(key: str) -> bool:
    return key.startswith("model.") or key in ("train.seed", "train.batch_size_per_worker", "train.epochs")


def _too_large(what: str, needed: float, budget: float) -> str:
    return (
        f"shared work: {what} take {needed / 2**20:.0f} MiB, {max(budget, 0.0) / 2**20:.0f} MiB are left of the budget "
        "(shared_budget_mb): every trial makes its own"
    )
