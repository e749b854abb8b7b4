"""Runs a function on the workers of a Ray Train trainer, which form a torch.distributed group."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from focus_ray.cluster.capacity import compute_worker_resources
from focus_ray.cluster.settings import MAX_FAILURES
from focus_ray.fitting.settings import Config
from focus_ray.storage.files import is_s3_uri, join_path, open_filesystem, remove_folder
from focus_ray.training.category import make_cudnn_deterministic


@dataclass(frozen=True)
class TrainerJob:
    """The task of a trainer, which is sent to every worker of the trainer.

    Attributes:
        use_gpu: whether each worker gets a GPU.
    """

    config: Config
    use_gpu: bool


J = TypeVar("J", bound=TrainerJob)


def run_on_train_workers(worker: Callable[[J, torch.device], Any], job: J, scratch: str, name: str) -> Any:
    """Runs a function on every worker of a new Ray Train trainer and returns the function's result of rank 0.

    The workers wait until the cluster has room for them. After an error or the loss of a worker, Ray Train starts all workers
    again, up to MAX_FAILURES times without preemptions; it starts fewer workers if cluster.min_workers allows this. At the end,
    also after an error, the folder <scratch>/<name> is deleted.

    Args:
        worker: function that every worker calls with the job and its device. It must be able to run again after a restart.
        scratch: folder for files of Ray Train. All nodes must share it.
        name: name of the trainer, unique in `scratch`.

    Raises: the error of Ray Train after more than MAX_FAILURES failures.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    from focus_ray.cluster.ray_private import patch_ray_train_retries

    patch_ray_train_retries()
    cluster = job.config.cluster
    filesystem, path = open_filesystem(scratch)
    trainer = TorchTrainer(
        _call_worker_function,
        train_loop_config={"worker": worker, "job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers
            if cluster.min_workers is None
            else (cluster.min_workers, cluster.num_workers),
            use_gpu=job.use_gpu,
            resources_per_worker=compute_worker_resources(cluster, job.use_gpu),
            label_selector=dict(cluster.labels) or None,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem if is_s3_uri(scratch) else None,
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=MAX_FAILURES),
        ),
    )
    try:
        return trainer.fit().return_value
    finally:
        remove_folder(join_path(scratch, name))


def _call_worker_function(loop_config: dict[str, Any]) -> Any:
    """Calls the worker function with the job and the device of this worker, and returns its result.

    Args: loop_config: "worker" -> the function, "job" -> the job, because Ray Train passes a single mapping.
    """
    import ray.train.torch

    logging.getLogger("ray.train").setLevel(logging.WARNING)  # otherwise it logs every report
    make_cudnn_deterministic()
    return loop_config["worker"](loop_config["job"], ray.train.torch.get_device())
