"""Training on Ray: one model a category, DDP over its workers, categories side by side as the cluster allows."""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from focus_ray import cluster
from focus_ray.bundle import write_bundle
from focus_ray.config import Config, config_to_yaml, parse_config, unique_name
from focus_ray.dataset import COMMIT_NAME, data_fingerprint, list_categories, ray_dataset, read_index, read_rows
from focus_ray.errors import DataError, TrainingError
from focus_ray.fit import MemoryShard, Shard, Steps, fit
from focus_ray.images import decode_batch
from focus_ray.storage import create_bytes, exists, is_s3, join, open_filesystem, read_bytes, retrying, write_bytes

RUN_CONFIG = "config.yaml"
_READ_ROWS = 32  # decoded at a time: bounds the memory of large originals
logger = logging.getLogger(__name__)


def plan_category(config: Config, category: str) -> dict[str, Any]:
    """Which rows of a category train and which are held out; a function of the images and the seed alone.

    Returns: fit_rows, validation_rows and holdout_rows (ascending row numbers), folds (of fit_rows, for cross
        calibration), fingerprint (of the data).

    Raises: DataError: no such category, or too few normal training images.
    """
    index = read_index(config.data.uri, category, split="train")
    labels = index["label"].to_numpy()
    rows = index["row"].to_numpy()[labels == 0]
    hashes = [h for h, label in zip(index["content_hash"].to_pylist(), labels, strict=True) if label == 0]
    if len(rows) < 4:
        raise DataError(
            f"category {category!r} of {config.data.uri} has {len(rows)} normal training images; 4 at least"
        )
    ranked = sorted(
        range(len(rows)), key=lambda i: hashlib.sha256(f"{config.train.seed}:{hashes[i]}".encode()).digest()
    )
    num_holdout = 0
    if config.calibration.method == "split":
        num_holdout = min(len(rows) - 2, max(1, round(config.data.holdout_fraction * len(rows))))
    num_validation = 0
    if config.selection.enabled:
        wanted = min(config.selection.max_images, round(config.selection.fraction * len(rows)))
        num_validation = max(2, wanted)
        if len(rows) - num_holdout - num_validation < 2:
            raise DataError(
                f"category {category!r} has {len(rows)} normal training images, of which {num_holdout} calibrate and "
                f"{num_validation} validate: too few are left; set selection.enabled=false or add images"
            )
    place = np.empty(len(rows), dtype=np.int64)
    place[ranked] = np.arange(len(rows))
    kept = place >= num_holdout + num_validation
    validation = (place >= num_holdout) & ~kept
    return {
        "fit_rows": rows[kept].tolist(),
        "folds": (place[kept] % config.calibration.num_folds).tolist(),
        "validation_rows": rows[validation].tolist(),
        "holdout_rows": rows[place < num_holdout].tolist(),
        "fingerprint": data_fingerprint(config.data.uri, category),
    }


def slice_of(values: list[int], rank: int, num_workers: int) -> list[int]:
    """One worker's contiguous share; every value is in exactly one."""
    return values[len(values) * rank // num_workers : len(values) * (rank + 1) // num_workers]


class StreamShard:
    """A share that is read and decoded anew on every pass, a few images at a time."""

    def __init__(self, config: Config, category: str, share: dict[str, list[int]]) -> None:
        """share: this worker's part of `plan_category`'s lists."""
        self.config, self.category, self.batch_size = config, category, config.train.batch_size_per_worker
        self.rows, self.folds = share["fit_rows"], share["folds"]
        self.validation, self.holdout = share["validation_rows"], share["holdout_rows"]

    def train_batches(self, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
        import ray.train

        seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
        stream = ray.train.get_dataset_shard("train")
        pending: list[Tensor] = []
        given = 0
        # the shuffle buffer yields short batches in mid-stream (Ray 2.60): cut them to size here
        batches = stream.iter_batches(
            batch_size=batch_size, local_shuffle_buffer_size=4 * batch_size, local_shuffle_seed=seed, prefetch_batches=2
        )
        for batch in batches:
            pending.append(torch.from_numpy(np.array(batch["image"])))
            while given < steps and sum(map(len, pending)) >= batch_size:
                joined = torch.cat(pending)
                pending = [joined[batch_size:]]
                given += 1
                yield joined[:batch_size]
        if given < steps:
            raise TrainingError(
                f"the stream of {self.category!r} gave {given} of {steps} batches: was the data changed?"
            )

    def fit_batches(self, fold: int | None = None) -> Iterator[Tensor]:
        rows = self.rows if fold is None else [r for r, f in zip(self.rows, self.folds, strict=True) if f == fold]
        return self._read(rows)

    def validation_batches(self) -> Iterator[Tensor]:
        return self._read(self.validation)

    def holdout_batches(self) -> Iterator[Tensor]:
        return self._read(self.holdout)

    def _read(self, rows: list[int]) -> Iterator[Tensor]:
        size = self.config.model.image_size_px
        for images in decoded_rows(self.config.data.uri, self.category, rows, size, self.batch_size):
            yield torch.from_numpy(images)


def decoded_rows(
    uri: str, category: str, rows: list[int], size_px: int, batch_size: int = _READ_ROWS
) -> Iterator[np.ndarray[Any, Any]]:
    """uint8 (B, S, S, 3) of the given rows, in order."""
    batch: list[bytes] = []
    for record in read_rows(uri, category, rows, columns=("image",)):
        batch.append(record["image"])
        if len(batch) == batch_size:
            yield decode_batch(batch, size_px)
            batch = []
    if batch:
        yield decode_batch(batch, size_px)


def fits_memory(config: Config, plan: dict[str, Any]) -> bool:
    """Whether a worker's share of decoded images stays within data.memory_budget_mb."""
    num_images = sum(len(plan[key]) for key in ("fit_rows", "validation_rows", "holdout_rows"))
    share = -(-num_images // config.cluster.num_workers)
    return share * config.model.image_size_px**2 * 3 <= config.data.memory_budget_mb * 2**20


def build_shard(config: Config, category: str, plan: dict[str, Any], rank: int, num_workers: int) -> Shard:
    """This worker's share, in memory where it fits."""
    share = {
        key: slice_of(plan[key], rank, num_workers) for key in ("fit_rows", "folds", "validation_rows", "holdout_rows")
    }
    if not fits_memory(config, plan):
        return StreamShard(config, category, share)
    size = config.model.image_size_px

    def load(numbers: list[int]) -> Tensor:
        images = torch.empty(len(numbers), size, size, 3, dtype=torch.uint8)
        done = 0
        for batch in decoded_rows(config.data.uri, category, numbers, size):
            images[done : done + len(batch)] = torch.from_numpy(batch)
            done += len(batch)
        return images

    return MemoryShard(
        load(share["fit_rows"]),
        load(share["holdout_rows"]),
        torch.tensor(share["folds"]),
        config.train.batch_size_per_worker,
        load(share["validation_rows"]),
    )


def train(config: Config, *, resume: bool = False, log: Callable[[str], None] = lambda message: None) -> dict[str, str]:
    """Trains every category of the config; writes <storage>/<name>/bundles/<category>.

    Args:
        resume: go on with a run of the same name: finished categories stay, others start at their last checkpoint.

    Returns: category -> the bundle's place.

    Raises: TrainingError: the run's folder exists and `resume` is not asked for, or categories failed, each named with
        its reason; the bundles of the others are there. DataError: the data set cannot be used.
    """
    config = absolute(config)
    if config.name == "auto":
        if resume:
            raise TrainingError("--resume needs the name of the run to go on with: name=...")
        config = config.model_copy(update={"name": unique_name(config.cluster.team or "run")})
        log(f"name: {config.name}")
    there = list_categories(config.data.uri)
    categories = list(config.data.categories or there)
    unknown = sorted(set(categories) - set(there))
    if unknown:
        raise DataError(f"{config.data.uri} has no category {', '.join(unknown)}; it has {', '.join(there)}")
    root = join(config.storage, config.name)
    _check_claim(config, root, resume)
    plans = {category: plan_category(config, category) for category in categories}
    for category, plan in plans.items():
        try:
            Steps.agree(len(plan["fit_rows"]), config.cluster.num_workers, config.train.batch_size_per_worker)
        except DataError as error:
            raise DataError(f"category {category!r}: {error}") from None
    bundles = {category: join(root, "bundles", category) for category in categories}
    todo = [c for c in categories if not (resume and exists(join(bundles[c], "manifest.json")))]
    for category in sorted(set(categories) - set(todo)):
        log(f"{category}: already there, {bundles[category]}")
    if todo:
        team = config.cluster.team
        private = cluster.connect(namespace=config.cluster.namespace or (f"focus-ray-{team}" if team else None))
        streams = config.train.epochs > 0 and any(not fits_memory(config, plans[category]) for category in todo)
        limit = cluster.concurrent_runs(
            config.cluster, private, streams, log, limit=config.cluster.max_concurrent_categories
        )
        cluster.probe_nodes([join(config.data.uri, f"category={c}", COMMIT_NAME) for c in todo], [root])
        _claim(root, resume)
        write_bytes(join(root, RUN_CONFIG), config_to_yaml(config).encode())
        failed = _run_all(config, root, {c: plans[c] for c in todo}, limit, log)
        if failed:
            raise TrainingError(
                f"{len(failed)} of {len(categories)} categories failed; "
                + "; ".join(f"{category}: {reason}" for category, reason in sorted(failed.items()))
                + ". Mend the cause and run again with --resume"
            )
    return bundles


def _run_all(
    config: Config, root: str, plans: dict[str, dict[str, Any]], limit: int, log: Callable[[str], None]
) -> dict[str, str]:
    """Trains the categories, `limit` at a time. Returns: the reasons of those that failed."""
    import ray

    payloads = {
        category: {
            "config": config.model_dump(mode="json"),
            "category": category,
            "plan": plan,
            "root": root,
            "use_gpu": cluster.uses_gpu(config.cluster),
        }
        for category, plan in plans.items()
    }
    task = ray.remote(num_cpus=0, max_retries=0)(_run_category)
    waiting = list(payloads)
    running: dict[Any, tuple[str, float]] = {}
    failed: dict[str, str] = {}
    while waiting or running:
        while waiting and len(running) < limit:
            category = waiting.pop(0)
            log(f"{category}: training with {config.cluster.num_workers} worker(s)")
            running[task.remote(payloads[category])] = (category, time.monotonic())
        done, _ = ray.wait(list(running), num_returns=1)
        category, since = running.pop(done[0])
        try:
            ray.get(done[0])
            log(f"{category}: done in {time.monotonic() - since:.0f} s, {join(root, 'bundles', category)}")
        except Exception as error:  # one category's failure must not end the others; it is reported at the end
            failed[category] = reason_of(error)
            log(f"{category}: FAILED: {failed[category]}")
    return failed


def reason_of(error: BaseException) -> str:
    """The innermost cause's own words, without the traces that Ray wraps around it."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        failures = getattr(error, "worker_failures", None)
        if failures:
            error = next(iter(failures.values()))
        elif getattr(error, "cause", None) is not None:
            error = error.cause  # type: ignore[attr-defined]
        elif error.__cause__ is not None and type(error).__module__.startswith("ray."):
            error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else 'no message'}"


def _run_category(payload: dict[str, Any]) -> None:
    """Trains one category; runs as a Ray task, so that several trainers can wait side by side."""
    make_trainer(_worker, payload, join(payload["root"], "train"), payload["category"]).fit()


def make_trainer(worker: Callable[[dict[str, Any]], Any], payload: dict[str, Any], place: str, name: str) -> Any:
    """A TorchTrainer of one category as its configuration asks.

    Args:
        worker: what every worker runs.  payload: what it is given, with config, category, plan and use_gpu.
        place: where the trainer keeps checkpoints, below `name`.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    config = parse_config(payload["config"])
    datasets = {}
    if config.train.epochs and not fits_memory(config, payload["plan"]):
        datasets["train"] = _stream(config, payload["category"], payload["plan"]["fit_rows"])
    filesystem, path = open_filesystem(place)
    return TorchTrainer(
        worker,
        train_loop_config=payload,
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.cluster.num_workers,
            use_gpu=payload["use_gpu"],
            resources_per_worker=cluster.resources_per_worker(config.cluster, payload["use_gpu"]),
            label_selector=dict(config.cluster.labels) or None,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem if is_s3(place) else None,
            failure_config=ray.train.FailureConfig(
                max_failures=config.cluster.max_failures, controller_failure_limit=config.cluster.max_failures
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
        datasets=datasets,
        dataset_config=ray.train.DataConfig(datasets_to_split=["train"]),
    )


def _stream(config: Config, category: str, rows: list[int]) -> Any:
    """A Ray data set of the decoded training images of the given rows."""
    index = read_index(config.data.uri, category, split="train")
    chosen = set(rows)
    ids = {i for i, row in zip(index["id"].to_pylist(), index["row"].to_pylist(), strict=True) if row in chosen}
    size = config.model.image_size_px

    def decode(batch: dict[str, Any]) -> dict[str, Any]:
        images = [bytes(image) for name, image in zip(batch["id"], batch["image"], strict=True) if name in ids]
        if not images:
            return {"image": np.empty((0, size, size, 3), dtype=np.uint8)}
        return {"image": decode_batch(images, size)}

    dataset = ray_dataset(config.data.uri, category, split="train", columns=("id", "image"))
    return dataset.map_batches(decode, batch_size=_READ_ROWS)


def _worker(payload: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    import ray.train
    import ray.train.torch

    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it reports every report
    config = parse_config(payload["config"])
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if config.train.seed is not None:
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    plan, category = payload["plan"], payload["category"]
    start = time.perf_counter()
    shard = build_shard(config, category, plan, rank, num_workers)
    loading = time.perf_counter() - start

    def on_epoch(epoch: int, figures: dict[str, float], snapshot: Callable[[], dict[str, Any]]) -> None:
        due = (epoch + 1) % config.train.checkpoint_every_epochs == 0 or epoch + 1 == config.train.epochs
        if not due:
            return ray.train.report(figures)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if rank == 0:
                torch.save(snapshot(), Path(folder) / "state.pt")
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(figures, checkpoint=checkpoint)

    result = fit(
        config,
        shard,
        len(plan["fit_rows"]),
        device,
        rank=rank,
        wrap=data_parallel(num_workers, device),
        state=retrying(lambda: _last_state(ray.train.get_checkpoint(), device)),
        on_epoch=on_epoch,
        log=lambda message: print(f"{category}: {message}", flush=True) if rank == 0 else None,
    )
    if rank == 0:
        write_bundle(
            join(payload["root"], "bundles", category),
            config=config,
            category=category,
            net=result.net,
            reduction=result.reduction,
            statistics=result.statistics,
            calibration=result.calibration,
            data={
                "uri": config.data.uri,
                "fingerprint": plan["fingerprint"],
                "num_fit": result.statistics.moments.count,
                "num_holdout": len(plan["holdout_rows"]),
            },
            metrics={
                "history": result.history,
                "alignment": result.alignment,
                "selection": result.selection,
                "seconds": {"load": loading, **result.seconds},
                "warnings": result.warnings,
                "num_workers": num_workers,
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            },
        )
    ray.train.report({"num_images": result.statistics.moments.count})


def data_parallel(num_workers: int, device: torch.device) -> Callable[[torch.nn.Module], Any] | None:
    """What makes a module data-parallel; None for one worker."""
    if num_workers == 1:
        return None

    def wrap(module: torch.nn.Module) -> Any:
        devices = [device] if device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(module, device_ids=devices)

    return wrap


def _last_state(checkpoint: Any, device: torch.device) -> dict[str, Any] | None:
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        state: dict[str, Any] = torch.load(Path(folder) / "state.pt", map_location=device, weights_only=True)
    return state


def absolute(config: Config) -> Config:
    """Local paths made absolute: workers run in other folders."""

    def resolve(place: str) -> str:
        return place if "://" in place else str(Path(place).expanduser().absolute())

    weights = config.model.weights
    if weights not in ("default", "random"):
        weights = resolve(weights)
    return config.model_copy(
        update={
            "storage": resolve(config.storage),
            "data": config.data.model_copy(update={"uri": resolve(config.data.uri)}),
            "model": config.model.model_copy(update={"weights": weights}),
        }
    )


def _claim(root: str, resume: bool) -> None:
    """Makes the folder this run's. Raises: TrainingError: another run of the name, started at the same time, was first."""
    mine = json.dumps({"token": uuid.uuid4().hex, "host": socket.gethostname()}).encode()
    if not create_bytes(join(root, "claim.json"), mine) and not resume:
        raise TrainingError(
            f"{root} was taken by a run started at the same time: give another name (name=auto makes one)"
        )


def _check_claim(config: Config, root: str, resume: bool) -> None:
    """Raises: TrainingError: the folder is another run's, or, to resume, one of another configuration."""
    place = join(root, RUN_CONFIG)
    text = config_to_yaml(config)
    if exists(place):
        if not resume:
            raise TrainingError(
                f"{root} holds a run already: give another name (name=...), or --resume to go on with it"
            )
        former = read_bytes(place).decode()
        if former != text:
            changed = sorted(set(text.splitlines()) ^ set(former.splitlines()))
            raise TrainingError(
                f"{root}: --resume needs the configuration that it was started with; these lines differ: "
                + " | ".join(line.strip() for line in changed[:6])
            )


def iter_test_records(uri: str, category: str) -> Iterable[dict[str, Any]]:
    """The labelled test images of a category, as `Inspector.evaluate` takes them."""
    rows = read_index(uri, category, split="test")["row"].to_numpy()
    return read_rows(uri, category, rows, columns=("image", "mask", "label", "defect_type", "width", "height"))
