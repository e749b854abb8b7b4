"""Module that divides training images into global batches, and each global batch among the workers.

A global batch contains the images of all workers in one optimiser step, so that neither the number of steps nor the learning
rate depends on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from focus_ray.errors import DataError
from focus_ray.seeds import derive_seed

NUM_INTERVALS = 10  # a training writes metrics and a checkpoint at least this many times, if it has as many steps
MAX_INTERVAL_STEPS = 50  # a long training writes them after at most this many steps


_SECTION_IMAGES = 32  # neighbouring images that stay close in the order of a pass, because streams read them together
_WINDOW_IMAGES = 256  # images of several sections that are shuffled together


@dataclass(frozen=True)
class BatchSchedule:
    """The global batches of a training, the same for any number of workers, in RAM and streamed.

    Each step uses images of one category. Several categories take turns: each cycle visits every category once, in random order.
    The images of a category are used in passes. A pass uses every image once, in random order. A batch may contain the last
    images of a pass and the first images of the next pass, but no image twice.

    num_images: number of training images of all workers, for each category.
    batch_size: images in a global batch; a category with fewer images uses all its images in each step.
    seed: determines the order of categories and images.
    """

    num_images: tuple[int, ...]
    batch_size: int
    seed: int

    @classmethod
    def plan(cls, num_images: Sequence[int], num_workers: int, batch_size: int, seed: int) -> BatchSchedule:
        """Plans the global batches of a training.

        Raises: DataError: a worker would have fewer than two images.
        """
        if min(num_images) < 2 * num_workers:
            raise DataError(
                f"{min(num_images)} training images for {num_workers} workers are fewer than 2 per worker: lower "
                "cluster.num_workers or add images"
            )
        return cls(tuple(num_images), batch_size, seed)

    def find_category(self, step: int) -> tuple[int, int]:
        """Returns the number of the category that a step uses, and how many earlier steps used this category."""
        cycle, turn = divmod(step, len(self.num_images))
        return self._draw_categories(cycle)[turn], cycle

    def get_batch_size(self, step: int) -> int:
        """Returns the number of images in the global batch of a step."""
        return min(self.batch_size, self.num_images[self.find_category(step)[0]])

    def count_batches_in_pass(self) -> int:
        """Returns how many global batches contain every image of every category at least once."""
        counts = [-(-number // min(self.batch_size, number)) for number in self.num_images]
        return max(counts) * len(counts)

    def iterate_batches(self, steps: range) -> Iterator[tuple[int, Tensor]]:
        """Generator: yields for each step the number of its category and the image numbers (B,) of its global batch.

        Image numbers begin at 0 in each category.
        """
        pending = [torch.empty(0, dtype=torch.long) for _ in self.num_images]
        num_passes = [0 for _ in self.num_images]
        for step in range(steps.stop):
            category, _ = self.find_category(step)
            size = self.get_batch_size(step)
            waiting = pending[category]
            if len(waiting) < size:
                order = self._draw_images(category, num_passes[category])
                # images that still wait come last in the next pass, so that no batch has an image twice
                waits = torch.isin(order, waiting)
                waiting = torch.cat([waiting, order[~waits], order[waits]])
                num_passes[category] += 1
            if step >= steps.start:
                yield category, waiting[:size]
            pending[category] = waiting[size:]

    def _draw_categories(self, cycle: int) -> list[int]:
        """Returns the numbers of all categories in the random order of a cycle."""
        if len(self.num_images) == 1:
            return [0]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "categories", cycle))
        return torch.randperm(len(self.num_images), generator=generator).tolist()

    def _draw_images(self, category: int, number: int) -> Tensor:
        """Returns the image numbers (N,) of a category in the random order of a pass.

        Sections of neighbouring images are shuffled, and then the images of each window of a few sections. So a stream reads
        neighbouring images together, and not almost the whole category for each batch.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.seed, f"order {category}", number))
        sections = torch.arange(self.num_images[category]).split(_SECTION_IMAGES)
        order = torch.cat([sections[position] for position in torch.randperm(len(sections), generator=generator)])
        windows = order.split(_WINDOW_IMAGES)
        return torch.cat([window[torch.randperm(len(window), generator=generator)] for window in windows])

    def get_share(self, step: int, rank: int, num_workers: int) -> range:
        """Returns the positions of a worker's images in the global batch of a step.

        The sizes of the shares differ by at most one. The shares rotate with the step, so that over many steps the numbers of
        images of two workers also differ by at most one.

        Args:
            step: number of the step, from 0.
            rank: number of the worker, from 0.
        """
        part = (rank + step) % num_workers
        size = self.get_batch_size(step)
        return range(size * part // num_workers, size * (part + 1) // num_workers)


def split_into_intervals(num_steps: int, first_step: int = 0) -> Iterator[range]:
    """Generator: yields the steps of each interval of a training. After an interval, metrics and a checkpoint are written.

    Args:
        num_steps: steps of the whole training.
        first_step: first step to train, the end of an interval or 0.
    """
    length = min(MAX_INTERVAL_STEPS, -(-num_steps // NUM_INTERVALS))
    for start in range(first_step, num_steps, max(1, length)):
        yield range(start, min(start + length, num_steps))
