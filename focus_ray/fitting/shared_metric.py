"""Writes and reads a shared metric [ours]: a file with scatter matrices of many categories, for use in a new category.

The file contains the two scatter matrices of `fitting.projection`, averaged over categories. Before that, the matrices of each
category are divided by the mean variance of its normal residuals. A new category with a shared metric needs no synthetic defects,
which take most of the time for learning a projection. The whitened half of the projection and its unit still come from the new
category.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from focus_ray.errors import ConfigError, DataError
from focus_ray.fitting.settings import Config
from focus_ray.storage.files import read_bytes, write_bytes

FORMAT = "focus_ray metric 1"


def matching_settings(config: Config) -> dict[str, Any]:
    """Returns the settings, by key, that must be equal so that the channels of two networks have the same meaning."""
    return {
        "model.backbone": config.model.backbone,
        "model.padding": config.model.padding,
        "density.layers": list(config.density.layers),
        "density.smooth_layers": list(config.density.smooth_layers),
        "density.map_stride_px": config.density.map_stride_px,
    }


def average_scatter(scatters: Sequence[Tensor]) -> Tensor:
    """Averages scatter matrices (2, C, C), each divided by the mean variance of its normal residuals.

    Returns: (2, C, C) float32, normal and defective.
    """
    return torch.stack([scatter / scatter[0].diagonal().mean().clamp_min(1e-24) for scatter in scatters]).mean(dim=0)


def write_shared_metric(uri: str, scatters: Mapping[str, Tensor], config: Config) -> None:
    """Writes a shared metric.

    Args:
        scatters: (2, C, C) of each category, by name of the category.
        config: of the networks of all categories.
    """
    metadata = {
        "format": FORMAT,
        "categories": json.dumps(sorted(scatters)),
        "fits": json.dumps(matching_settings(config)),
    }
    tensors = {"scatter": average_scatter(list(scatters.values())).contiguous()}
    write_bytes(uri, save_tensors(tensors, metadata=metadata))


def read_shared_metric(config: Config) -> Tensor | None:
    """Reads the scatter matrices (2, C, C) of the file that density.metric names; None if the setting is empty.

    Raises: ConfigError: the file cannot be read, is no shared metric, or belongs to a different kind of network.
    """
    uri = config.density.metric
    if uri is None:
        return None
    advice = (
        "set density.metric to a file that `focus-ray metric` or a training of several categories wrote, or unset it"
    )
    try:
        content = read_bytes(uri)
    except (FileNotFoundError, DataError) as error:
        raise ConfigError(f"density.metric={uri}: cannot read the file ({error}): {advice}") from None
    try:
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
        tensors = load_tensors(content)
        file_settings = json.loads(metadata["fits"])
        scatter = tensors["scatter"]
    except (ValueError, KeyError, safetensors.SafetensorError):
        raise ConfigError(f"density.metric={uri}: the file is not a shared metric: {advice}") from None
    if metadata.get("format") != FORMAT:
        raise ConfigError(
            f"density.metric={uri}: the format is {metadata.get('format')!r}, expected {FORMAT!r}: {advice}"
        )
    for key, value in matching_settings(config).items():
        if file_settings.get(key) != value:
            raise ConfigError(
                f"density.metric={uri}: the file was made with {key}={file_settings.get(key)}, but this run has {key}={value}: "
                f"{advice}"
            )
    return scatter
