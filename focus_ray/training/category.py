"""Trains the network of all categories, or fits a category and writes its bundle, without Ray.

The functions run in a single process, or on every worker of a torch.distributed group. To fit a category means to train its
network (if train.steps is above 0 and train.scope is category), to fit the density of normal embeddings, and to calibrate the
thresholds.
"""

from __future__ import annotations

import functools
import io
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch

from focus_ray.bundle.bundle import write_bundle
from focus_ray.device import choose_device
from focus_ray.distributed import compute_on_rank0_and_broadcast, get_rank, get_world_size
from focus_ray.fitting.fit import fit
from focus_ray.fitting.plant import PlantNetwork, train_plant_network
from focus_ray.fitting.settings import Config
from focus_ray.fitting.shards import BlockReader, build_shard, read_blocks
from focus_ray.fitting.split import SplitRule
from focus_ray.fitting.state import IntervalCallback, Metrics, TrainState
from focus_ray.names import Log
from focus_ray.storage.files import file_exists, join_path, list_folder_entries, read_bytes, remove_file, write_bytes

STATE_FILE = "state.pt"
_MAX_DECODE_THREADS = 8  # unless the caller says otherwise


def make_cudnn_deterministic() -> None:
    """Makes cuDNN deterministic in this process, so that convolutions on a GPU give the same result at every run."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def get_bundle_uri(root: str, category: str) -> str:
    """Returns the URI of a category's bundle in the folder `root` of a run."""
    return join_path(root, "bundles", category)


def get_plant_network_uri(root: str) -> str:
    """Returns the URI of the network of all categories (train.scope=plant) in the folder `root` of a run."""
    return join_path(get_plant_checkpoint_folder(root), "network.safetensors")


def get_plant_checkpoint_folder(root: str) -> str:
    """Returns the folder of the checkpoints of the network of all categories in the folder `root` of a run."""
    return join_path(root, "network")


def get_checkpoint_folder(root: str, category: str) -> str:
    """Returns the folder of a category's checkpoints in the folder `root` of a run."""
    return join_path(root, "train", category)


def fit_category(
    config: Config,
    split: SplitRule,
    root: str,
    log: Log,
    *,
    on_interval_metrics: Callable[[Metrics], None] = lambda figures: None,
    device: torch.device | None = None,
    num_threads: int | None = None,
    block_reader: BlockReader | None = None,
    check_owned: Callable[[], None] = lambda: None,
) -> None:
    """Fits the model of a category, writes a checkpoint after each interval, and writes the bundle.

    Continues from the latest checkpoint, if there is one. Every worker of a torch.distributed group calls this function; only
    the worker of rank 0 writes and logs. A fit in one process and a fit with one worker give identical bundles. The function
    also makes cuDNN deterministic (`make_cudnn_deterministic`).

    Args:
        split: the rule that selects the category's images for fitting and for calibration.
        root: folder of the run, a local path or an s3:// URI.
        log: receives progress messages, which begin with the category.
        on_interval_metrics: receives name -> value of each interval, such as losses, and "step" -> number of finished steps;
            only on rank 0.
        device: device of this worker. None: a GPU of this machine if the configuration allows a GPU and there is one, otherwise
            the CPU.
        num_threads: threads that decode images; None: one for each CPU of this machine, up to 8.
        block_reader: reads images for the training that do not fit into RAM; None: this process reads them.
        check_owned: called before a checkpoint or the bundle is written; raises an error if another process owns the folder.

    Raises:
        The error of `check_owned`.
        DataError: images cannot be read or decoded, there are too few images, or a file cannot be written.
        WeightsError, ConfigError: pretrained weights or density.metric cannot be used.
        ValueError: too few images remain for the density, the calibration or the image alignment.
        FloatingPointError: the training diverged: a loss or a weight is not finite.
    """
    category, rank, num_workers = split.category, get_rank(), get_world_size()
    worker = _prepare_worker(config, device, num_threads)
    # the workers must agree: an earlier group may still write
    state = compute_on_rank0_and_broadcast(lambda: _load_latest_checkpoint(get_checkpoint_folder(root, category)))

    def log_on_rank0(message: str) -> None:
        if rank == 0:
            log(f"{category}: {message}")

    start = time.perf_counter()
    net, notes = None, None
    if config.train.trains_plant:
        network = load_plant_network(root)
        net, notes = network.build(config.model), network.notes
    log_on_rank0(f"reading {split.num_images} images")
    plan = split.build_plan(config)
    shard = build_shard(config, category, plan, rank, num_workers, worker.num_threads)
    load_s = time.perf_counter() - start
    result = fit(
        config,
        shard,
        len(plan.fit.rows),
        worker.device,
        net=net,
        notes=notes,
        rank=rank,
        state=state,
        on_interval=_make_interval_callback(get_checkpoint_folder(root, category), on_interval_metrics, check_owned),
        block_reader=block_reader or functools.partial(read_blocks, config, num_threads=worker.num_threads),
        log=log_on_rank0,
    )
    if rank > 0:
        return
    check_owned()
    write_bundle(
        get_bundle_uri(root, category),
        config=config,
        category=category,
        detector=result.detector,
        statistics=result.statistics,
        calibration=result.calibration,
        data={
            "uri": config.data.uri,
            "fingerprint": plan.fingerprint,
            "num_fit": result.statistics.num_images,
            "num_holdout": len(plan.holdout.rows),
        },
        metrics={
            **asdict(result.notes),
            "seconds": {"load": load_s, **result.seconds},
            "num_workers": num_workers,
            "device": torch.cuda.get_device_name(worker.device) if worker.device.type == "cuda" else "cpu",
        },
        fit_hashes=plan.fit_hashes,
    )


def train_network_of_plant(
    config: Config,
    splits: Sequence[SplitRule],
    root: str,
    log: Log,
    *,
    device: torch.device | None = None,
    num_threads: int | None = None,
    block_reader: BlockReader | None = None,
    check_owned: Callable[[], None] = lambda: None,
) -> None:
    """Trains one network for all categories, writes a checkpoint after each interval, and writes the network.

    Continues from the latest checkpoint, if there is one. Every worker of a torch.distributed group calls this function; only
    the worker of rank 0 writes and logs.

    Args:
        splits: the rule of each category that selects its images.
        log, device, num_threads, block_reader, check_owned: see `fit_category`.

    Raises: see `fit_category`.
    """
    rank, worker = get_rank(), _prepare_worker(config, device, num_threads)
    folder = get_plant_checkpoint_folder(root)
    state = compute_on_rank0_and_broadcast(lambda: _load_latest_checkpoint(folder))

    def log_on_rank0(message: str) -> None:
        if rank == 0:
            log(f"network of {len(splits)} categories: {message}")

    network = train_plant_network(
        config,
        splits,
        rank,
        worker.device,
        num_threads=worker.num_threads,
        state=state,
        on_interval=_make_interval_callback(folder, lambda figures: None, check_owned),
        block_reader=block_reader,
        log=log_on_rank0,
    )
    if rank == 0:
        check_owned()
        write_bytes(get_plant_network_uri(root), network.pack())


def load_plant_network(root: str) -> PlantNetwork:
    """Loads the network of all categories of a run. Raises: DataError or WeightsError: the file is missing or damaged."""
    uri = get_plant_network_uri(root)
    return PlantNetwork.unpack(read_bytes(uri), uri)


class _Worker(NamedTuple):
    """The resources of a worker. num_threads: threads that decode images."""

    device: torch.device
    num_threads: int


def _prepare_worker(config: Config, device: torch.device | None, num_threads: int | None) -> _Worker:
    """Makes cuDNN deterministic, and chooses device and number of threads if they are None, see `fit_category`."""
    make_cudnn_deterministic()
    device = device or torch.device(choose_device() if config.cluster.use_gpu else "cpu")
    return _Worker(device, num_threads or min(_MAX_DECODE_THREADS, os.cpu_count() or 1))


def _make_interval_callback(
    folder: str, on_interval_metrics: Callable[[Metrics], None], check_owned: Callable[[], None]
) -> IntervalCallback:
    """Returns a callback that sends the metrics of an interval and writes a checkpoint, on rank 0 only.

    Args:
        folder: folder of the checkpoints.
        on_interval_metrics, check_owned: see `fit_category`.
    """

    def on_interval(step: int, figures: Metrics, snapshot: Callable[[], TrainState]) -> None:
        if get_rank() > 0:
            return
        on_interval_metrics(figures)
        check_owned()
        _write_checkpoint(folder, step, snapshot())

    return on_interval


def _write_checkpoint(folder: str, step: int, state: TrainState) -> None:
    """Writes the training state after an interval as a checkpoint, then deletes all other checkpoints in the folder.

    Args: folder: folder of the checkpoints.

    Raises: DataError: a file cannot be written or deleted.
    """
    content = io.BytesIO()
    torch.save(state.to_dict(), content)
    name = f"checkpoint_{step:06}"
    write_bytes(join_path(folder, name, STATE_FILE), content.getvalue())
    for old_name in list_checkpoints(folder):
        if old_name != name:
            remove_file(join_path(folder, old_name, STATE_FILE))


def list_checkpoints(folder: str) -> list[str]:
    """Returns the names of the checkpoints in a folder, the latest last, even if they are incomplete."""
    return sorted(name for name in list_folder_entries(folder) if name.startswith("checkpoint_"))


def _load_latest_checkpoint(folder: str) -> TrainState | None:
    """Loads the training state from the latest checkpoint in a folder; returns None if there is no complete checkpoint.

    Raises: DataError: the storage cannot be read.
    """
    for name in reversed(list_checkpoints(folder)):
        file = join_path(folder, name, STATE_FILE)
        if file_exists(file):
            state_dict = torch.load(io.BytesIO(read_bytes(file)), map_location="cpu", weights_only=True)
            return TrainState.from_dict(state_dict)
    return None
