"""The profile of good images: what is usual at each place, and how high the highest values of a good image's map are [ours].

The maximum of a map is ruled by the places where good parts vary most: a serial number, a reflection, an edge. So for the
image score, and for it alone, a place's distance is counted by what is usual there: every image of a density's bank is scored
as if it were new, its own embeddings left out, and the largest distance that any of them shows at a place is the place's
measure. Maps stay in plain distances, which localise better.

A defect may be a point or spread over the part. So the score looks at the mean of the highest values over several shares of
the map, from its maximum to a fifth of it, each as a multiple of what good images show, and takes the mean: 1 is a typical good
image. Of an image in tiles the map is that of all tiles: the highest of each tile's shares ranked worse
(docs/use/large-images.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from focus_ray.density.base import LeaveOneOutScorer, Statistics, sample_evenly
from focus_ray.fitting.spread import Spread
from focus_ray.model.alignment.theta import valid_mask

IMAGES = 64  # of the bank, at most, that the profile is taken from
SHARES = (0.0, 0.01, 0.05, 0.2)  # of the map's values, the highest; 0: the maximum
FLOOR = 2.0  # mean measures, added to a place's own: the fewer good images, the less a place's own can be trusted
SAMPLE_PX = 4  # the shares are taken over every fourth pixel of the smoothed map
_AT_ONCE = 8


class Profile(NamedTuple):
    """weight: (H, W), of a place's distance.  typical: (len(SHARES),), what good images show; both float32."""

    weight: Tensor
    typical: Tensor

    def score(self, distance: Tensor, spread: Spread) -> Tensor:
        """Distances (B, H, W) -> scores (B,)."""
        return (highest_values(distance * self.weight, spread) / self.typical).mean(dim=1)


def highest_values(distance: Tensor, spread: Spread) -> Tensor:
    """(B, H, W) -> (B, len(SHARES)): means of the highest values of the smoothed map."""
    sampled = spread.every(SAMPLE_PX)(distance).flatten(1)
    counts = [max(1, int(share * sampled.shape[1])) for share in SHARES]
    top = sampled.topk(max(counts), dim=1).values
    return torch.stack([top[:, :count].mean(dim=1) for count in counts], dim=1)


@torch.no_grad()
def fit_profile(
    density: LeaveOneOutScorer, statistics: Statistics, seen: Tensor | None, spread: Spread
) -> tuple[Profile, Tensor | None]:
    """The profile of a density's own images, and the left-out distances (n, H, W) that it was taken from.

    Args:
        statistics: of which the density was built, with a bank.  seen: (H, W) bool, places that are scored; None: all.

    A single image leaves nothing to compare it with: every place then counts alike.
    """
    bank, device = statistics.bank, spread.rows.device
    assert bank is not None
    if len(bank) < 2:
        places = torch.ones(density.height, density.width, device=device)
        return Profile(places, torch.ones(len(SHARES), device=device)), None
    chosen = torch.tensor(sorted(sample_evenly(len(bank), IMAGES)))
    known = left_out_distances(density, statistics, bank, seen, chosen, device)
    return profile_of(known, spread, statistics.shown), known


@torch.no_grad()
def left_out_distances(
    density: LeaveOneOutScorer,
    statistics: Statistics,
    bank: Tensor,
    seen: Tensor | None,
    chosen: Tensor,
    device: torch.device | str,
) -> Tensor:
    """(n, H, W) of the chosen images (n,) of the bank, each scored as if its part were new; 0 where nothing is scored.

    Args: bank: (N, L, C), what the density keeps of the images of the statistics.
    """
    distances = []
    thetas, shown = statistics.thetas, statistics.shown
    for own in chosen.split(_AT_ONCE) if len(chosen) else ():
        rows = bank[own].to(device, torch.float32)  # (B, L, C)
        left_out = statistics.images_to_exclude(own)
        distance = density.score(rows.transpose(1, 2).unflatten(2, (density.height, density.width)), left_out)
        if shown is not None:
            distance = distance * shown[own].to(device).view_as(distance)
        distances.append(scored_only(distance, None if thetas is None else thetas[own].to(device), seen))
    return torch.cat(distances) if distances else torch.empty(0, density.height, density.width, device=device)


def scored_only(distance: Tensor, theta: Tensor | None, seen: Tensor | None) -> Tensor:
    """Distances (B, H, W), 0 where there is nothing to score: outside the aligned image, and where training hardly saw."""
    if theta is None:
        return distance
    inside = valid_mask(theta, distance.shape[1], distance.shape[2])
    return distance * (inside if seen is None else inside & seen)


def profile_of(known: Tensor, spread: Spread, shown: Tensor | None = None) -> Profile:
    """The profile that the left-out distances (n, H, W) of good images give, n > 0.

    Args: shown: (N, H * W) bool, places of all images that are scored; None: all.
    """
    measure = F.avg_pool2d(known.amax(dim=0)[None, None], 3, stride=1, padding=1, count_include_pad=False)[0, 0]
    counted = measure if shown is None else measure[shown.any(dim=0).view_as(measure).to(measure.device)]
    mean = counted.mean().clamp_min(1e-12)
    weight = (1 + FLOOR) * mean / (measure + FLOOR * mean)
    typical = highest_values(known * weight, spread).mean(dim=0).clamp_min(1e-12)
    return Profile(weight, typical)
