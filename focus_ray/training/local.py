"""Trains a category and writes its bundle, in a single process or as a worker of a torch.distributed group. No Ray."""

from __future__ import annotations

import functools
import io
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from focus_ray.bundle.bundle import write_bundle
from focus_ray.fitting.fit import fit
from focus_ray.fitting.settings import Config
from focus_ray.fitting.shards import BatchStream, build_shard, local_stream
from focus_ray.fitting.split import Split
from focus_ray.fitting.state import Figures, OnEpoch, TrainState
from focus_ray.storage.files import exists, join, list_names, read_bytes, remove_file, write_bytes
from focus_ray.tracking.runs import TrainingRecorder

STATE_FILE = "state.pt"
_MAX_DECODE_THREADS = 8  # of a training in this process


def set_reproducible() -> None:
    """Makes cuDNN deterministic, so that training on a GPU gives the same result at every run."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def bundle_uri(root: str, category: str) -> str:
    """Returns the URI of a category's bundle in the folder `root` of a run."""
    return join(root, "bundles", category)


def _discard_message(message: str) -> None:
    pass


def make_bundle(
    config: Config,
    split: Split,
    root: str,
    device: torch.device,
    *,
    rank: int = 0,
    num_workers: int = 1,
    stream: BatchStream | None = None,
    num_threads: int = 1,
    state: TrainState | None = None,
    on_epoch: OnEpoch | None = None,
    log: Callable[[str], None] = _discard_message,
) -> int:
    """Fits a category and writes <root>/bundles/<category>. Every worker of a group calls it; the worker of rank 0 writes.

    Args:
        split: the category's images for fitting and calibration.
        root: folder of the run, a local path or an s3:// URI.
        stream: source of training batches if the worker's share of the images does not fit into memory; None: the worker
            reads the rows itself.
        num_threads: threads that decode images.
        state, on_epoch: see `fitting.fit.fit`.
        log: receives progress messages on rank 0.

    Returns: number of images in the density.
    """
    category = split.category
    start = time.perf_counter()
    if rank > 0:
        log = _discard_message
    log(f"reading {split.num_images} images")
    plan = split.plan(config)
    stream = stream or local_stream(config, category, plan, num_threads)
    shard = build_shard(config, category, plan, rank, num_workers, stream, num_threads)
    load_s = time.perf_counter() - start
    result = fit(
        config,
        shard,
        len(plan.fit_rows),
        device,
        rank=rank,
        state=state,
        on_epoch=on_epoch,
        log=log,
    )
    count = result.statistics.num_images
    if rank == 0:
        write_bundle(
            bundle_uri(root, category),
            config=config,
            category=category,
            detector=result.detector,
            statistics=result.statistics,
            calibration=result.calibration,
            data={
                "uri": config.data.uri,
                "fingerprint": plan.fingerprint,
                "num_fit": count,
                "num_holdout": len(plan.holdout_rows),
            },
            metrics={
                **asdict(result.notes),
                "seconds": {"load": load_s, **result.seconds},
                "num_workers": num_workers,
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            },
            fit_hashes=plan.fit_hashes,
        )
    return count


def train_locally(
    config: Config,
    splits: Sequence[Split],
    root: str,
    log: Callable[[str], None],
    raise_at_once: bool = False,
    recorder: TrainingRecorder | None = None,
) -> dict[str, str]:
    """Trains categories one after the other in this process. A single cluster worker writes identical bundles.

    Args:
        splits: the images of each category.
        root: folder of the run.
        log: receives progress messages.
        raise_at_once: raise a category's error immediately instead of continuing with the next category.
        recorder: receives the figures of every epoch, and the result or failure of every category.

    Returns: category -> error message, for each category that failed.
    """
    set_reproducible()
    device = torch.device("cuda" if config.cluster.use_gpu and torch.cuda.is_available() else "cpu")
    failed: dict[str, str] = {}
    for number, split in enumerate(splits, start=1):
        category, start = split.category, time.monotonic()
        log(f"{category}: training in this process, category {number} of {len(splits)}")
        log_category = functools.partial(_log_with_prefix, log, category)
        try:
            _train_category(config, split, root, device, log_category, recorder)
        except Exception as error:  # a failed category must not stop the next ones; it is reported at the end
            if raise_at_once:
                raise
            failed[category] = f"{type(error).__name__}: {error}"
            log(f"{category}: FAILED: {failed[category]}")
            if recorder is not None:
                recorder.fail_category(category, failed[category])
        else:
            log(f"{category}: done in {time.monotonic() - start:.0f} s, {bundle_uri(root, category)}")
            if recorder is not None:
                recorder.finish_category(category, bundle_uri(root, category))
    return failed


def _log_with_prefix(log: Callable[[str], None], category: str, message: str) -> None:
    """Logs a message that begins with the name of the category."""
    log(f"{category}: {message}")


def _train_category(
    config: Config,
    split: Split,
    root: str,
    device: torch.device,
    log: Callable[[str], None],
    recorder: TrainingRecorder | None,
) -> None:
    """Trains a category from its latest checkpoint, if there is one, and writes checkpoints to <root>/train/<category>."""
    folder = join(root, "train", split.category)

    def on_epoch(epoch: int, figures: Figures, snapshot: Callable[[], TrainState]) -> None:
        if recorder is not None:
            recorder.log_epoch(split.category, figures)
        content = io.BytesIO()
        torch.save(snapshot().to_dict(), content)
        name = f"checkpoint_{epoch:06}"
        write_bytes(join(folder, name, STATE_FILE), content.getvalue())
        # older checkpoints go only after the new one is complete
        for old_name in list_names(folder):
            if old_name.startswith("checkpoint_") and old_name != name:
                remove_file(join(folder, old_name, STATE_FILE))

    state = _load_latest_state(folder, device)
    num_threads = min(_MAX_DECODE_THREADS, os.cpu_count() or 1)
    make_bundle(config, split, root, device, num_threads=num_threads, state=state, on_epoch=on_epoch, log=log)


def _load_latest_state(folder: str, device: torch.device) -> TrainState | None:
    """Loads the training state of the latest checkpoint in a folder; None if there is no checkpoint."""
    for name in sorted((name for name in list_names(folder) if name.startswith("checkpoint")), reverse=True):
        file = join(folder, name, STATE_FILE)
        if exists(file):
            state_dict = torch.load(io.BytesIO(read_bytes(file)), map_location=device, weights_only=True)
            return TrainState.from_dict(state_dict)
    return None
