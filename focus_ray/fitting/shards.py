"""Module for shards (one worker's share of the normal images, in RAM or read on every pass), and for batches for the training."""

from __future__ import annotations

import copy
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from focus_ray.data.read import NUM_ROWS_PER_READ, decode_rows
from focus_ray.distributed import all_gather_rows, compute_worker_range, get_rank, get_world_size
from focus_ray.fitting.regions import load_frame
from focus_ray.fitting.settings import Config
from focus_ray.fitting.split import NO_ROWS, SplitPlan, SplitRows, SplitRule
from focus_ray.fyd.batch_schedule import BatchSchedule

_MAX_BLOCK_IMAGES = 256  # images of a worker that a stream reads together, if they belong to the same category
_MAX_BLOCK_BYTES = 2**27  # size of these images; the images of one step are always read together

_Part = Literal["fit", "validation", "holdout"]


class ImageBlock(NamedTuple):
    """Images that are read together.

    category: category of the images.
    version: name of the stored version of the category's data; None: the current version.
    rows: (n,) int64, row numbers of the images in this version, strictly ascending.
    """

    category: str
    version: str | None
    rows: NDArray[np.int64]


BlockReader = Callable[[Iterable[ImageBlock]], Iterator[NDArray[np.uint8]]]
"""Function that reads and decodes blocks: it yields the images (n, H, W, 3 or 4) of each block, in the order of the blocks."""


class Shard(ABC):
    """One worker's share of the normal images, in batches of uint8 (B, H, W, C).

    H x W is the size to which images are resized. C is 3, or 4 if the last channel marks the scored pixels. "Fit images" train
    the network and fill the density, validation images select a model, held-out images calibrate the thresholds. A position is
    the index of an image among this worker's images of the same kind.

    Attributes:
        share: which images of this worker are fit, validation and held-out images, with their groups and order.
        batch_size: images per batch.
    """

    share: SplitPlan
    batch_size: int

    @abstractmethod
    def read_batches(self, part: _Part, positions: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Generator: yields batches of the fit, validation or held-out images.

        Args: positions: ascending positions of the images to read; None: all images.
        """

    @abstractmethod
    def merge_validation_into_fit(self) -> Shard:
        """Returns a new shard in which the validation images are fit images too; it has no validation images."""

    def get_fit_folds(self) -> NDArray[np.int64]:
        """Returns the cross-validation fold (N,) of each fit image, in the order of `read_batches("fit")`.

        Raises: ValueError: the shard has no fold numbers.
        """
        if len(self.share.folds) != len(self.share.fit):
            raise ValueError("cross calibration needs the fold numbers of the images: pass `folds`")
        return self.share.folds


class MemoryShard(Shard):
    """A shard whose decoded images are kept in RAM."""

    def __init__(
        self,
        images: Tensor,
        holdout: Tensor | None = None,
        folds: Tensor | None = None,
        batch_size: int = NUM_ROWS_PER_READ,
        validation: Tensor | None = None,
        *,
        groups: ArrayLike | None = None,
        order: ArrayLike | None = None,
        share: SplitPlan | None = None,
    ) -> None:
        """
        Args:
            images: (N, H, W, C) uint8, the fit images, for training and density.
            holdout: (M, H, W, C) uint8, held-out images, for calibration; None: no images.
            folds: (N,) fold number of each fit image, for cross calibration; None: cross calibration is not possible.
            batch_size: images per batch.
            validation: (V, H, W, C) uint8, for the selection of a network without labels; None: no images.
            groups: (N,) group number of each fit image. None: each image is its own group.
            order: (N,) rank of each fit image in natural order of file names. None: the order of `images`.
            share: the split of the images; if it is not None, `folds`, `groups` and `order` are ignored.
        """
        self.images, self.batch_size = images, batch_size
        self.holdout = images[:0] if holdout is None else holdout
        self.validation = images[:0] if validation is None else validation
        fit, validation_rows, holdout_rows = np.split(
            np.arange(len(images) + len(self.validation) + len(self.holdout)),
            [len(images), len(images) + len(self.validation)],
        )
        fit_groups = fit if groups is None else np.asarray(groups, dtype=np.int64)
        # other images get new group numbers, so that they do not join a group of the fit images
        offset = fit_groups.max(initial=-1) + 1 - len(fit)
        self.share = share or SplitPlan(
            SplitRows(fit, fit_groups, fit if order is None else np.asarray(order, dtype=np.int64)),
            NO_ROWS if folds is None else folds.numpy(),
            SplitRows(validation_rows, validation_rows + offset, validation_rows),
            SplitRows(holdout_rows, holdout_rows + offset, holdout_rows),
            fingerprint="",
        )

    def gather_images(self, numbers: Tensor, num_images: int) -> Tensor:
        """Returns fit images (n, H, W, C) of the whole category on every worker. The workers exchange their images.

        Args:
            numbers: (n,) int64, image numbers; no number appears twice.
            num_images: number of fit images of all workers.
        """
        own_numbers = compute_worker_range(num_images)
        ascending = numbers.sort().values
        is_own = (ascending >= own_numbers.start) & (ascending < own_numbers.stop)
        images = all_gather_rows(self.images[ascending[is_own] - own_numbers.start])  # in the order of `ascending`
        return images[torch.searchsorted(ascending, numbers)]

    def read_batches(self, part: _Part, positions: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Generator: see `Shard.read_batches`; yields batches (B, H, W, C) from the images in RAM."""
        images = {"fit": self.images, "validation": self.validation, "holdout": self.holdout}[part]
        if positions is not None:
            images = images[torch.tensor(positions, dtype=torch.long)]
        yield from (batch for batch in images.split(self.batch_size) if len(batch))

    def merge_validation_into_fit(self) -> MemoryShard:
        """Returns a new shard in which the validation images are fit images too, after the other fit images."""
        images, share = torch.cat([self.images, self.validation]), self.share.merge_validation_into_fit()
        return MemoryShard(images, self.holdout, batch_size=self.batch_size, share=share)


class StreamShard(Shard):
    """A shard that reads and decodes its images again on every pass, a few at a time."""

    def __init__(
        self, config: Config, category: str, plan: SplitPlan, rank: int, num_workers: int, num_threads: int = 1
    ) -> None:
        """
        Args:
            plan: the split of the images of all workers.
            rank: number of this worker, from 0.
            num_threads: number of threads that decode.

        Raises: DataError: the region of interest of the category cannot be used.
        """
        self.num_threads = num_threads
        self.config, self.category, self.plan = config, category, plan
        self.share = plan.get_worker_share(rank, num_workers)
        self.batch_size = NUM_ROWS_PER_READ
        self.frame = load_frame(config, category)

    def read_batches(self, part: _Part, positions: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Generator: see `Shard.read_batches`; reads and decodes the images, and yields batches (B, H, W, C)."""
        share: SplitRows = getattr(self.share, part)
        rows = share.rows if positions is None else share.rows[np.asarray(positions, dtype=np.int64)]
        uri, version = self.config.data.uri, self.share.version
        for images in decode_rows(uri, self.category, rows, self.frame, self.batch_size, self.num_threads, version):
            yield torch.from_numpy(images)

    def merge_validation_into_fit(self) -> StreamShard:
        """Returns a new shard in which the validation images are fit images too, all in the order of their rows."""
        joined = self.share.merge_validation_into_fit()
        merged = copy.copy(self)
        merged.share = joined.select_fit_images(np.argsort(joined.fit.rows))
        return merged


def fits_in_memory(config: Config, *plans: SplitPlan | SplitRule) -> bool:
    """Returns whether the decoded images of each worker fit into the RAM that data.memory_budget_mb allows.

    It assumes the smallest number of workers that the settings allow, because each worker then has the most images.

    Args: plans: the splits of the categories whose images are needed at the same time, each for the images of all workers.
    """
    share = sum(-(-plan.num_images // config.cluster.min_workers_to_start) for plan in plans)
    channels = 4 if config.model.resize == "pad" or config.data.regions else 3
    return share * math.prod(config.model.resized_image_px) * channels <= config.data.memory_budget_mb * 2**20


def streams_training_images(config: Config, splits: Collection[SplitRule]) -> bool:
    """Returns whether a training streams images, because images that it needs at the same time do not fit into RAM.

    Args: splits: the rule of each category that is trained; with train.scope=plant, the training needs all of them together.
    """
    groups = [splits] if config.train.scope == "plant" else [[split] for split in splits]
    return any(not fits_in_memory(config, *group) for group in groups)


def build_shard(
    config: Config,
    category: str,
    plan: SplitPlan,
    rank: int,
    num_workers: int,
    num_threads: int = 1,
) -> Shard:
    """Builds the shard of a worker: it keeps the images in RAM if `fits_in_memory`, otherwise it reads them again on every pass.

    Args:
        plan: the split of the images of all workers.
        rank: number of this worker, from 0.
        num_threads: number of threads that decode.

    Raises: DataError: the region of interest of the category cannot be used.
    """
    if not fits_in_memory(config, plan):
        return StreamShard(config, category, plan, rank, num_workers, num_threads)
    share = plan.get_worker_share(rank, num_workers)
    frame = load_frame(config, category)

    def load_images(row_numbers: NDArray[np.int64]) -> Tensor:
        """Returns the decoded images (N, H, W, C) uint8 of some rows of the category."""
        images = torch.empty(len(row_numbers), *frame.shape, dtype=torch.uint8)
        start = 0
        uri, version = config.data.uri, plan.version
        for batch in decode_rows(uri, category, row_numbers, frame, num_threads=num_threads, version=version):
            images[start : start + len(batch)] = torch.from_numpy(batch)
            start += len(batch)
        return images

    return MemoryShard(
        load_images(share.fit.rows),
        load_images(share.holdout.rows),
        validation=load_images(share.validation.rows),
        share=share,
    )


def read_blocks(config: Config, blocks: Iterable[ImageBlock], num_threads: int = 1) -> Iterator[NDArray[np.uint8]]:
    """Generator: reads and decodes blocks in this process, see `BlockReader`.

    Args: num_threads: number of threads that decode.

    Raises: DataError: a region of interest or the data set cannot be read. ImageError: an image cannot be decoded.
    """
    for category, version, rows in blocks:
        frame = load_frame(config, category)
        images = decode_rows(config.data.uri, category, rows, frame, num_threads=num_threads, version=version)
        yield np.concatenate(list(images))


def read_train_batches(
    shards: Sequence[Shard], schedule: BatchSchedule, steps: range, block_reader: BlockReader
) -> Iterator[Tensor]:
    """Generator: yields this worker's share (b, H, W, C) of the global batch of each step.

    The images do not depend on the number of workers, nor on whether shards are in RAM.

    Args:
        shards: the shard of each category, all in RAM or all streamed.
        schedule: the global batches, with the categories in the order of `shards`.
        block_reader: reads the images of streamed shards.

    Raises: the errors of `block_reader`.
    """
    rank, num_workers = get_rank(), get_world_size()
    batches = zip(steps, schedule.iterate_batches(steps), strict=True)
    if isinstance(shards[0], MemoryShard):
        for step, (category, numbers) in batches:
            share, shard = schedule.get_share(step, rank, num_workers), shards[category]
            assert isinstance(shard, MemoryShard)
            yield shard.gather_images(numbers, schedule.num_images[category])[share.start : share.stop]
        return

    def group_steps() -> Iterator[tuple[ImageBlock, list[NDArray[np.int64]]]]:
        """Generator: yields blocks, and the row numbers of this worker's images of each step of the block."""
        category, rows_of_steps = 0, list[NDArray[np.int64]]()
        assert isinstance(shards[0], StreamShard)
        max_images = min(_MAX_BLOCK_IMAGES, _MAX_BLOCK_BYTES // math.prod(shards[0].frame.shape))
        for step, (next_category, numbers) in batches:
            share = schedule.get_share(step, rank, num_workers)
            num_images = sum(map(len, rows_of_steps)) + len(share)
            if rows_of_steps and (next_category != category or num_images > max_images):
                yield build_block(category, rows_of_steps)
                rows_of_steps = []
            category = next_category
            shard = shards[category]
            assert isinstance(shard, StreamShard)
            rows_of_steps.append(shard.plan.fit.rows[numbers[share.start : share.stop].numpy()])
        yield build_block(category, rows_of_steps)

    def build_block(
        category: int, rows_of_steps: list[NDArray[np.int64]]
    ) -> tuple[ImageBlock, list[NDArray[np.int64]]]:
        """Returns the block with the images of some steps, each image once, and the row numbers of each step."""
        shard = shards[category]
        assert isinstance(shard, StreamShard)
        block = ImageBlock(shard.category, shard.share.version, np.unique(np.concatenate(rows_of_steps)))
        return block, rows_of_steps

    groups, groups_to_read = itertools.tee(group_steps())  # the reader is ahead
    images_of_blocks = block_reader(block for block, _ in groups_to_read)
    for (block, rows_of_steps), images in zip(groups, images_of_blocks, strict=True):
        for rows in rows_of_steps:
            yield torch.from_numpy(images[np.searchsorted(block.rows, rows)])
