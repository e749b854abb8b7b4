"""Sums and gathers values over the workers of a torch.distributed group. Without a group, there is one worker, this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather_rows(rows: Tensor) -> Tensor:
    """Concatenates the rows (n, ...) of all workers on the CPU, in the order of the workers; n may differ."""
    return rows if get_world_size() == 1 else torch.cat(all_gather_objects(rows.cpu().contiguous()))


_T = TypeVar("_T")


def all_gather_objects(value: _T) -> list[_T]:
    """Returns the values of all workers, in the order of the workers, on every worker; values are pickled."""
    if get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def compute_on_rank0_and_broadcast(compute: Callable[[], _T]) -> _T:
    """Calls `compute` on rank 0 only and returns its result on every worker. If it raises, every worker raises its error.

    Different machines round differently. If every worker computed a decision itself, the decisions could differ. Then some
    workers would enter a collective call that the others never enter, and would wait for ever.
    """
    if get_world_size() == 1:
        return compute()
    result_and_error: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            result_and_error[0] = compute()
        except Exception as error:
            result_and_error[1] = error
    dist.broadcast_object_list(result_and_error, src=0)
    if result_and_error[1] is not None:
        raise result_and_error[1]
    return result_and_error[0]  # type: ignore[no-any-return]


def compute_worker_range(count: int) -> range:
    """Returns this worker's contiguous range of the numbers 0 to count - 1; every number belongs to exactly one worker."""
    rank = dist.get_rank() if get_world_size() > 1 else 0
    return range(count * rank // get_world_size(), count * (rank + 1) // get_world_size())


def get_world_size() -> int:
    """Returns the number of workers of the torch.distributed group; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
