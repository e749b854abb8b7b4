"""Reads ingested data sets with Ray Data, as streams of images for training on a cluster."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from focus_ray.data.schema import SCHEMA, SPLITS
from focus_ray.data.store import open_data_set
from focus_ray.errors import DataError, TrainingError
from focus_ray.fitting.settings import Config
from focus_ray.fitting.shards import ImageBlock, read_blocks

if TYPE_CHECKING:
    import ray.data

_MAX_BLOCKS_IN_DATASET = 1024  # blocks that one dataset of Ray Data reads; a new dataset starts with an empty pipeline


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


def read_blocks_with_ray_data(config: Config, blocks: Iterable[ImageBlock]) -> Iterator[NDArray[np.uint8]]:
    """Generator: reads and decodes blocks with Ray Data, on all nodes with the labels of the run; see `BlockReader`.

    A block is one task. Ray Data limits how many decoded images wait in its object store.

    Yields: the images (n, H, W, 3) of each block, in the order of the blocks.

    Raises: TrainingError: the stream ended too early. The error of Ray Data: a block cannot be read or decoded.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)  # otherwise it logs every start and end of a dataset
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.label_selector = dict(config.cluster.labels) or None

    def read_block(batch: dict[str, Any]) -> dict[str, Any]:
        """Returns the images of the only block in a batch."""
        block = ImageBlock(str(batch["category"][0]), str(batch["version"][0]) or None, np.asarray(batch["rows"][0]))
        return {"image": next(read_blocks(config, [block]))[..., :3]}

    blocks = iter(blocks)
    while pending := deque(itertools.islice(blocks, _MAX_BLOCKS_IN_DATASET)):
        items = [{"category": b.category, "version": b.version or "", "rows": b.rows.tolist()} for b in pending]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(read_block, batch_size=1)
        images: list[NDArray[np.uint8]] = []
        for batch in dataset.iter_batches(batch_size=None):
            images.append(batch["image"])
            while pending and sum(map(len, images)) >= len(pending[0].rows):
                joined, size = np.concatenate(images), len(pending.popleft().rows)
                yield joined[:size]
                images = [joined[size:]]
        if pending:
            raise TrainingError(
                f"the stream of images ended {len(pending)} blocks too early: check whether the data was changed meanwhile"
            )
