"""The choice of the device: a task or actor of Ray uses only a GPU that Ray has reserved for it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from focus_ray.device import choose_device

# torch sees a GPU in every process of this cluster, as it does on a real GPU node of Ray 2.60
TASKS = """
import ray, torch
from focus_ray.device import choose_device

def choose_on_gpu_node():
    torch.cuda.is_available = lambda: True
    return choose_device()

ray.init(address="local", num_cpus=1, num_gpus=1, include_dashboard=False, logging_level="error")
tasks = [ray.remote(num_cpus=0, num_gpus=share)(choose_on_gpu_node).remote() for share in (0, 0.5)]
print(*ray.get(tasks), choose_on_gpu_node())
"""


@pytest.mark.ray
def test_a_ray_worker_uses_only_a_reserved_gpu() -> None:
    finished = subprocess.run([sys.executable, "-c", TASKS], capture_output=True, text=True, timeout=300)
    assert finished.stdout.split() == ["cpu", "cuda", "cuda"], finished.stderr


def test_outside_ray_the_choice_is_a_gpu_that_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_available, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_available=is_available: is_available)
        assert choose_device() == device
