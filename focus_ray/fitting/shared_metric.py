"""Module that writes and reads a shared metric [ours]: a file with scatter matrices of many categories, for a new category.

The file contains the two scatter matrices of `fitting.projection`, averaged over categories. Before that, the matrices of each
category are divided by the mean variance of its normal residuals. A new category with a shared metric needs no synthetic
defects, which take most of the time for learning a projection. The whitened half of the projection and the scale of the
projection still come from the new category.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from focus_ray.errors import ConfigError
from focus_ray.fitting.settings import Config
from focus_ray.storage.files import read_bytes, write_bytes

FORMAT = "focus_ray metric 1"


def get_compatibility_settings(config: Config) -> dict[str, Any]:
    """Returns the settings that must be equal so that the channels of two networks have the same meaning: key -> value."""
    return {
        "model.backbone": config.model.backbone,
        "model.padding": config.model.padding,
        "density.layers": list(config.density.layers),
        "density.smooth_layers": list(config.density.smooth_layers),
        "density.map_stride_px": config.density.map_stride_px,
    }


def write_shared_metric(uri: str, scatters: Mapping[str, Tensor], config: Config) -> None:
    """Writes a shared metric: the scatter matrices of residuals, averaged over categories.

    A residual is the difference between the embedding of a patch and the nearest neighbour in the other normal images
    (`fitting.projection`). Before the average, both matrices of a category are divided by the mean variance of the normal
    residuals of this category.

    Args:
        uri: path or URI of the file to write.
        scatters: category -> scatter matrices (2, C, C) of the residuals of normal and of defective patches.
        config: the configuration of a category; the settings of `get_compatibility_settings` must be equal for all categories.

    Raises: DataError: the file cannot be written.
    """
    metadata = {
        "format": FORMAT,
        "categories": json.dumps(sorted(scatters)),
        "fits": json.dumps(get_compatibility_settings(config)),
    }
    scaled = [scatter / scatter[0].diagonal().mean().clamp_min(1e-24) for scatter in scatters.values()]
    write_bytes(uri, save_tensors({"scatter": torch.stack(scaled).mean(dim=0)}, metadata=metadata))


def read_safetensors_metadata(content: bytes) -> dict[str, str]:
    """Returns the metadata of a safetensors file. Raises: ValueError or KeyError: the header is damaged or has no metadata."""
    # the file starts with the length of its JSON header
    metadata: dict[str, str] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    return metadata


def read_shared_metric(config: Config) -> Tensor | None:
    """Reads the shared metric in the file that density.metric names; returns None if density.metric is None.

    Returns: (2, C, C), scatter matrices of normal and of defective residuals, see `write_shared_metric`.

    Raises: ConfigError: the file cannot be read, is no shared metric, or was made with other network settings.
    """
    uri = config.density.metric
    if uri is None:
        return None
    advice = (
        "set density.metric to a file that `focus-ray metric` or a training of several categories wrote, or unset it"
    )
    try:
        content = read_bytes(uri)
        metadata = read_safetensors_metadata(content)
        file_settings = {"format": metadata["format"], **json.loads(metadata["fits"])}
        scatter = load_tensors(content)["scatter"]
    except (FileNotFoundError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise ConfigError(
            f"density.metric={uri}: the file cannot be read as a shared metric ({error}): {advice}"
        ) from None
    for key, value in {"format": FORMAT, **get_compatibility_settings(config)}.items():
        if file_settings.get(key) != value:
            raise ConfigError(
                f"density.metric={uri}: the file was made with {key}={file_settings.get(key)}, but this run has {key}={value}: "
                f"{advice}"
            )
    return scatter
