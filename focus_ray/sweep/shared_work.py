"""Decodes images and computes features once for all trials of a sweep, on the whole cluster, before the trials start.

Only inputs that are the same for all trials are shared. Features are outputs of the untrained network.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from focus_ray.cluster.capacity import make_worker_options
from focus_ray.cluster.failures import describe_root_cause
from focus_ray.errors import DataError
from focus_ray.fitting.settings import Config
from focus_ray.fitting.shards import fits_in_memory
from focus_ray.fitting.split import SplitRule
from focus_ray.names import Log
from focus_ray.sweep.settings import SweepConfig, list_grid_points
from focus_ray.sweep.trial_inputs import compute_feature_bytes, compute_image_bytes, make_features_key
from focus_ray.sweep.worker import compute_features_task, load_images_task

_NOTICE_INTERVAL_S = 60.0


@dataclass(frozen=True)
class SharedTrialInputs:
    """References to images and features that all trials share, in Ray's object stores.

    Ray frees the images and features when the references are cleared.

    Attributes:
        images: (category, image size) -> reference to `CategoryImages`.
        features: `make_features_key` -> reference to `FrozenFeatures`.
    """

    images: dict[tuple[str, int], Any] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)


def compute_shared_inputs(
    sweep: SweepConfig, splits: Mapping[str, SplitRule], use_gpu: bool, stopping: threading.Event, log: Log
) -> SharedTrialInputs:
    """Decodes images and computes features for all trials in Ray tasks, as far as the memory budget allows. Waits for the tasks.

    Args:
        sweep: Configuration of the sweep.
        splits: Category -> split of its images.
        use_gpu: True if features are computed on GPUs.
        stopping: When it is set, the tasks are ended.
        log: Called with a message about each shared input.

    Raises:
        DataError: Images cannot be read.
    """
    import ray

    shared = SharedTrialInputs()
    if not sweep.share_work:
        log("shared work: none (share_work=false)")
        return shared
    budget = float(ray.cluster_resources().get("object_store_memory", 0.0)) / 2
    if sweep.shared_budget_mb is not None:
        budget = sweep.shared_budget_mb * 2**20
    end_markers: dict[Any, Any] = {}  # small second result of each task: it tells when the task has ended

    def reserve_budget(inputs: str, num_bytes: float) -> bool:
        """Returns whether inputs fit into the remaining budget, logs the decision, and reduces the budget if they fit."""
        nonlocal budget
        fits = num_bytes <= budget
        action = (
            "computing"
            if fits
            else f"{budget / 2**20:.0f} MiB of shared_budget_mb are free: every trial computes its own"
        )
        log(f"shared work: {inputs} take {num_bytes / 2**20:.0f} MiB, {action}")
        budget -= num_bytes if fits else 0
        return fits

    load = ray.remote(num_returns=2, **make_worker_options(sweep.make_trial_config().cluster, use_gpu=False))(
        load_images_task
    )
    embed = ray.remote(num_returns=2, **make_worker_options(sweep.make_trial_config().cluster, use_gpu))(
        compute_features_task
    )
    for category, split in sorted(splits.items()):
        for size_px in sorted(set(sweep.list_setting_values("model.image_size_px"))):
            if not fits_in_memory(sweep.make_trial_config({"model.image_size_px": size_px}), split):
                log(f"shared work: {category} is over data.memory_budget_mb: every trial streams it")
            elif reserve_budget(
                f"images of {category} at {size_px} px",
                compute_image_bytes(sweep.make_trial_config(), split, sweep.objective, size_px),
            ):
                key = (category, size_px)
                shared.images[key], end_markers[key] = load.remote(
                    sweep.largest_image_config, split, sweep.objective, size_px
                )
    for features, (config, category) in _find_shareable_features(sweep, splits, log).items():
        images = shared.images.get((category, config.model.image_size_px))
        num_bytes = compute_feature_bytes(config, splits[category], sweep.objective)
        if images is not None and reserve_budget(f"features of {category}", num_bytes):
            shared.features[features], end_markers[features] = embed.remote(config, images)
    _wait_for_tasks(shared, end_markers, stopping, log)
    return shared


def _find_shareable_features(
    sweep: SweepConfig, categories: Mapping[str, Any], log: Log
) -> dict[str, tuple[Config, str]]:
    """Returns the sets of features that trials can share: `make_features_key` -> (configuration, category) to compute them.

    Args:
        sweep: Configuration of the sweep.
        categories: Its keys are the categories.
        log: Called with a message if no features are shared.

    Returns: an empty dict if trials would need too many different sets to save work.
    """
    network_space = {key: domain for key, domain in sweep.space.items() if _affects_shared_features(key)}
    if any(domain.choice is None for domain in network_space.values()):
        log("shared work: no features, because trials draw settings of the network from a range")
        return {}
    points = list_grid_points(sweep.model_copy(update={"space": network_space}))  # one empty point for an empty space
    if len(points) * 2 > sweep.num_planned_trials:
        log(f"shared work: no features, because {sweep.num_planned_trials} trials need {len(points)} different sets")
        return {}
    configs = [(sweep.make_trial_config(point), category) for point in points for category in categories]
    keys = [make_features_key(config, category) for config, category in configs]
    return {key: pair for key, pair in zip(keys, configs, strict=True) if key is not None}


def _affects_shared_features(key: str) -> bool:
    """Returns whether trials with different values of a setting need different features.

    This holds for all settings of `model`, and for train.seed and train.steps. Other settings of `train` do not
    count, because a trial that trains shares no features.

    Args: key: Dotted key of the setting.
    """
    return key.startswith("model.") or key in ("train.seed", "train.steps")


def _wait_for_tasks(
    shared: SharedTrialInputs, end_markers: Mapping[Any, Any], stopping: threading.Event, log: Log
) -> None:
    """Waits for all tasks that compute shared inputs, or cancels the tasks if `stopping` is set.

    If a task for features fails, every trial computes its own features.

    Args:
        shared: References to the results; features of a failed task are deleted from it.
        end_markers: Key in `shared` -> reference that is ready when the task ends.
        stopping: When it is set, the tasks are ended.
        log: Called with messages.

    Raises:
        DataError: Images cannot be read.
    """
    import ray

    pending = {marker: key for key, marker in end_markers.items()}
    noticed_at = time.monotonic()
    while pending and not stopping.is_set():
        ended, _ = ray.wait(list(pending), num_returns=1, timeout=0.5)
        if time.monotonic() - noticed_at >= _NOTICE_INTERVAL_S:
            log(f"shared work: waiting for {len(pending)} of {len(end_markers)} tasks, which run or wait for resources")
            noticed_at = time.monotonic()
        for marker in ended:
            key = pending.pop(marker)
            try:
                ray.get(marker)
            except Exception as error:
                if key not in shared.features:
                    raise DataError(
                        f"{key[0]}: the images for judging cannot be made: {describe_root_cause(error)}"
                    ) from None
                log(f"shared work: features failed ({describe_root_cause(error)}): every trial computes its own")
                del shared.features[key]
    for marker in pending:
        ray.cancel(marker, force=True)
