"""Chooses between the CPU and a GPU. Works without Ray."""

from __future__ import annotations

import sys

import torch


def choose_device() -> str:
    """Returns "cuda" if this process may use a GPU of this machine, otherwise "cpu".

    In a task or actor of Ray, the process may use only the GPUs that Ray has reserved for it. Ray 2.60 does not hide other GPUs
    from a task or actor with num_gpus=0, so torch would see them.
    """
    ray = sys.modules.get("ray")  # a process that has not imported Ray is no worker of Ray
    if ray is not None and ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
        may_use_gpu = bool(ray.get_gpu_ids())
    else:
        may_use_gpu = True
    return "cuda" if may_use_gpu and torch.cuda.is_available() else "cpu"
