"""Module that divides training images into global batches, and each global batch among the workers.

A global batch contains the images of all workers in one optimiser step, so that neither the number of steps nor the learning
rate depends on the number of workers.
"""

from __future__ import annotations

from dataclasses import dataclass

from focus_ray.errors import DataError


@dataclass(frozen=True)
class BatchSchedule:
    """The global batches of an epoch, the same for any number of workers.

    num_images: number of training images of all workers.
    batch_size: images in a global batch.
    steps: optimiser steps in an epoch. Images that do not fill another batch wait for the next epoch's order.
    """

    num_images: int
    batch_size: int
    steps: int

    @classmethod
    def plan_epoch(cls, num_images: int, num_workers: int, batch_size: int) -> BatchSchedule:
        """Plans the global batches of an epoch: all images are one batch if they are fewer than `batch_size`.

        Raises: DataError: a worker would have fewer than two images.
        """
        if num_images < 2 * num_workers:
            raise DataError(
                f"{num_images} training images for {num_workers} workers are fewer than 2 per worker: lower cluster.num_workers "
                "or add images"
            )
        size = min(batch_size, num_images)
        return cls(num_images, size, num_images // size)

    def get_share(self, step: int, rank: int, num_workers: int) -> range:
        """Returns the positions of a worker's images in the global batch of a step.

        The sizes of the shares differ by at most one. The shares rotate with the step, so that over an epoch the numbers of
        images of two workers also differ by at most one.

        Args:
            step: number of the step in its epoch, from 0.
            rank: number of the worker, from 0.
        """
        part = (rank + step) % num_workers
        return range(self.batch_size * part // num_workers, self.batch_size * (part + 1) // num_workers)
