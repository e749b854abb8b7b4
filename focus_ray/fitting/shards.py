"""Module for shards: one worker's share of the normal images, kept in RAM or read again on every pass."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from focus_ray.data.read import NUM_ROWS_PER_READ, decode_rows
from focus_ray.distributed import all_gather_rows, compute_worker_range, get_rank, get_world_size
from focus_ray.errors import TrainingError
from focus_ray.fitting.regions import load_frame
from focus_ray.fitting.settings import Config
from focus_ray.fitting.split import NO_ROWS, SplitPlan, SplitRows, SplitRule
from focus_ray.fyd.batch_schedule import BatchSchedule
from focus_ray.seeds import derive_seed

_SHUFFLE_ROWS = 512  # rows of a local stream that are decoded and shuffled together

_Part = Literal["fit", "validation", "holdout"]
BatchStream = Callable[[int, int], Iterable[Mapping[str, Any]]]
"""Function (batch size, seed) -> shuffled batches of this worker's images: {'image': uint8 (B, H, W, C)}.

B is at most the batch size.
"""


class Shard(ABC):
    """One worker's share of the normal images, in batches of uint8 (B, H, W, C).

    H x W is the size to which images are resized. C is 3, or 4 if the last channel marks the scored pixels. "Fit images" train
    the network and fill the density, validation images select a model, held-out images calibrate the thresholds. A position is
    the index of an image among this worker's images of the same kind.

    Attributes:
        share: which images of this worker are fit, validation and held-out images, with their groups and order.
        batch_size: images per batch, except in `read_train_batches`.
    """

    share: SplitPlan
    batch_size: int

    @abstractmethod
    def read_train_batches(self, schedule: BatchSchedule, steps: range) -> Iterator[Tensor]:
        """Generator: yields this worker's share of the fit images of the global batch of each step.

        Raises: TrainingError: a stream of images ended too early.
        """

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
            batch_size: images per batch, except in `read_train_batches`.
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

    def read_train_batches(self, schedule: BatchSchedule, steps: range) -> Iterator[Tensor]:
        """Generator: see `Shard.read_train_batches`.

        The images of a global batch do not depend on the number of workers. The workers exchange them, because each worker keeps
        other images in RAM.
        """
        own_numbers = compute_worker_range(schedule.num_images)
        for step, numbers in zip(steps, schedule.iterate_batches(steps), strict=True):
            ascending = numbers.sort().values
            own = ascending[(ascending >= own_numbers.start) & (ascending < own_numbers.stop)]
            images = all_gather_rows(self.images[own - own_numbers.start])  # in the order of `ascending`
            share = schedule.get_share(step, get_rank(), get_world_size())
            yield images[torch.searchsorted(ascending, numbers[share.start : share.stop])]

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


def build_local_stream(config: Config, category: str, plan: SplitPlan, num_threads: int = 1) -> BatchStream:
    """Returns a function that yields shuffled batches of a category's fit images; every call decodes the images again.

    The images are shuffled and divided into blocks of `_SHUFFLE_ROWS`. A block is read in ascending order of rows, decoded, and
    shuffled again. So only one block is in RAM.

    Args:
        plan: the split of the category, or the share of one worker.
        num_threads: number of threads that decode.

    Raises: DataError: the region of interest of the category cannot be used.
    """
    frame = load_frame(config, category)

    def read_shuffled_batches(batch_size: int, seed: int) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        """Generator: see `BatchStream`; the last batch of a block of images may be smaller."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(plan.fit.rows)
        for start in range(0, len(order), _SHUFFLE_ROWS):
            group = np.sort(order[start : start + _SHUFFLE_ROWS])
            rows = decode_rows(config.data.uri, category, group, frame, num_threads=num_threads, version=plan.version)
            images = np.concatenate(list(rows))
            positions = rng.permutation(len(images))
            for first in range(0, len(images), batch_size):
                yield {"image": images[positions[first : first + batch_size]]}

    return read_shuffled_batches


class StreamShard(Shard):
    """A shard that reads and decodes its images again on every pass, a few at a time."""

    def __init__(
        self, config: Config, category: str, share: SplitPlan, stream: BatchStream | None = None, num_threads: int = 1
    ) -> None:
        """
        Args:
            share: the split of this worker's images.
            stream: yields the decoded fit images for training; None if nothing is trained.
            num_threads: number of threads that decode.

        Raises: DataError: the region of interest of the category cannot be used.
        """
        self.num_threads = num_threads
        self.config, self.category, self.share, self.stream = config, category, share, stream
        self.batch_size = NUM_ROWS_PER_READ
        self.frame = load_frame(config, category)

    def read_train_batches(self, schedule: BatchSchedule, steps: range) -> Iterator[Tensor]:
        """Generator: see `Shard.read_train_batches`. It needs a stream.

        A global batch contains images of the streams of all workers, so its images depend on the number of workers. A pass over
        the stream has whole batches only; the images that do not fill another batch are left out of this pass.

        Raises: TrainingError: the stream ended too early, for instance because the data was changed.
        """
        assert self.stream is not None, "training needs a stream"
        rank, num_workers = get_rank(), get_world_size()
        # every worker begins a pass at the same step, because Ray Data begins it only after the request of every worker
        steps_in_pass = schedule.num_images // schedule.batch_size
        for number in range(steps.start // steps_in_pass, -(-steps.stop // steps_in_pass)):
            pass_steps = range(number * steps_in_pass, (number + 1) * steps_in_pass)
            sizes = [len(schedule.get_share(step, rank, num_workers)) for step in pass_steps]
            num_read = 0
            pending = spare = torch.empty(0, *self.frame.shape, dtype=torch.uint8)
            # a shuffled stream of Ray 2.60 also yields short batches before its end: build full batches here
            for batch in self.stream(max(sizes), derive_seed(schedule.seed, "stream", number)):
                images = torch.from_numpy(np.array(batch["image"]))
                spare = spare if len(spare) else images[:1]
                pending = torch.cat([pending, images])
                while num_read < len(sizes) and len(pending) >= sizes[num_read]:
                    if pass_steps[num_read] in steps:
                        yield pending[: sizes[num_read]]
                    pending = pending[sizes[num_read] :]
                    num_read += 1
            # Ray Data gives all workers equally many images and drops the remainder: one image can be missing in the last batch
            if num_read == len(sizes) - 1 and len(pending) == sizes[-1] - 1:
                if pass_steps[num_read] in steps:
                    yield torch.cat([pending, spare])
                num_read += 1
            if num_read < len(sizes):
                raise TrainingError(
                    f"the stream of category {self.category!r} ended after {num_read} of {len(sizes)} batches: check whether "
                    "the data was changed during the training"
                )

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
        share = joined.select_fit_images(np.argsort(joined.fit.rows))
        return StreamShard(self.config, self.category, share, self.stream, self.num_threads)


def fits_in_memory(config: Config, plan: SplitPlan | SplitRule) -> bool:
    """Returns whether the decoded images of each worker fit into the RAM that data.memory_budget_mb allows.

    It assumes the smallest number of workers that the settings allow, because each worker then has the most images.

    Args: plan: the split of the images of all workers.
    """
    share = -(-plan.num_images // config.cluster.min_workers_to_start)
    channels = 4 if config.model.resize == "pad" or config.data.regions else 3
    return share * math.prod(config.model.resized_image_px) * channels <= config.data.memory_budget_mb * 2**20


def build_shard(
    config: Config,
    category: str,
    plan: SplitPlan,
    rank: int,
    num_workers: int,
    stream: BatchStream | None = None,
    num_threads: int = 1,
) -> Shard:
    """Builds the shard of a worker: it keeps the images in RAM if `fits_in_memory`, otherwise it reads them again on every pass.

    Args:
        plan: the split of the images of all workers.
        rank: number of this worker, from 0.
        stream: yields the decoded fit images for training; used only if the images do not fit into RAM.
        num_threads: number of threads that decode.

    Raises: DataError: the region of interest of the category cannot be used.
    """
    share = plan.get_worker_share(rank, num_workers)
    if not fits_in_memory(config, plan):
        return StreamShard(config, category, share, stream, num_threads)
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
