"""From a category's images to its bundle: on one worker or, in a torch.distributed group, on every one. No Ray."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from focus_ray.bundle.bundle import write_bundle
from focus_ray.config import Config
from focus_ray.data.shards import BatchStream, build_shard, local_stream
from focus_ray.data.split import Split
from focus_ray.fitting.fit import fit
from focus_ray.fitting.state import Figures, OnEpoch, TrainState
from focus_ray.storage import exists, join, list_names, read_bytes, remove_file, write_bytes
from focus_ray.tracking.runs import TrainingRecorder

STATE_FILE = "state.pt"
_DECODERS = 8  # threads, at most, of a training in this process


def set_reproducible() -> None:
    """Results that are the same at every run, on a GPU too."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def bundle_place(root: str, category: str) -> str:
    return join(root, "bundles", category)


def _say_nothing(message: str) -> None:
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
    wrap: Callable[[torch.nn.Module], Any] | None = None,
    state: TrainState | None = None,
    on_epoch: OnEpoch | None = None,
    log: Callable[[str], None] = _say_nothing,
) -> int:
    """Fits one category, with every worker calling; the first writes <root>/bundles/<category>. Other arguments as of `fit`.

    Args:
        stream: what this worker trains from where its share does not fit its memory; None: its own reading of the rows.
        num_threads: that decode images.

    Returns: images in the density.
    """
    category = split.category
    start = time.perf_counter()
    if rank > 0:
        log = _say_nothing
    log(f"reading {split.num_images} images")
    plan = split.plan(config)
    stream = stream or local_stream(config, category, plan, num_threads)
    shard = build_shard(config, category, plan, rank, num_workers, stream, num_threads)
    loading = time.perf_counter() - start
    result = fit(
        config,
        shard,
        len(plan.fit_rows),
        device,
        rank=rank,
        wrap=wrap,
        state=state,
        on_epoch=on_epoch,
        log=log,
    )
    count = result.statistics.num_images
    if rank == 0:
        write_bundle(
            bundle_place(root, category),
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
                "seconds": {"load": loading, **result.seconds},
                "num_workers": num_workers,
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            },
            known=plan.fit_hashes,
        )
    return count


def train_here(
    config: Config,
    splits: Sequence[Split],
    root: str,
    log: Callable[[str], None],
    raise_at_once: bool = False,
    told: TrainingRecorder | None = None,
) -> dict[str, str]:
    """Trains categories one after the other in this process, as one worker on a cluster would, to the last digit.

    Args:
        raise_at_once: let a category's error through, in place of going on with the others.
        told: of epochs and of how each category ends.

    Returns: category -> reason, of those that failed.
    """
    set_reproducible()
    device = torch.device("cuda" if config.cluster.use_gpu and torch.cuda.is_available() else "cpu")
    failed: dict[str, str] = {}
    for number, split in enumerate(splits, start=1):
        category, start = split.category, time.monotonic()
        log(f"{category}: training in this process, category {number} of {len(splits)}")
        try:
            _train_one(config, split, root, device, lambda text, name=category: log(f"{name}: {text}"), told)  # type: ignore[misc]
        except Exception as error:  # one category's failure must not end the others; it is reported at the end
            if raise_at_once:
                raise
            failed[category] = f"{type(error).__name__}: {error}"
            log(f"{category}: FAILED: {failed[category]}")
            if told is not None:
                told.fail_category(category, failed[category])
        else:
            log(f"{category}: done in {time.monotonic() - start:.0f} s, {bundle_place(root, category)}")
            if told is not None:
                told.finish_category(category, bundle_place(root, category))
    return failed


def _train_one(
    config: Config,
    split: Split,
    root: str,
    device: torch.device,
    log: Callable[[str], None],
    told: TrainingRecorder | None,
) -> None:
    place = join(root, "train", split.category)

    def on_epoch(epoch: int, figures: Figures, snapshot: Callable[[], TrainState]) -> None:
        if told is not None:
            told.log_epoch(split.category, figures)
        if (epoch + 1) % config.train.checkpoint_every_epochs and epoch + 1 != config.train.epochs:
            return
        content = io.BytesIO()
        torch.save(snapshot().to_dict(), content)
        name = f"checkpoint_{epoch:06}"
        write_bytes(join(place, name, STATE_FILE), content.getvalue())
        for former in list_names(place):
            if former.startswith("checkpoint_") and former != name:
                remove_file(join(place, former, STATE_FILE))

    state = latest_state(place, device)
    threads = min(_DECODERS, os.cpu_count() or 1)
    make_bundle(config, split, root, device, num_threads=threads, state=state, on_epoch=on_epoch, log=log)


def latest_state(place: str, device: torch.device) -> TrainState | None:
    """Of the checkpoint that a training of this category left last; None where there is none."""
    for name in sorted((name for name in list_names(place) if name.startswith("checkpoint")), reverse=True):
        file = join(place, name, STATE_FILE)
        if exists(file):
            tree = torch.load(io.BytesIO(read_bytes(file)), map_location=device, weights_only=True)
            return TrainState.from_dict(tree)
    return None
