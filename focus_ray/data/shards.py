"""One worker's share of the normal images, in memory or read anew on every pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from focus_ray.config import Config
from focus_ray.data.read import decoded_rows
from focus_ray.data.regions import frame_of
from focus_ray.data.split import Plan, Split
from focus_ray.errors import DataError, TrainingError

_GROUP_ROWS = 512  # of a local stream, decoded and shuffled together

Stream = Callable[[int, int], Iterable[Mapping[str, Any]]]
"""batch size, seed -> shuffled batches of 'image', uint8 (B, H, W, C), of this worker's share, B at most the batch size."""


class Shard(Protocol):
    """One worker's share of the normal images; batches are uint8 (B, H, W, C), of the frame's shape."""

    def train_batches(self, batch_size: int, steps: int, generator: torch.Generator) -> Iterable[Tensor]:
        """Exactly `steps` shuffled batches of exactly `batch_size` images."""

    def fit_batches(self, places: Sequence[int] | None = None) -> Iterable[Tensor]:
        """Every image of the share once.

        Args: places: of these, ascending; the others are not read.
        """

    def fit_folds(self) -> NDArray[np.int64]:
        """(N,) fold of each image of `fit_batches()` in the cross calibration. Raises: ValueError: folds are not known."""

    def validation_batches(self) -> Iterable[Tensor]:
        """Every image of the share that selection judges on, once."""

    def holdout_batches(self, places: Sequence[int] | None = None) -> Iterable[Tensor]:
        """Every held-out image of the share once.

        Args: places: of these, ascending; the others are not read.
        """

    def num_holdout(self) -> int:
        """Held-out images of the share."""

    def fit_groups(self) -> NDArray[np.int64]:
        """(N,) group number of each image of `fit_batches()`, in its order. Images of the same part have equal numbers.

        Numbers agree over all workers, and with `holdout_groups`. The images of a group may be spread over workers.
        """

    def holdout_groups(self) -> NDArray[np.int64]:
        """(M,) group number of each image of `holdout_batches`, in its order."""

    def fit_order(self) -> NDArray[np.int64]:
        """(N,) rank of each image of `fit_batches()` in natural order of file names, among all workers' images."""

    def holdout_order(self) -> NDArray[np.int64]:
        """(M,) rank of each image of `holdout_batches()`, as of `fit_order`."""

    def join_validation(self) -> Shard:
        """The share whose validation images are training images too, once nothing is left to be selected."""


class MemoryShard:
    """A share that is held decoded in memory.

    Args:
        images: (N, H, W, C) uint8, for training and density.  folds: (N,) their fold numbers, for cross calibration.
        holdout: (M, H, W, C) uint8, for calibration.  validation: (V, H, W, C) uint8, for label-free selection.
        groups, validation_groups, holdout_groups: (N,), (V,) and (M,) group numbers. By default each image is its own group.
        order, validation_order, holdout_order: ranks in natural order of file names. By default the position.
    """

    def __init__(
        self,
        images: Tensor,
        holdout: Tensor | None = None,
        folds: Tensor | None = None,
        batch_size: int = 32,
        validation: Tensor | None = None,
        *,
        groups: ArrayLike | None = None,
        validation_groups: ArrayLike | None = None,
        holdout_groups: ArrayLike | None = None,
        order: ArrayLike | None = None,
        validation_order: ArrayLike | None = None,
        holdout_order: ArrayLike | None = None,
    ) -> None:
        self.images, self.batch_size = images, batch_size
        self.holdout = images[:0] if holdout is None else holdout
        self.validation = images[:0] if validation is None else validation
        self.folds = folds
        num_fit, num_validation, num_holdout = len(images), len(self.validation), len(self.holdout)
        self._groups = _numbers("groups", groups, np.arange(num_fit))
        # after the last number of the fit images, so that no other image joins one of their groups
        first = int(self._groups.max()) + 1 if num_fit else 0
        own = np.arange(first, first + num_validation + num_holdout)
        self._validation_groups = _numbers("validation_groups", validation_groups, own[:num_validation])
        self._holdout_groups = _numbers("holdout_groups", holdout_groups, own[num_validation:])
        self._order = _numbers("order", order, np.arange(num_fit))
        last = np.arange(num_fit, num_fit + num_validation + num_holdout)
        self._validation_order = _numbers("validation_order", validation_order, last[:num_validation])
        self._holdout_order = _numbers("holdout_order", holdout_order, last[num_validation:])

    def train_batches(self, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
        return epoch_batches(self.images, batch_size, steps, generator)

    def fit_batches(self, places: Sequence[int] | None = None) -> Iterator[Tensor]:
        images = self.images if places is None else self.images[torch.tensor(places, dtype=torch.long)]
        yield from (batch for batch in images.split(self.batch_size) if len(batch))

    def fit_folds(self) -> NDArray[np.int64]:
        if self.folds is None:
            raise ValueError("cross calibration needs the images' fold numbers")
        return self.folds.numpy()

    def validation_batches(self) -> Iterator[Tensor]:
        yield from (batch for batch in self.validation.split(self.batch_size) if len(batch))

    def holdout_batches(self, places: Sequence[int] | None = None) -> Iterator[Tensor]:
        images = self.holdout if places is None else self.holdout[torch.tensor(places, dtype=torch.long)]
        yield from (batch for batch in images.split(self.batch_size) if len(batch))

    def num_holdout(self) -> int:
        return len(self.holdout)

    def fit_groups(self) -> NDArray[np.int64]:
        return self._groups

    def holdout_groups(self) -> NDArray[np.int64]:
        return self._holdout_groups

    def fit_order(self) -> NDArray[np.int64]:
        return self._order

    def holdout_order(self) -> NDArray[np.int64]:
        return self._holdout_order

    def join_validation(self) -> MemoryShard:
        folds = None
        if self.folds is not None:
            num_folds = int(self.folds.max()) + 1 if len(self.folds) else 1
            folds = torch.cat([self.folds, torch.from_numpy(self._validation_groups % num_folds)])
        return MemoryShard(
            torch.cat([self.images, self.validation]),
            self.holdout,
            folds,
            self.batch_size,
            groups=np.concatenate([self._groups, self._validation_groups]),
            holdout_groups=self._holdout_groups,
            order=np.concatenate([self._order, self._validation_order]),
            holdout_order=self._holdout_order,
        )


def _numbers(name: str, values: ArrayLike | None, default: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns one int64 for each image. Raises: ValueError: the counts differ."""
    numbers = np.asarray(default if values is None else values, dtype=np.int64)
    if numbers.shape != default.shape:
        raise ValueError(f"{name} has shape {numbers.shape}: expected one number for each of {len(default)} images")
    return numbers


@dataclass(frozen=True)
class Steps:
    """What every worker agrees on before it starts: batch size and steps, from counts alone."""

    batch_size: int
    steps: int

    @classmethod
    def agree(cls, num_images: int, num_workers: int, batch_size_per_worker: int) -> Steps:
        """Raises: DataError: a worker would have fewer than two images."""
        share = num_images // num_workers
        if share < 2:
            raise DataError(
                f"{num_images} training images over {num_workers} workers leave fewer than 2 for one: "
                "lower cluster.num_workers or add images"
            )
        size = min(batch_size_per_worker, share)
        return cls(size, share // size)


def epoch_batches(images: Tensor, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` shuffled batches of (N, ...) images held in memory; a small set is gone through more than once."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        yield images[order[:batch_size]]
        order = order[batch_size:]


def local_stream(config: Config, category: str, plan: Plan, num_threads: int = 1) -> Stream:
    """Shuffled batches of the rows that train, decoded anew at every call: in random order within random groups of rows."""
    frame = frame_of(config, category)

    def batches(batch_size: int, seed: int) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        rng = np.random.default_rng(seed)
        order = rng.permutation(plan.fit_rows)
        for start in range(0, len(order), _GROUP_ROWS):
            group = np.sort(order[start : start + _GROUP_ROWS])
            rows = decoded_rows(config.data.uri, category, group, frame, num_threads=num_threads, version=plan.version)
            images = np.concatenate(list(rows))
            places = rng.permutation(len(images))
            for first in range(0, len(images), batch_size):
                yield {"image": images[places[first : first + batch_size]]}

    return batches


class StreamShard:
    """A share that is read and decoded anew on every pass, a few images at a time."""

    def __init__(
        self, config: Config, category: str, share: Plan, stream: Stream | None = None, num_threads: int = 1
    ) -> None:
        """
        Args:
            share: this worker's part of the plan.  stream: of its decoded training images; None where nothing trains.
            num_threads: that decode.
        """
        self.num_threads = num_threads
        self.config, self.category, self.share, self.stream = config, category, share, stream
        self.batch_size = config.train.batch_size_per_worker
        self.frame = frame_of(config, category)

    def train_batches(self, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
        assert self.stream is not None, "nothing to train from was given"
        seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
        pending: list[Tensor] = []
        given = 0
        # a shuffled stream yields short batches in mid-stream (Ray 2.60): cut them to size here
        batches = self.stream(batch_size, seed)
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

    def fit_batches(self, places: Sequence[int] | None = None) -> Iterator[Tensor]:
        rows = self.share.fit_rows
        return self._read(rows if places is None else rows[np.asarray(places, dtype=np.int64)])

    def fit_folds(self) -> NDArray[np.int64]:
        return self.share.folds

    def validation_batches(self) -> Iterator[Tensor]:
        return self._read(self.share.validation_rows)

    def holdout_batches(self, places: Sequence[int] | None = None) -> Iterator[Tensor]:
        rows = self.share.holdout_rows
        return self._read(rows if places is None else rows[np.asarray(places, dtype=np.int64)])

    def num_holdout(self) -> int:
        return len(self.share.holdout_rows)

    def fit_groups(self) -> NDArray[np.int64]:
        return self.share.fit_groups

    def holdout_groups(self) -> NDArray[np.int64]:
        return self.share.holdout_groups

    def fit_order(self) -> NDArray[np.int64]:
        return self.share.fit_order

    def holdout_order(self) -> NDArray[np.int64]:
        return self.share.holdout_order

    def join_validation(self) -> StreamShard:
        return StreamShard(self.config, self.category, self.share.with_validation(), self.stream, self.num_threads)

    def _read(self, rows: NDArray[np.int64]) -> Iterator[Tensor]:
        uri, version = self.config.data.uri, self.share.version
        for images in decoded_rows(uri, self.category, rows, self.frame, self.batch_size, self.num_threads, version):
            yield torch.from_numpy(images)


def fits_memory(config: Config, plan: Plan | Split) -> bool:
    """Whether a worker's share of decoded images stays within data.memory_budget_mb, with the fewest workers there may be."""
    share = -(-plan.num_images // config.cluster.fewest_workers)
    channels = 4 if config.model.resize == "pad" or config.data.regions else 3
    return share * math.prod(config.model.frame_px) * channels <= config.data.memory_budget_mb * 2**20


def build_shard(
    config: Config,
    category: str,
    plan: Plan,
    rank: int,
    num_workers: int,
    stream: Stream | None = None,
    num_threads: int = 1,
) -> Shard:
    """This worker's share, in memory where it fits.

    Args: stream: what it trains from where it does not.  num_threads: that decode.
    """
    share = plan.share(rank, num_workers)
    if not fits_memory(config, plan):
        return StreamShard(config, category, share, stream, num_threads)
    frame = frame_of(config, category)

    def load(numbers: NDArray[np.int64]) -> Tensor:
        images = torch.empty(len(numbers), *frame.shape, dtype=torch.uint8)
        done = 0
        uri, version = config.data.uri, plan.version
        for batch in decoded_rows(uri, category, numbers, frame, num_threads=num_threads, version=version):
            images[done : done + len(batch)] = torch.from_numpy(batch)
            done += len(batch)
        return images

    return MemoryShard(
        load(share.fit_rows),
        load(share.holdout_rows),
        torch.from_numpy(share.folds),
        config.train.batch_size_per_worker,
        load(share.validation_rows),
        groups=share.fit_groups,
        validation_groups=share.validation_groups,
        holdout_groups=share.holdout_groups,
        order=share.fit_order,
        validation_order=share.validation_order,
        holdout_order=share.holdout_order,
    )
