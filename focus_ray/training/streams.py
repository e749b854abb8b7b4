"""Reads ingested data sets with Ray Data, as streams of images for training on a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from focus_ray.data.images import decode_batch
from focus_ray.data.read import NUM_ROWS_PER_READ
from focus_ray.data.schema import SCHEMA, SPLITS
from focus_ray.data.store import open_data_set
from focus_ray.errors import DataError
from focus_ray.fitting.regions import load_frame
from focus_ray.fitting.settings import Config
from focus_ray.fitting.split import SplitRule

if TYPE_CHECKING:
    import ray.data


def read_ray_dataset(
    uri: str | Path,
    category: str,
    split: str | None = None,
    columns: Sequence[str] | None = None,
    version: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> ray.data.Dataset:
    """Returns a Ray Data dataset with the rows of a category, which Ray reads from Parquet files when it is used.

    Changes two settings of Ray Data in this process, also for later datasets. Tasks run only on nodes with the labels.
    DataSourceV2 is off: with Ray 2.60 it starts 32 actors that read file footers in each pass, and reads small image sets about
    three times slower. On S3 each node uses its own credentials.

    Args:
        uri: address of the ingested data set.
        split: train or test; None: both.
        columns: columns of ``SCHEMA``; None: all. The column `group` is null in files that were ingested before it existed.
        version: version of the category in the data set; None: the current version.
        labels: label selector of the nodes that read and process the rows; None or empty: all nodes.

    Raises: DataError: `split` is neither train nor test, or the data set, category or version does not exist.
    """
    import ray.data
    from ray.data.expressions import col

    if split is not None and split not in SPLITS:
        raise DataError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    store = open_data_set(uri)
    commit = store.require_commit(category, version)
    context = ray.data.DataContext.get_current()
    context.use_datasource_v2 = False
    # holds for every task of a dataset; the argument of `read_parquet` would restrict the reading only
    context.execution_options.label_selector = dict(labels or {}) or None
    paths = [f"{store.get_category_folder(category)}/{entry['name']}" for entry in commit["files"]]
    # the schema adds the column `group` to part files that lack it
    dataset = ray.data.read_parquet(paths, filesystem=store.filesystem, partitioning=None, schema=SCHEMA)
    if split is not None:
        dataset = dataset.filter(expr=col("split") == split)
    return dataset.select_columns(list(columns)) if columns is not None else dataset


def stream_training_images(config: Config, split: SplitRule) -> Any:
    """Returns a Ray Data dataset with the decoded good images of a category that are used to fit the model.

    The images are uint8 in the column "image". `split` selects them while Ray reads the rows; images for validation and
    calibration are left out.

    Raises: DataError: the region of interest cannot be read, or the data set, category or version does not exist.
    """
    frame = load_frame(config, split.category)

    def decode_fit_images(batch: dict[str, Any]) -> dict[str, Any]:
        rows = zip(*(batch[column] for column in columns), strict=True)
        images = {
            name: bytes(image)
            for name, label, content_hash, group, image in rows
            if not label and split.find_subset(content_hash, group or "") == "fit"
        }
        if not images:
            return {"image": np.empty((0, *frame.shape), dtype=np.uint8)}
        return {"image": decode_batch(list(images.values()), frame, names=list(images))}

    columns = ("id", "label", "content_hash", "group", "image")
    dataset = read_ray_dataset(
        config.data.uri,
        split.category,
        split="train",
        columns=columns,
        version=split.version,
        labels=config.cluster.labels,
    )
    return dataset.map_batches(decode_fit_images, batch_size=NUM_ROWS_PER_READ)


def iterate_worker_batches(batch_size: int, seed: int) -> Iterable[Mapping[str, Any]]:
    """Returns batches of this worker's share of the dataset "train" of the trainer. Works only in a worker of Ray Train.

    The function is a `BatchStream`. A buffer of 4 batches is shuffled.

    Args:
        batch_size: largest number of images in a batch.
        seed: seed of the shuffling.
    """
    import ray.train

    stream = ray.train.get_dataset_shard("train")
    return stream.iter_batches(  # type: ignore[no-any-return]
        batch_size=batch_size, local_shuffle_buffer_size=4 * batch_size, local_shuffle_seed=seed, prefetch_batches=2
    )
