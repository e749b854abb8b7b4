"""The data type for the computations of networks and memory banks: float32, or bfloat16 on devices that compute it fast."""

from __future__ import annotations

import torch


def choose_compute_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """Returns the data type of a precision setting on a device. `auto` means bfloat16 if the device has native support."""
    if precision == "auto":
        precision = "bf16" if has_native_bfloat16(torch.device(device)) else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def has_native_bfloat16(device: torch.device) -> bool:
    """Returns whether a device has native bfloat16 instructions. Other devices emulate bfloat16, much slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name)()) for name in checks if hasattr(torch.cpu, name))
