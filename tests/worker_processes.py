"""Processes that start quickly: one process imports torch and focus_ray, and all others are forked from it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import Any

import torch.multiprocessing

# DDP alone takes seconds to import, because it imports the compiler of torch
PRELOADED = ["torch._dynamo", "torch.nn.parallel", "torchvision", "focus_ray.fitting.fit"]
PRELOADED += ["focus_ray.bundle.registry", "focus_ray.bundle.inspector", "focus_ray.watching.watch"]


def get_fork_context() -> ForkServerContext:
    """Returns the context whose processes have imported torch and focus_ray.

    Its processes have the environment variables of the first one, not those that the test sets later.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_workers(worker: Callable[..., Any], arguments: tuple[Any, ...], num_workers: int) -> None:
    """Calls worker(rank, *arguments) in one process for each rank. Raises the error of a worker that fails."""
    get_fork_context()
    torch.multiprocessing.start_processes(worker, arguments, nprocs=num_workers, start_method="forkserver")
