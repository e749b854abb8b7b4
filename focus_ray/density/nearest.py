"""Nearest normal neighbour at each location of the aligned frame [ours]: a density beside the single Gaussian.

Where a part looks different in a few ways at one place (a thread's phase, a print), one Gaussian spreads over what lies
between them. Keeping the normal embeddings of each location and scoring by the distance to the nearest one does not. All
embeddings are whitened by one covariance pooled over locations, so that directions in which normal parts vary count less.
Patches are compared around their own place, which alignment makes possible. Where a part lies anywhere, or has no places at
all, a coreset without places knows more (`coreset`): by default both are asked, and their distances averaged.

Of many images each place keeps some embeddings, chosen so that every other is near one of them. An image that is left out takes
along what places keep of it. A choice without it would be much the same where nothing of it is kept; where something is, it would
have one embedding more, in the gap: so the image scores a little higher than a new one like it, and thresholds err on that side.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from focus_ray.config import DensityConfig
from focus_ray.density.base import Density, LeavesOut, Statistics, ridge_of, sample_positions
from focus_ray.density.checked import (
    CheckedMemory,
    LeftOutCheckedMemory,
    check_memory,
    checked_tensors,
    is_checkable,
    left_out_gaussian,
    load_checked,
)
from focus_ray.density.coreset import Coreset, choose_coreset, greedy_coresets
from focus_ray.density.moments import Moments, check_count, locations_first, pooled_covariance
from focus_ray.density.relations import Relations
from focus_ray.precision import compute_dtype

_CHUNK_BYTES = 64 * 2**20  # of distances held at once
_TYPICAL_IMAGES = 16
_PLACES_AT_ONCE = 64
_SEARCH_CHANNELS = 32  # of the random projection in which a place's embeddings are chosen


class NearestMemory:
    """The fitted density.

    Attributes:
        bank: (L, M, C), whitened embeddings of normal images, M at each of L = height * width places; less `centre` where there
            is one.
        images: (L, M) int32, the number of the normal image that each was taken from; None: M images, in order at every place.
        centre: (L, 1, C) float32, the bank's mean at each place, of a memory in bfloat16: what is left is as small as distances
            are, and so is its rounding. None in float32.
        whitening: (C, C), W with W^T W = inverse pooled covariance; Euclidean distance after it is Mahalanobis before.
        window: odd; a patch is compared with the bank of window x window places around its own.
    """

    def __init__(
        self,
        bank: Tensor,
        whitening: Tensor,
        height: int,
        width: int,
        window: int = 1,
        dtype: torch.dtype = torch.float32,
        images: Tensor | None = None,
    ) -> None:
        """bank: not centred, any float type and device.  dtype: what it is to be held and searched in, float32 or bfloat16."""
        if bank.ndim != 3 or bank.shape[0] != height * width or whitening.shape != (bank.shape[2], bank.shape[2]):
            raise ValueError(
                f"bank {tuple(bank.shape)} and whitening {tuple(whitening.shape)} do not fit a map of {height} x {width}"
            )
        if images is not None and images.shape != bank.shape[:2]:
            raise ValueError(f"bank {tuple(bank.shape)} and its images {tuple(images.shape)} do not fit")
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window={window} must be odd and positive")
        places, count, channels = bank.shape
        held = torch.empty(places, channels, count, dtype=dtype, device=whitening.device)  # as products take it
        centres = []
        for start in range(0, places, _PLACES_AT_ONCE):  # not all at once: it is large
            part = bank[start : start + _PLACES_AT_ONCE].to(whitening.device, torch.float32)
            if dtype == torch.bfloat16:
                centres.append(part.mean(dim=1, keepdim=True))
                part = part - centres[-1]
            held[start : start + _PLACES_AT_ONCE] = part.transpose(1, 2)
        self.centre = torch.cat(centres) if centres else None
        self.bank = bank = held.transpose(1, 2)
        self.whitening, self.height, self.width, self.window = whitening, height, width, window
        self.images = None if images is None else images.to(whitening.device, torch.int32)
        self.plain = _is_identity(whitening)
        norms = torch.linalg.vector_norm(bank, dim=2, dtype=torch.float32)
        self.half_norms = (norms.square() / 2).to(dtype)  # (L, N)

    @property
    def device(self) -> torch.device:
        return self.bank.device

    def score(self, embedding: Tensor, own: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> distances (B, H, W) to the nearest normal embedding around the place, >= 0.

        Args:
            own: (B,), the number of each image among those that the memory was made of, which is left out for it: what a new
                image like it would get; or (B, K), several numbers.
        """
        batch, channels, height, width = embedding.shape
        if (height, width) != (self.height, self.width):
            raise ValueError(
                f"embedding of {(height, width)} places, the memory was made at {(self.height, self.width)}"
            )
        queries = locations_first(embedding).to(self.whitening.dtype)  # (L, B, C)
        if not self.plain:
            queries = queries @ self.whitening.t()
        # |q - b|^2 / 2 = |q|^2 / 2 - (q b - |b|^2 / 2), and the best b does not depend on |q|
        closest = torch.full((height, width, batch), -torch.inf, device=self.device, dtype=queries.dtype)
        reach = self.window // 2
        padded = queries.new_zeros(height + 2 * reach, width + 2 * reach, batch, channels)
        padded[reach : reach + height, reach : reach + width] = queries.view(height, width, batch, channels)
        # every bank row meets all the queries around it in one product: the bank, by far the larger, is read once
        around = padded.unfold(0, self.window, 1).unfold(1, self.window, 1)  # (H, W, B, C, w, w)
        rows_at_once = max(1, _CHUNK_BYTES // (width * self.window**2 * batch * (self.bank.shape[1] + channels) * 4))
        for top in range(0, height, rows_at_once):
            rows = range(top, min(top + rows_at_once, height))
            part = slice(rows.start * width, rows.stop * width)
            near = around[rows.start : rows.stop].permute(0, 1, 4, 5, 2, 3).reshape(len(rows) * width, -1, channels)
            if self.centre is not None:
                near = (near - self.centre[part]).to(self.bank.dtype)
            agreement = torch.baddbmm(self.half_norms[part, None], near, self.bank[part].transpose(1, 2), beta=-1)
            if own is not None:
                self._leave_out(
                    agreement.view(len(agreement), -1, batch, agreement.shape[2]), own.view(batch, -1), part
                )
            best = agreement.amax(dim=2)
            if self.centre is not None:  # each place has a centre of its own, from which q counts too
                best = best.to(queries.dtype) - near.to(queries.dtype).square().sum(dim=2) / 2
            best = best.view(len(rows), width, self.window, self.window, batch)
            for down in range(self.window):
                for right in range(self.window):
                    # best[r, c, down, right] is what the bank of (r, c) says of the query at (r + down - reach, ...)
                    _keep_larger(closest, best[:, :, down, right], rows.start + down - reach, right - reach)
        squares = 0 if self.centre is not None else queries.square().sum(dim=2).view(height, width, batch)
        return (squares - 2 * closest).clamp_min_(0).sqrt_().permute(2, 0, 1)

    def _leave_out(self, agreement: Tensor, own: Tensor, part: slice) -> None:
        """agreement (P, w * w, B, M) of the places `part` becomes -inf where what the bank has is of an image in own (B, K)."""
        if self.images is None:
            agreement[:, :, torch.arange(len(own))[:, None], own.to(self.device)] = -torch.inf
            return
        num_images = 1 + max(int(self.images.max()), int(own.max()))
        left_out = torch.zeros(len(own), num_images + 1, dtype=torch.bool, device=self.device)
        left_out.scatter_(1, own.where(own >= 0, num_images).to(self.device), True)  # a negative number is no image
        of_entries = left_out[:, self.images[part].long()].transpose(0, 1)  # (P, B, M)
        agreement.masked_fill_(of_entries[:, None], -torch.inf)


class JointMemory:
    """A memory of places and a coreset [ours]: the mean of both distances, each as a multiple of what good images show.

    Attributes:
        typical: (2,), the mean distance of good images, each left out itself, in `places` and in `coreset`.
    """

    def __init__(self, places: NearestMemory, coreset: Coreset, typical: Tensor) -> None:
        self.places, self.coreset, self.typical = places, coreset, typical
        self.height, self.width = places.height, places.width

    @property
    def device(self) -> torch.device:
        return self.places.device

    def score(self, embedding: Tensor, own: Tensor | None = None) -> Tensor:
        """(B, C + K, H, W) -> (B, H, W); 1 is a typical good patch. Arguments as `NearestMemory.score`'s."""
        few = self.places.bank.shape[2]
        return (
            self.places.score(embedding[:, :few], own) / self.typical[0]
            + self.coreset.score(embedding[:, few:], own) / self.typical[1]
        ) / 2


def typical_distances(
    places: NearestMemory, coreset: Coreset, bank: Tensor, relations: Relations | None = None
) -> Tensor:
    """Mean distances (2,) of some images of the bank (N, L, C + K), each scored without itself and the images related to it.

    Args: relations: between the images of the bank; None: no two are related.

    Returns: 1 for both if there is only one image.
    """
    if len(bank) < 2:
        return torch.ones(2, device=places.device)
    own = torch.tensor(sorted(sample_positions(len(bank), _TYPICAL_IMAGES)))
    found = torch.zeros(2, device=places.device)
    for numbers in own.split(8):  # together: the bank is read once for all of them
        rows = bank[numbers].to(places.device, torch.float32).transpose(1, 2)
        rows = rows.unflatten(2, (places.height, places.width))
        few = places.bank.shape[2]
        left_out = numbers if relations is None else relations.relatives(numbers)
        both = places.score(rows[:, :few], left_out), coreset.score(rows[:, few:], left_out)
        found += torch.stack([one.mean() for one in both]) * len(numbers)
    return (found / len(own)).clamp_min_(1e-12)


def _split(statistics: Statistics) -> list[int]:
    """Channels of the bank for the places and for the coreset."""
    assert statistics.bank is not None
    return [statistics.moments.channels, statistics.bank.shape[2] - statistics.moments.channels]


def _keep_larger(target: Tensor, values: Tensor, top: int, left: int) -> None:
    """target (H, W, B) becomes its maximum with values (h, w, B) laid at (top, left), cut to what is inside."""
    height, width = target.shape[:2]
    first, last = max(top, 0), min(top + values.shape[0], height)
    start, stop = max(left, 0), min(left + values.shape[1], width)
    if first < last and start < stop:
        inside = target[first:last, start:stop]
        torch.maximum(inside, values[first - top : last - top, start - left : stop - left], out=inside)


@torch.no_grad()
def build_memory(
    bank: Tensor,
    moments: Moments,
    ridge: float | None,
    window: int = 1,
    dtype: torch.dtype = torch.float32,
    per_place: int | None = None,
) -> NearestMemory:
    """A memory from raw embeddings and the moments of the same images; window and dtype as of `NearestMemory`.

    Args:
        bank: (N, L, C), as `gather` keeps them, any float type.
        ridge: added to the pooled covariance's diagonal; None: embeddings are compared as they are.
        per_place: embeddings that a place keeps, at most; None: all.

    Raises: ValueError: no image, or fewer than two in the moments.
    """
    if len(bank) == 0:
        raise ValueError("a memory needs at least 1 normal image")
    check_count(moments)
    if ridge is None:
        whitening = torch.eye(bank.shape[2], device=moments.mean.device)
    else:
        whitening = whitening_of(pooled_covariance(moments), ridge)
    kept, images = thinned(_compared(bank, whitening), per_place, whitening.device)
    return NearestMemory(kept, whitening, moments.height, moments.width, window, dtype, images)


@torch.no_grad()
def thinned(bank: Tensor, most: int | None, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
    """What each place of a whole bank (L, N, C), any float type, whitened, keeps: (L, M, C), and of which images, as
    `NearestMemory` takes them. The same at every call.

    Args: most: embeddings a place; None: all.  device: on which they are chosen.
    """
    places, count, channels = bank.shape
    if most is None or count <= most:
        return bank, None
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(channels, _SEARCH_CHANNELS, generator=generator).to(device)
    images = torch.cat(
        [
            greedy_coresets(part.to(device, torch.float32) @ projection, most).sort(dim=1).values.cpu()
            for part in bank.split(_PLACES_AT_ONCE)
        ]
    )
    return bank[torch.arange(places)[:, None], images.to(bank.device)], images.int()


def rest_of(bank: Tensor, images: Tensor) -> Tensor:
    """What is left of a whole bank (N, L, C) without the images (M, L) that places keep: (L * (N - M), C)."""
    return bank[_left(len(bank), images)]


def with_rest(kept: Tensor, images: Tensor, rest: Tensor) -> Tensor:
    """The whole bank (N, L, C), from what its places keep (M, L, C), of images (M, L), and `rest_of` it."""
    most, places, channels = kept.shape
    bank = kept.new_empty(most + len(rest) // places, places, channels)
    bank[images.long(), torch.arange(places)] = kept
    bank[_left(len(bank), images)] = rest
    return bank


def _left(count: int, images: Tensor) -> Tensor:
    """(N, L) bool, false where a place keeps the image."""
    return torch.ones(count, images.shape[1], dtype=torch.bool).scatter_(0, images.long(), False)


def whitening_of(covariance: Tensor, ridge: float) -> Tensor:
    """(C, C) -> W (C, C) with W^T W = (covariance + ridge I)^-1, lower triangular."""
    identity = torch.eye(len(covariance), device=covariance.device, dtype=covariance.dtype)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(covariance + ridge * identity), identity, upper=False)


def _is_identity(whitening: Tensor) -> bool:
    return bool((whitening == torch.eye(len(whitening), device=whitening.device)).all())


def _compared(bank: Tensor, whitening: Tensor) -> Tensor:
    """Raw (N, L, C) -> (L, N, C), whitened; a view of it where there is nothing to whiten."""
    return bank.transpose(0, 1) if _is_identity(whitening) else whiten(bank, whitening)


def whiten(bank: Tensor, whitening: Tensor) -> Tensor:
    """Raw (N, L, C) -> whitened (L, N, C), float32, on the whitening's device."""
    whitened = torch.empty(bank.shape[1], bank.shape[0], bank.shape[2], device=whitening.device)
    for number, image in enumerate(bank):
        whitened[:, number] = image.to(whitening.device, torch.float32) @ whitening.t()
    return whitened


def keep(embedding: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, L, C) in float16 on the CPU: what a memory keeps of a batch."""
    batch, channels, height, width = embedding.shape
    return embedding.permute(0, 2, 3, 1).reshape(batch, height * width, channels).to("cpu", torch.float16)


def _ridge(config: DensityConfig, statistics: Statistics) -> float | None:
    """None where the reduction has learnt the metric already."""
    return None if config.reduction == "discriminant" else ridge_of(config, statistics.moments)


def memory_of(density: Density) -> NearestMemory | JointMemory:
    """The memory of a density of kind nearest, without the Gaussians that it may be checked against."""
    memory = density.memory if isinstance(density, CheckedMemory) else density
    assert isinstance(memory, (NearestMemory, JointMemory))
    return memory


class _NearestKind:
    keeps_bank = True

    def build(self, config: DensityConfig, statistics: Statistics) -> Density:
        assert statistics.bank is not None
        bank, others = statistics.bank.split(_split(statistics), dim=2)
        dtype = compute_dtype(config.precision, statistics.moments.mean.device)
        ridge = _ridge(config, statistics)
        places = build_memory(bank, statistics.moments, ridge, config.window, dtype, config.per_place)
        if not config.keeps_coreset:
            return places
        coreset = choose_coreset(others, config.coreset, places.device, dtype)
        typical = typical_distances(places, coreset, statistics.bank, statistics.relations)
        memory = JointMemory(places, coreset, typical)
        return check_memory(config, statistics, memory) if is_checkable(config, statistics) else memory

    def leaving_out(self, config: DensityConfig, statistics: Statistics, density: Density) -> LeavesOut:
        memory = memory_of(density)
        if isinstance(density, CheckedMemory):
            return LeftOutCheckedMemory(memory, left_out_gaussian(statistics), density.scale)
        return memory

    def tensors(self, config: DensityConfig, statistics: Statistics, density: Density) -> dict[str, Tensor]:
        assert statistics.bank is not None
        memory = memory_of(density)
        bank = statistics.bank[:, :, : _split(statistics)[0]]
        places = memory if isinstance(memory, NearestMemory) else memory.places
        found = {"bank": bank, "whitening": places.whitening}
        if isinstance(density, CheckedMemory):
            found.update(checked_tensors(density))
        if places.images is not None:
            images = places.images.t().cpu()
            found = {**found, "bank": bank[images, torch.arange(bank.shape[1])], "bank.images": images}
        if isinstance(memory, NearestMemory):
            return found
        coreset = memory.coreset
        return {
            **found,
            "coreset.patches": coreset.whole,
            "coreset.images": coreset.images.int(),
            "typical": memory.typical,
        }

    def load(
        self, config: DensityConfig, tensors: Mapping[str, Tensor], height: int, width: int, device: torch.device | str
    ) -> Density:
        whitening = tensors["whitening"].to(device)
        dtype = compute_dtype(config.precision, device)
        images = tensors["bank.images"].t() if "bank.images" in tensors else None
        bank = _compared(tensors["bank"], whitening)
        places = NearestMemory(bank, whitening, height, width, config.window, dtype, images)
        if not config.keeps_coreset:
            return places
        patches, origins = (tensors[f"coreset.{name}"].to(device) for name in ("patches", "images"))
        coreset = Coreset(patches.float(), origins.long(), dtype)
        return load_checked(JointMemory(places, coreset, tensors["typical"].to(device)), tensors)


NEAREST = _NearestKind()
