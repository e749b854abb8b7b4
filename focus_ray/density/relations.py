"""Which images of a bank show the same part, so that leaving one out has to leave out the others too [ours].

Two photographs of one part are almost equal. When only one of them is left out of a density, the other one stays in, and the
left-out score is much lower than the score of a new part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Relations(NamedTuple):
    """Relations between the N images of a bank.

    Attributes:
        related: (N, N) bool with a true diagonal. Row n has the images that are left out together with image n.
        groups: (N,) int64, the number of the part that each image shows; in a sequence that changes gradually, the number of a
            block of neighbours that count as one observation. The images of a group are related to each other.
    """

    related: Tensor
    groups: Tensor

    @classmethod
    def from_groups(cls, groups: Tensor) -> Relations:
        """Relates the images (N,) with equal group numbers."""
        return cls(groups[:, None] == groups[None, :], groups)

    @property
    def num_groups(self) -> int:
        """Independent observations among the images."""
        return len(self.groups.unique())

    @property
    def is_trivial(self) -> bool:
        """Whether no two images are related."""
        return int(self.related.sum()) == len(self.groups)

    def relatives(self, images: Tensor) -> Tensor:
        """Numbers of the images to leave out for each of B images.

        Args: images: (B,) numbers.

        Returns: (B, K), K the largest number of relatives. A shorter row is filled with the image's own number.
        """
        rows = self.related[images]
        counts = rows.sum(dim=1)
        # relatives first: False sorts after True, and equal values keep their order
        order = rows.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
        filled = torch.arange(order.shape[1]) < counts[:, None]
        return torch.where(filled, order, images[:, None])

    def subset(self, images: list[int]) -> Relations:
        """The relations between some of the images, by their numbers."""
        chosen = torch.tensor(images, dtype=torch.long)
        return Relations(self.related[chosen][:, chosen], self.groups[chosen])

    def repeat(self, count: int) -> Relations:
        """The relations between the tiles of the images, `count` consecutive tiles for each image."""
        related = self.related.repeat_interleave(count, dim=0).repeat_interleave(count, dim=1)
        return Relations(related, self.groups.repeat_interleave(count))


def join_relations(
    first: Relations | None, num_first: int, second: Relations | None, num_second: int
) -> Relations | None:
    """The relations of two banks put one after the other; no image of the first is related to one of the second.

    Args: first, second: relations within each bank; None if its images are not related.
    """
    if first is None and second is None:
        return None
    parts = [
        Relations.from_groups(torch.arange(count)) if part is None else part
        for part, count in ((first, num_first), (second, num_second))
    ]
    offset = int(parts[0].groups.max()) + 1 if num_first else 0
    related = torch.block_diag(*(part.related.to(torch.uint8) for part in parts)).bool()
    return Relations(related, torch.cat([parts[0].groups, parts[1].groups + offset]))


def fold_numbers(groups: Tensor, num_folds: int) -> Tensor:
    """The fold of each image (N,): whole groups, dealt out in the order in which they first appear.

    Without groups of several images, image n is in fold n modulo `num_folds`.
    """
    ranks: dict[int, int] = {}
    return torch.tensor([ranks.setdefault(int(group), len(ranks)) % num_folds for group in groups], dtype=torch.long)
