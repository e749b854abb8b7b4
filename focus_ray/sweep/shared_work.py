"""Computes the inputs that no trial changes, once for all trials and on the whole cluster, before the trials start."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from focus_ray.cluster.failures import reason_of
from focus_ray.cluster.pool import options_per_worker
from focus_ray.errors import DataError
from focus_ray.fitting.settings import Config
from focus_ray.fitting.shards import fits_memory
from focus_ray.fitting.split import Split
from focus_ray.names import Log
from focus_ray.sweep.settings import Point, SweepConfig, get_setting, grid_points
from focus_ray.sweep.trial_inputs import feature_bytes, features_key, image_bytes
from focus_ray.sweep.worker import embed_task, load_task


class SharedWork:
    """References to shared inputs in Ray's object stores. Ray frees the inputs when the references are cleared.

    Attributes:
        images: (category, image size) -> reference to `CategoryImages`.
        features: `features_key` -> reference to `FrozenFeatures`.
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
        """Drops all references, so that Ray can free the memory."""
        self.images.clear()
        self.features.clear()

    def compute(self) -> None:
        """Decodes images and computes features in Ray tasks, as far as the memory budget allows, and waits for the tasks.

        Raises:
            DataError: Images cannot be read.
        """
        import ray

        if not self.config.share_work:
            self.log("shared work: none (share_work=false)")
            return
        budget = self._budget_bytes()
        end_markers: dict[Any, Any] = {}  # small second result of each task: it tells when the task has ended
        sizes = self._values_of_setting("model.image_size_px")
        planned = {(category, size) for category in self.splits for size in sizes}
        for category, size in sorted(planned):
            config = self._base_at_size(size)
            if not fits_memory(config, self.splits[category]):
                self.log(f"shared work: {category} is over data.memory_budget_mb: every trial streams it")
                continue
            num_bytes = image_bytes(config, self.splits[category], self.config.objective, size)
            if num_bytes > budget:
                self.log(_too_large_message(f"decoded images of {category} at {size} px", num_bytes, budget))
                continue
            budget -= num_bytes
            task = ray.remote(num_returns=2, **options_per_worker(self.base.cluster, use_gpu=False))(load_task)
            self.images[category, size], end_markers[category, size] = task.remote(
                self.reference_config(), self.splits[category], self.config.objective, size
            )
            self.log(f"shared work: decoding {category} at {size} px, {num_bytes / 2**20:.0f} MiB")
        for key, (config, category) in self._shareable_features().items():
            size = config.model.image_size_px
            if (category, size) not in self.images:
                continue
            num_bytes = feature_bytes(config, self.splits[category], self.config.objective)
            if num_bytes > budget:
                self.log(_too_large_message(f"features of {category}", num_bytes, budget))
                continue
            budget -= num_bytes
            embed = ray.remote(num_returns=2, **options_per_worker(self.base.cluster, self.use_gpu))(embed_task)
            self.features[key], end_markers[key] = embed.remote(config, self.images[category, size])
            self.log(f"shared work: features of {category}, {num_bytes / 2**20:.0f} MiB")
        self._wait_for_tasks(end_markers)

    def _budget_bytes(self) -> float:
        """Returns the number of bytes that shared inputs may take."""
        import ray

        if self.config.shared_budget_mb is not None:
            return self.config.shared_budget_mb * 2**20
        return float(ray.cluster_resources().get("object_store_memory", 0.0)) / 2

    def _values_of_setting(self, key: str) -> list[Any]:
        """Returns the values that trials may give to a setting: `Domain.samples` of a searched setting, or the base value."""
        domain = self.config.space.get(key)
        if domain is not None:
            return list(domain.samples())
        return [get_setting(self.base, key)]

    def _base_at_size(self, size: int) -> Config:
        """Returns the base configuration with another image size."""
        return self.base.model_copy(update={"model": self.base.model.model_copy(update={"image_size_px": size})})

    def reference_config(self) -> Config:
        """Returns the base configuration at the largest image size of all trials. Synthetic defects are drawn at this size."""
        return self._base_at_size(max(self._values_of_setting("model.image_size_px")))

    def _shareable_features(self) -> dict[str, tuple[Config, str]]:
        """Returns `features_key` -> (configuration, category) for each set of features that trials can share.

        Returns an empty dict if trials would need too many different sets to save work.
        """
        network_space = {key: domain for key, domain in self.config.space.items() if _changes_features(key)}
        if any(domain.choice is None for domain in network_space.values()):
            self.log("shared work: no features, because trials draw settings of the network from a range")
            return {}
        points: list[Point] = [{}]
        if network_space:
            points = grid_points(self.config.model_copy(update={"space": network_space}))
        if len(points) * 2 > self.config.planned_trials:
            self.log(
                f"shared work: no features, because {self.config.planned_trials} trials need {len(points)} different sets"
            )
            return {}
        shareable: dict[str, tuple[Config, str]] = {}
        for point in points:
            config = self.config.config_at(point)
            for category in self.splits:
                key = features_key(config, category)
                if key is not None:
                    shareable[key] = (config, category)
        return shareable

    def _wait_for_tasks(self, end_markers: Mapping[Any, Any]) -> None:
        """Waits for all tasks. If a task for features fails, every trial computes its own features.

        Raises:
            DataError: Images cannot be read.
        """
        import ray

        pending = {marker: key for key, marker in end_markers.items()}
        while pending and not self.stopping.is_set():
            ended, _ = ray.wait(list(pending), num_returns=1, timeout=0.5)
            for marker in ended:
                key = pending.pop(marker)
                try:
                    ray.get(marker)
                except Exception as error:
                    if key not in self.features:
                        raise DataError(
                            f"{key[0]}: the images for judging cannot be made: {reason_of(error)}"
                        ) from None
                    self.log(f"shared work: features failed ({reason_of(error)}): every trial computes its own")
                    del self.features[key]
        for marker in pending:
            ray.cancel(marker, force=True)


def _changes_features(key: str) -> bool:
    """Returns True if a setting can change the features: by the network, its inputs or its training."""
    return key.startswith("model.") or key in ("train.seed", "train.batch_size_per_worker", "train.epochs")


def _too_large_message(inputs: str, num_bytes: float, budget: float) -> str:
    """Returns a message: the shared inputs do not fit into the memory budget."""
    return (
        f"shared work: {inputs} take {num_bytes / 2**20:.0f} MiB, {max(budget, 0.0) / 2**20:.0f} MiB of the budget are free "
        "(shared_budget_mb): every trial computes its own"
    )
