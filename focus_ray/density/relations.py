"""Module for relations: which images of a bank show the same physical part, so that leave-one-out excludes them together [ours].

The bank contains the stored embeddings of normal images; an image number is a position in the bank. Leave-one-out scores each
image as if the density had not seen it. Two photographs of one part are almost equal. If leave-one-out excludes only the scored
photograph, the density still contains the other photograph, and the score is much lower than the score of a new part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ImageRelations(NamedTuple):
    """Says which of the N images of a bank show the same physical part. Leave-one-out leaves these images out together.

    Attributes:
        related: (N, N) bool. Entry (n, m) is True if image m is left out together with image n; the diagonal is True.
        groups: (N,) int64, group number of each image. Images of one part have the same number. In a sequence that changes
            gradually, a block of neighbouring images has the same number. The images of a group are related to each other.
    """

    related: Tensor
    groups: Tensor

    @classmethod
    def from_groups(cls, groups: Tensor) -> ImageRelations:
        """Builds relations in which images with the same group number (N,) are related."""
        return cls(groups[:, None] == groups[None, :], groups)

    @property
    def num_groups(self) -> int:
        """Number of groups, which is the number of independent observations among the images."""
        return len(self.groups.unique())

    @property
    def has_no_related_images(self) -> bool:
        """Whether no two images are related."""
        return int(self.related.sum()) == len(self.groups)

    def find_related_images(self, images: Tensor) -> Tensor:
        """Returns the positions of the images that are related to each of B images, including the image itself.

        Args: images: (B,), positions in the bank.

        Returns: (B, K). K is the largest number of related images, with the image itself. The row of an image with fewer related
            images is filled with the position of the image itself.
        """
        rows = self.related[images]
        counts = rows.sum(dim=1)
        # relatives first: False sorts after True, and equal values keep their order
        order = rows.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
        filled = torch.arange(order.shape[1]) < counts[:, None]
        return torch.where(filled, order, images[:, None])

    def select_images(self, images: list[int]) -> ImageRelations:
        """Returns the relations between the images at these positions; the n-th of these images gets the position n."""
        chosen = torch.tensor(images, dtype=torch.long)
        return ImageRelations(self.related[chosen][:, chosen], self.groups[chosen])

    def repeat_for_tiles(self, count: int) -> ImageRelations:
        """Returns relations between tiles instead of images. Each image becomes `count` consecutive tiles with its relations."""
        related = self.related.repeat_interleave(count, dim=0).repeat_interleave(count, dim=1)
        return ImageRelations(related, self.groups.repeat_interleave(count))


def join_relations(
    first: ImageRelations | None, num_first: int, second: ImageRelations | None, num_second: int
) -> ImageRelations | None:
    """Returns the relations between the images of two concatenated banks.

    No image of the first bank is related to an image of the second bank. Group numbers of the second bank are increased, so that
    the banks have no group in common.

    Args:
        first, second: relations within each bank; None if no two images of the bank are related.
        num_first, num_second: number of images in each bank.

    Returns: None if both `first` and `second` are None.
    """
    if first is None and second is None:
        return None
    parts = [
        ImageRelations.from_groups(torch.arange(count)) if part is None else part
        for part, count in ((first, num_first), (second, num_second))
    ]
    offset = int(parts[0].groups.max()) + 1 if num_first else 0
    related = torch.block_diag(*(part.related.to(torch.uint8) for part in parts)).bool()
    return ImageRelations(related, torch.cat([parts[0].groups, parts[1].groups + offset]))


def assign_folds(groups: Tensor, num_folds: int) -> Tensor:
    """Assigns each image to a cross-validation fold, so that all images of a group are in the same fold.

    Groups take the folds in turn, in the order in which the groups first appear.

    Args: groups: (N,), group number of each image.

    Returns: (N,) int64, number of the fold of each image. If every image has its own group, image n is in fold n modulo
        `num_folds`.
    """
    ranks: dict[int, int] = {}
    return torch.tensor([ranks.setdefault(int(group), len(ranks)) % num_folds for group in groups], dtype=torch.long)
