"""Runs a function on the workers of a Ray Train trainer, which form a torch.distributed group."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from focus_ray.cluster.connect import resources_per_worker
from focus_ray.fitting.settings import Config
from focus_ray.fitting.shards import fits_memory
from focus_ray.fitting.split import Split
from focus_ray.storage.files import is_s3, join, open_filesystem, remove_folder
from focus_ray.training.category import set_reproducible
from focus_ray.training.streams import stream_training_images


@dataclass(frozen=True)
class TrainerJob:
    """The work of a trainer of one category. It is sent to the workers."""

    config: Config
    split: Split
    use_gpu: bool

    @property
    def category(self) -> str:
        """Name of the category."""
        return self.split.category


J = TypeVar("J", bound=TrainerJob)


def run_trainer(worker: Callable[[J, torch.device], Any], job: J, scratch: str, name: str) -> Any:
    """Runs a function on every worker of a new trainer and returns the result of rank 0.

    After the loss of a worker, Ray Train restarts all workers, or fewer if the configuration allows this.

    Args:
        worker: function that every worker calls with the job and its device.
        scratch: folder for files of Ray Train, which are removed at the end. All nodes must share it.
        name: name of the trainer, unique in `scratch`.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    from focus_ray.cluster.ray_private import patch_ray_train

    patch_ray_train()
    config = job.config
    cluster = config.cluster
    datasets = {}
    if config.train.epochs and not fits_memory(config, job.split):
        datasets["train"] = stream_training_images(config, job.split)
    filesystem, path = open_filesystem(scratch)
    trainer = TorchTrainer(
        _run_worker,
        train_loop_config={"worker": worker, "job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers
            if cluster.min_workers is None
            else (cluster.min_workers, cluster.num_workers),
            use_gpu=job.use_gpu,
            resources_per_worker=resources_per_worker(cluster, job.use_gpu),
            label_selector=dict(cluster.labels) or None,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem if is_s3(scratch) else None,
            failure_config=ray.train.FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=cluster.max_failures
            ),
        ),
        datasets=datasets,
        dataset_config=ray.train.DataConfig(datasets_to_split=["train"]),
    )
    try:
        return trainer.fit().return_value
    finally:
        remove_folder(join(scratch, name))


def _run_worker(loop_config: dict[str, Any]) -> Any:
    """Runs the job on a worker. Ray Train can pass a mapping only."""
    import ray.train.torch

    logging.getLogger("ray.train").setLevel(logging.WARNING)  # otherwise it logs every report
    set_reproducible()
    return loop_config["worker"](loop_config["job"], ray.train.torch.get_device())
