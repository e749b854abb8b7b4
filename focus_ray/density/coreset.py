"""Module for a coreset: a small, representative set of the patches of all normal images, without their locations [kin].

PatchCore (arXiv 2106.08265) compares a patch with normal patches from every location. Then the appearance of one location is
normal at every other location. This is right for textures and for parts that lie anywhere, for which a memory of each location
has too few examples. It is wrong for a part that is in the wrong location: only a memory of locations detects this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from focus_ray.density.base import shrink_tensor_for_export

MAX_CANDIDATES = 32768  # patches among which the coreset is chosen: the cost of the choice grows with their number
_SEARCH_CHANNELS = 64  # of the random projection in which the coreset is chosen [kin: Johnson-Lindenstrauss]
_CHUNK_BYTES = 64 * 2**20  # of distances that are in memory at the same time


class Coreset:
    """A fitted memory of M normal patches without locations; it measures the distance to the nearest normal patch.

    Attributes:
        stored_patches: (M, K) float16, patches as a bundle stores them.
        image_numbers: (M,), for each patch the position in the bank of the image that it comes from.
        patches: (M, K), the patches with which new patches are compared; `centre` is already subtracted.
        centre: (K,) float32, mean of the patches; None except in bfloat16, where smaller values have smaller rounding errors.
        half_squares: (M,), half the squared norm of each patch.
    """

    def __init__(self, patches: Tensor, image_numbers: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """
        Args:
            patches: (M, K), values that float16 represents exactly; not centred.
            image_numbers: (M,), see the class.
            dtype: type in which distances are computed, float32 or bfloat16.

        Raises: ValueError: the shapes do not fit together.
        """
        if patches.ndim != 2 or image_numbers.shape != patches.shape[:1]:
            raise ValueError(
                f"a coreset needs patches (M, K) and image numbers (M,), got {tuple(patches.shape)} and "
                f"{tuple(image_numbers.shape)}"
            )
        self.stored_patches, self.image_numbers = patches.half(), image_numbers
        self.centre = patches.float().mean(dim=0) if dtype == torch.bfloat16 else None
        self.patches = patches if self.centre is None else (patches - self.centre).to(dtype)
        self.half_squares = (self.patches.float().square().sum(dim=1) / 2).to(dtype)

    def score(self, embedding: Tensor, excluded_images: Tensor | None = None) -> Tensor:
        """Computes the distance of each patch to the nearest patch of the coreset.

        Args:
            embedding: (B, K, H, W), embeddings of B images.
            excluded_images: (B,) or (B, K'), for each of the B images the positions in the bank of the normal images whose
                patches are ignored. None ignores no image.

        Returns: (B, H, W), >= 0; infinite if all patches are ignored.
        """
        batch, channels, height, width = embedding.shape
        queries = embedding.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        queries = (queries if self.centre is None else queries - self.centre).to(self.patches.dtype)
        images_at_once = max(1, _CHUNK_BYTES // (height * width * len(self.patches) * 4))
        closest = []
        # |q - p|^2 / 2 = |q|^2 / 2 - (q p - |p|^2 / 2): the nearest p has the largest agreement q p - |p|^2 / 2
        for start in range(0, batch, images_at_once):
            part = queries[start : start + images_at_once]
            agreement = torch.addmm(-self.half_squares, part.flatten(0, 1), self.patches.t()).view(*part.shape[:2], -1)
            if excluded_images is not None:
                excluded = excluded_images[start : start + images_at_once]
                numbers = excluded.view(len(part), -1, 1).to(self.image_numbers.device)
                is_excluded = (numbers == self.image_numbers).any(dim=1)
                agreement.masked_fill_(is_excluded[:, None], -torch.inf)
            closest.append(agreement.amax(dim=2).float())
        squares = queries.float().square().sum(dim=2)
        return (squares - 2 * torch.cat(closest)).clamp_min_(0).sqrt_().view(batch, height, width)


@torch.no_grad()
def choose_coreset(
    bank: Tensor, num_patches: int, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Coreset:
    """Chooses a coreset of at most `num_patches` patches. The choice is deterministic.

    At most `MAX_CANDIDATES` patches are considered.

    Args:
        bank: (N, L, K), normal embeddings of N images at L locations, with values that float16 represents exactly.
        num_patches: largest size of the coreset.
        device: device of the coreset.
        dtype: type in which the coreset computes distances, float32 or bfloat16.
    """
    num_images, num_locations, channels = bank.shape
    generator = torch.Generator().manual_seed(0)
    candidates = choose_coreset_candidates(num_images, num_locations, generator)
    patches = bank.reshape(-1, channels)[candidates].to(device, torch.float32)
    projection = torch.randn(channels, _SEARCH_CHANNELS, generator=generator).to(device)
    chosen = choose_farthest_points(patches @ projection, num_patches).cpu()
    return Coreset(patches[chosen.to(device)], (candidates[chosen] // num_locations).to(device), dtype)


def choose_coreset_candidates(num_images: int, num_locations: int, generator: torch.Generator) -> Tensor:
    """Chooses at most MAX_CANDIDATES patches of a bank of N images and L locations, spread evenly over images and locations.

    Args:
        num_images, num_locations: N and L.
        generator: random generator of the order.

    Returns: (n,) patch indices, index = image * L + location. If the bank has at most MAX_CANDIDATES patches, the indices of all
        patches in random order.

    The locations are put into random order. The images then take consecutive stretches of this order, so that every image gives
    the same number of candidates, and every location too, up to one. Chance then cannot miss a rare appearance in one image.
    """
    total = num_images * num_locations
    if total <= MAX_CANDIDATES:
        return torch.randperm(total, generator=generator)
    shuffled = torch.randperm(num_locations, generator=generator)
    candidates = torch.arange(MAX_CANDIDATES)
    images = candidates * num_images // MAX_CANDIDATES  # about MAX_CANDIDATES / N consecutive candidates for each image
    return images * num_locations + shuffled[candidates % num_locations]


def choose_farthest_points(points: Tensor, count: int) -> Tensor:
    """Chooses at most `count` of the points (P, D) by farthest-point sampling, and returns their indices.

    The first chosen point is farthest from the mean of all points. Every next point is farthest from the points that are chosen
    already. The choice does not depend on the order of the points, unless two distances are equal.
    """
    squares = points.square().sum(dim=1)
    distance = torch.full_like(squares, torch.inf)  # (P,), squared distance to the nearest chosen point
    chosen = torch.zeros(min(count, len(points)), dtype=torch.long, device=points.device)
    if len(points):
        chosen[0] = (points - points.mean(dim=0)).square().sum(dim=1).argmax()
    for number in range(1, len(chosen)):
        last = points[chosen[number - 1]]
        # |p - last|^2 = |p|^2 - 2 p last + |last|^2
        torch.minimum(distance, torch.addmv(squares, points, last, alpha=-2) + last.square().sum(), out=distance)
        chosen[number] = distance.argmax()
    return chosen


def choose_farthest_points_per_set(points: Tensor, count: int) -> Tensor:
    """Runs `choose_farthest_points` on S sets of points at once, without choosing a point twice.

    Args:
        points: (S, P, D).
        count: number of points to choose from each set, at most P.

    Returns: (S, count), indices of the chosen points in each set.
    """
    squares = points.square().sum(dim=2)
    distance = torch.full_like(squares, torch.inf)
    chosen = torch.zeros(len(points), count, dtype=torch.long, device=points.device)
    chosen[:, 0] = (points - points.mean(dim=1, keepdim=True)).square().sum(dim=2).argmax(dim=1)
    sets = torch.arange(len(points), device=points.device)
    for number in range(1, count):
        last = points[sets, chosen[:, number - 1], :, None]
        distance_to_last = squares - 2 * torch.bmm(points, last)[..., 0] + last.square().sum(dim=1)
        torch.minimum(distance, distance_to_last, out=distance)
        distance[sets, chosen[:, number - 1]] = -torch.inf  # or a set of equal points would give the same point again
        chosen[:, number] = distance.argmax(dim=1)
    return chosen


class ExportableCoreset(Coreset):
    """A coreset that `torch.export` can trace: without chunks and in-place writes, with patches in float16 where possible."""

    def __init__(self, coreset: Coreset, half: bool) -> None:
        """Args: coreset: computes in float32. half: see `shrink_tensor_for_export`."""
        assert coreset.centre is None
        self.patches = shrink_tensor_for_export(coreset.patches.t(), half)  # (K, M)
        self.half_squares = self.patches.float().square().sum(dim=0) / 2

    def score(self, embedding: Tensor, excluded_images: Tensor | None = None) -> Tensor:
        """See `Coreset.score`: returns distances (B, H, W) of embeddings (B, K, H, W); `excluded_images` is ignored."""
        queries = embedding.permute(0, 2, 3, 1)
        best_agreement = (queries @ self.patches.float() - self.half_squares).amax(dim=3)
        return (queries.square().sum(dim=3) - 2 * best_agreement).clamp_min(0).sqrt()
