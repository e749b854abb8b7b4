"""Sums and gathers values over the workers of a torch.distributed group. Without a group, there is one worker, this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def all_gather_rows(rows: Tensor) -> Tensor:
    """Concatenates the rows (n, ...) of all workers on the CPU, in the order of the workers; n may differ."""
    return rows if get_world_size() == 1 else torch.cat(all_gather_objects(rows.cpu().contiguous()))


class AllReduceSum(torch.autograd.Function):
    """Adds up a tensor over all workers; gradients are added up over all workers too.

    torch.distributed.nn has such a function, but it is deprecated since torch 2.13.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        # every worker's loss depends on the sum, so the gradients of all workers are added
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def join_batch(rows: Tensor, first: int, batch_size: int) -> Tensor:
    """Joins the rows of all workers to one batch (batch_size, ...) on every worker; gradients flow back to every worker's rows.

    Args: first: position of this worker's first row in the batch.
    """
    if get_world_size() == 1:
        return rows
    padding = [0, 0] * (rows.ndim - 1) + [first, batch_size - first - len(rows)]
    joined: Tensor = AllReduceSum.apply(F.pad(rows, padding))
    return joined


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
    if get_rank() == 0:
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
    rank, world_size = get_rank(), get_world_size()
    return range(count * rank // world_size, count * (rank + 1) // world_size)


def get_rank() -> int:
    """Returns the number of this worker in the torch.distributed group, from 0; 0 without a group."""
    return dist.get_rank() if get_world_size() > 1 else 0


def get_world_size() -> int:
    """Returns the number of workers of the torch.distributed group; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
