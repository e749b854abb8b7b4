"""Reads data sets with Ray Data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from focus_ray.data.images import decode_batch
from focus_ray.data.read import NUM_ROWS_PER_READ
from focus_ray.data.schema import SCHEMA, SPLITS
from focus_ray.data.store import open_store
from focus_ray.errors import DataError
from focus_ray.fitting.regions import load_frame
from focus_ray.fitting.settings import Config
from focus_ray.fitting.split import Split

if TYPE_CHECKING:
    import ray.data


def ray_dataset(
    uri: str | Path,
    category: str,
    split: str | None = None,
    columns: Sequence[str] | None = None,
    version: str | None = None,
) -> ray.data.Dataset:
    """Returns a Ray data set of the Parquet files of a category, in one version of the data set.

    Switches DataSourceV2 off in the DataContext of this process: with Ray 2.60 it starts 32 actors that read file footers in
    each epoch, and reads small image sets about three times slower. On S3 each node uses its own credentials.

    Args:
        split: train or test; None: both.
        columns: columns of ``SCHEMA``; None: all. Older part files have no column `group`; its values are then null.
        version: version of the data set; None: the current version.

    Raises: DataError: as ``read_index``.
    """
    import ray.data
    from ray.data.expressions import col

    if split is not None and split not in SPLITS:
        raise DataError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    store = open_store(uri)
    commit = store.require_commit(category, version)
    ray.data.DataContext.get_current().use_datasource_v2 = False
    paths = [f"{store.category_folder(category)}/{entry['name']}" for entry in commit["files"]]
    # the schema adds the column `group` to part files that lack it
    dataset = ray.data.read_parquet(paths, filesystem=store.filesystem, partitioning=None, schema=SCHEMA)
    if split is not None:
        dataset = dataset.filter(expr=col("split") == split)
    return dataset.select_columns(list(columns)) if columns is not None else dataset


def stream_training_images(config: Config, split: Split) -> Any:
    """Returns a Ray data set of the decoded good images that fit the density.

    The rule of the split selects them while rows are read.
    """
    frame = load_frame(config, split.category)

    def decode(batch: dict[str, Any]) -> dict[str, Any]:
        rows = zip(*(batch[column] for column in columns), strict=True)
        images = {
            name: bytes(image)
            for name, label, content_hash, group, image in rows
            if not label and split.part_of(content_hash, group or "") == "fit"
        }
        if not images:
            return {"image": np.empty((0, *frame.shape), dtype=np.uint8)}
        return {"image": decode_batch(list(images.values()), frame, names=list(images))}

    columns = ("id", "label", "content_hash", "group", "image")
    dataset = ray_dataset(config.data.uri, split.category, split="train", columns=columns, version=split.version)
    return dataset.map_batches(decode, batch_size=NUM_ROWS_PER_READ)


def iterate_worker_batches(batch_size: int, seed: int) -> Iterable[Mapping[str, Any]]:
    """Returns this worker's share of the trainer's image stream as batches, shuffled within a buffer. It is a `BatchStream`.

    Runs only inside a worker of Ray Train.
    """
    import ray.train

    stream = ray.train.get_dataset_shard("train")
    return stream.iter_batches(  # type: ignore[no-any-return]
        batch_size=batch_size, local_shuffle_buffer_size=4 * batch_size, local_shuffle_seed=seed, prefetch_batches=2
    )
