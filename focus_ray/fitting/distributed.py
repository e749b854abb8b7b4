"""Sums and gatherings over the workers of a torch.distributed group; alone, the values themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from focus_ray.density.moments import Moments


@torch.no_grad()
def gather_rows(rows: Tensor, device: torch.device) -> Tensor:
    """(n, ...) of every worker -> all of them, in the order of the workers, on the CPU of each."""
    if world_size() == 1:
        return rows
    count = torch.tensor([len(rows)], device=device)
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    longest = int(max(int(c) for c in counts))
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded, device=device) for _ in counts]
    dist.all_gather(parts, padded.to(device))
    return torch.cat([part[: int(c)].cpu() for part, c in zip(parts, counts, strict=True)])


@torch.no_grad()
def reduce_moments(moments: Moments) -> None:
    """Joins the moments of all workers, in place: the exact pooled mean and scatter."""
    if world_size() == 1:
        return
    count = torch.tensor([moments.count], dtype=torch.float64, device=moments.mean.device)
    total_sum = moments.mean.double() * moments.count
    dist.all_reduce(count)
    dist.all_reduce(total_sum)
    mean = (total_sum / count).to(moments.mean.dtype)
    difference = moments.mean - mean
    moments.scatter.baddbmm_(difference[:, :, None], difference[:, None, :], alpha=float(moments.count))
    dist.all_reduce(moments.scatter)
    moments.mean = mean
    moments.count = int(count.item())


_T = TypeVar("_T")


def gather_objects(value: _T) -> list[_T]:
    """What each worker brings, in the order of the workers, the same on every one."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def decided_by_first(decide: Callable[[], _T]) -> _T:
    """What the first worker finds, on every one; what it raises, every one raises.

    Machines of different kinds round differently, so a yes or no that each works out alone may differ, and what follows it, a
    collective, would wait for ever.
    """
    if world_size() == 1:
        return decide()
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = decide()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    return found[0]  # type: ignore[no-any-return]


def own_part(count: int) -> range:
    """This worker's contiguous part of `count` numbers; every number is in exactly one worker's."""
    rank = dist.get_rank() if world_size() > 1 else 0
    return range(count * rank // world_size(), count * (rank + 1) // world_size())


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
