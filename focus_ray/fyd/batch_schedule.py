"""Module that divides training images into global batches, and each global batch among the workers.

A global batch contains the images of all workers in one optimiser step, so that neither the number of steps nor the learning
rate depends on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from focus_ray.errors import DataError
from focus_ray.seeds import derive_seed

NUM_INTERVALS = 10  # a training writes metrics and a checkpoint at least this many times, if it has as many steps
MAX_INTERVAL_STEPS = 50  # a long training writes them after at most this many steps


@dataclass(frozen=True)
class BatchSchedule:
    """The global batches of a training, the same for any number of workers.

    The images are used in passes. A pass uses every image once, in random order. A batch may contain the last images of a pass
    and the first images of the next pass, but no image twice.

    num_images: number of training images of all workers.
    batch_size: images in a global batch, at most `num_images`.
    seed: determines the order of the images.
    """

    num_images: int
    batch_size: int
    seed: int

    @classmethod
    def plan(cls, num_images: int, num_workers: int, batch_size: int, seed: int) -> BatchSchedule:
        """Plans global batches of `batch_size` images, or of all images if there are fewer.

        Raises: DataError: a worker would have fewer than two images.
        """
        if num_images < 2 * num_workers:
            raise DataError(
                f"{num_images} training images for {num_workers} workers are fewer than 2 per worker: lower cluster.num_workers "
                "or add images"
            )
        return cls(num_images, min(batch_size, num_images), seed)

    def iterate_batches(self, steps: range) -> Iterator[Tensor]:
        """Generator: yields the image numbers (batch_size,) of the global batch of each step. Image numbers begin at 0."""
        pending = torch.empty(0, dtype=torch.long)
        num_passes = 0
        for step in range(steps.stop):
            if len(pending) < self.batch_size:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", num_passes))
                order = torch.randperm(self.num_images, generator=generator)
                # images that still wait come last in the next pass, so that no batch has an image twice
                waits = torch.isin(order, pending)
                pending = torch.cat([pending, order[~waits], order[waits]])
                num_passes += 1
            if step >= steps.start:
                yield pending[: self.batch_size]
            pending = pending[self.batch_size :]

    def get_share(self, step: int, rank: int, num_workers: int) -> range:
        """Returns the positions of a worker's images in the global batch of a step.

        The sizes of the shares differ by at most one. The shares rotate with the step, so that over many steps the numbers of
        images of two workers also differ by at most one.

        Args:
            step: number of the step, from 0.
            rank: number of the worker, from 0.
        """
        part = (rank + step) % num_workers
        return range(self.batch_size * part // num_workers, self.batch_size * (part + 1) // num_workers)


def split_into_intervals(num_steps: int, first_step: int = 0) -> Iterator[range]:
    """Generator: yields the steps of each interval of a training. After an interval, metrics and a checkpoint are written.

    Args:
        num_steps: steps of the whole training.
        first_step: first step to train, the end of an interval or 0.
    """
    length = min(MAX_INTERVAL_STEPS, -(-num_steps // NUM_INTERVALS))
    for start in range(first_step, num_steps, max(1, length)):
        yield range(start, min(start + length, num_steps))
