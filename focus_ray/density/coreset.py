"""A memory without places: patches of all normal images, few of them, chosen so that every other is near one [kin].

PatchCore (arXiv 2106.08265) compares a patch with the normal ones of everywhere. What a part looks like somewhere else is then
normal too, which is right for textures and for parts that lie anywhere, where a memory of each place knows little; and wrong
for a part that is where it should not be, which only a memory of places can see.
"""

from __future__ import annotations

import torch
from torch import Tensor

POOL = 32768  # candidate patches at most, among which the coreset is chosen: its cost grows with their number
_SEARCH_CHANNELS = 64  # of the random projection in which it is chosen [kin: Johnson-Lindenstrauss]
_CHUNK_BYTES = 64 * 2**20  # of distances held at once


class Coreset:
    """The fitted memory.

    Attributes:
        whole: (M, K) float16, as a bundle stores them.  images: (M,), the number of the normal image that each was taken from.
        patches: (M, K), those that are searched; less `centre` where there is one.
        centre: (K,) float32, the patches' mean, of a memory in bfloat16, whose rounding grows with what is rounded.
    """

    def __init__(self, patches: Tensor, images: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """patches: not centred, of float16's digits.  dtype: what they are searched in, float32 or bfloat16."""
        if patches.ndim != 2 or images.shape != patches.shape[:1]:
            raise ValueError(f"patches {tuple(patches.shape)} and their images {tuple(images.shape)} do not fit")
        self.whole, self.images = patches.half(), images
        self.centre = patches.float().mean(dim=0) if dtype == torch.bfloat16 else None
        self.patches = patches if self.centre is None else (patches - self.centre).to(dtype)
        self.half_norms = (self.patches.float().square().sum(dim=1) / 2).to(dtype)

    def score(self, embedding: Tensor, own: Tensor | None = None) -> Tensor:
        """(B, K, H, W) -> distances (B, H, W) to the nearest patch, >= 0.

        Args:
            own: (B,), the number of each image, whose own patches are left out for it; or (B, K), several numbers.
        """
        batch, channels, height, width = embedding.shape
        queries = embedding.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        queries = (queries if self.centre is None else queries - self.centre).to(self.patches.dtype)
        at_once = max(1, _CHUNK_BYTES // (height * width * len(self.patches) * 4))
        closest = []
        for start in range(0, batch, at_once):
            part = queries[start : start + at_once]
            agreement = torch.addmm(-self.half_norms, part.flatten(0, 1), self.patches.t()).view(*part.shape[:2], -1)
            if own is not None:
                numbers = own[start : start + at_once].view(len(part), -1, 1).to(self.images.device)
                mine = (numbers == self.images).any(dim=1)
                agreement.masked_fill_(mine[:, None], -torch.inf)
            closest.append(agreement.amax(dim=2).float())
        squares = queries.float().square().sum(dim=2)
        return (squares - 2 * torch.cat(closest)).clamp_min_(0).sqrt_().view(batch, height, width)


@torch.no_grad()
def choose_coreset(
    bank: Tensor, num_patches: int, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Coreset:
    """The coreset of normal embeddings (N, L, K), any float type: at most so many patches. The same at every call."""
    num_images, places, channels = bank.shape
    generator = torch.Generator().manual_seed(0)
    pool = choose_candidates(num_images, places, generator)
    patches = bank.reshape(-1, channels)[pool].to(device, torch.float32)
    projection = torch.randn(channels, _SEARCH_CHANNELS, generator=generator).to(device)
    chosen = greedy_coreset(patches @ projection, num_patches).cpu()
    return Coreset(patches[chosen.to(device)], (pool[chosen] // places).to(device), dtype)


def choose_candidates(num_images: int, places: int, generator: torch.Generator) -> Tensor:
    """Numbers of at most POOL patches of a bank (N, L, K), number = image * L + place, spread over all images and places.

    The places are put into random order. The images then take consecutive stretches of this order, so that every image gives
    as many candidates, and every place too, up to one. A rare appearance in one image is then not missed by chance.
    """
    total = num_images * places
    if total <= POOL:
        return torch.randperm(total, generator=generator)
    shuffled = torch.randperm(places, generator=generator)
    candidates = torch.arange(POOL)
    images = candidates * num_images // POOL  # about POOL / N consecutive candidates for each image
    return images * places + shuffled[candidates % places]


def greedy_coreset(points: Tensor, count: int) -> Tensor:
    """Numbers of at most `count` of the points (P, D): the one farthest from their mean, then ever the one farthest from those
    chosen. Which they are does not depend on the order of the points."""
    norms = points.square().sum(dim=1)
    distance = torch.full_like(norms, torch.inf)
    chosen = torch.zeros(min(count, len(points)), dtype=torch.long, device=points.device)
    if len(points):
        chosen[0] = (points - points.mean(dim=0)).square().sum(dim=1).argmax()
    for number in range(1, len(chosen)):
        last = points[chosen[number - 1]]
        torch.minimum(distance, torch.addmv(norms, points, last, alpha=-2) + last.square().sum(), out=distance)
        chosen[number] = distance.argmax()
    return chosen


def greedy_coresets(points: Tensor, count: int) -> Tensor:
    """`greedy_coreset` of S sets at once: points (S, P, D) -> numbers (S, count), count <= P, no point of a set twice."""
    norms = points.square().sum(dim=2)
    distance = torch.full_like(norms, torch.inf)
    chosen = torch.zeros(len(points), count, dtype=torch.long, device=points.device)
    chosen[:, 0] = (points - points.mean(dim=1, keepdim=True)).square().sum(dim=2).argmax(dim=1)
    sets = torch.arange(len(points), device=points.device)
    for number in range(1, count):
        last = points[sets, chosen[:, number - 1], :, None]
        squares = norms - 2 * torch.bmm(points, last)[..., 0] + last.square().sum(dim=1)
        torch.minimum(distance, squares, out=distance)
        distance[sets, chosen[:, number - 1]] = -torch.inf  # also where all points are alike
        chosen[:, number] = distance.argmax(dim=1)
    return chosen
