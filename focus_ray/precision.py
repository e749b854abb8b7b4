"""The number type that networks and memories compute in: float32, or bfloat16 where a device is quick at it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from focus_ray.config import Config


def compute_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """What auto, fp32 or bf16 mean on a device: auto takes bfloat16 where it is quicker there."""
    if precision == "auto":
        precision = "bf16" if quick_at_bfloat16(torch.device(device)) else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def describe_precision(config: Config, device: torch.device | str) -> str:
    """Returns the number format of backbone and memory on a device: "float32", "bfloat16", or both, if they differ."""
    settings = (config.model.precision, config.density.precision)
    names = [str(compute_dtype(precision, device)).removeprefix("torch.") for precision in settings]
    return names[0] if names[0] == names[1] else " and ".join(names)


def quick_at_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 by instructions of its own; others emulate it, many times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name)()) for name in asked if hasattr(torch.cpu, name))
