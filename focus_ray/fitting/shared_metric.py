"""A metric learnt over many categories [ours]: made once, stored, and given to a new category instead of one of its own.

What is shared are the two scatter matrices of `fitting.metric`, each category's in the unit of its own normal residuals, averaged
over categories. A category that is given them learns nothing from synthetic defects, which is most of what a metric costs; its
whitened half, and the unit, stay its own.
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

from focus_ray.config import Config
from focus_ray.errors import ConfigError, DataError
from focus_ray.storage import read_bytes, write_bytes

FORMAT = "focus_ray metric 1"


def fits(config: Config) -> dict[str, Any]:
    """What two networks must share for the one's channels to mean what the other's do."""
    return {
        "model.backbone": config.model.backbone,
        "model.padding": config.model.padding,
        "density.layers": list(config.density.layers),
        "density.smooth_layers": list(config.density.smooth_layers),
        "density.map_stride_px": config.density.map_stride_px,
    }


def average_scatter(scatters: Sequence[Tensor]) -> Tensor:
    """(2, C, C) each, normal and defective, -> their mean, (2, C, C) float32, each in the unit of its own normal residuals."""
    return torch.stack([scatter / scatter[0].diagonal().mean().clamp_min(1e-24) for scatter in scatters]).mean(dim=0)


def write_shared_metric(uri: str, scatters: Mapping[str, Tensor], config: Config) -> None:
    """Scatters (2, C, C) of `fitting.metric`, by category, of networks of one configuration."""
    about = {"format": FORMAT, "categories": json.dumps(sorted(scatters)), "fits": json.dumps(fits(config))}
    tensors = {"scatter": average_scatter(list(scatters.values())).contiguous()}
    write_bytes(uri, save_tensors(tensors, metadata=about))


def read_shared_metric(config: Config) -> Tensor | None:
    """The scatters (2, C, C) that density.metric names; None where it names nothing.

    Raises: ConfigError: it cannot be read, is something else, or is of another kind of network.
    """
    uri = config.density.metric
    if uri is None:
        return None
    mend = (
        "give the file that `focus-ray metric`, or a training of several categories, wrote, or leave density.metric out"
    )
    try:
        content = read_bytes(uri)
    except (FileNotFoundError, DataError) as error:
        raise ConfigError(f"density.metric={uri}: cannot be read ({error}): {mend}") from None
    try:
        about = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
        tensors = load_tensors(content)
        theirs = json.loads(about["fits"])
        scatter = tensors["scatter"]
    except (ValueError, KeyError, safetensors.SafetensorError):
        raise ConfigError(f"density.metric={uri}: not a shared metric: {mend}") from None
    if about.get("format") != FORMAT:
        raise ConfigError(f"density.metric={uri}: its format is {about.get('format')!r}, not {FORMAT!r}: {mend}")
    for key, mine in fits(config).items():
        if theirs.get(key) != mine:
            raise ConfigError(f"density.metric={uri}: made with {key}={theirs.get(key)}, this run has {mine}: {mend}")
    return scatter
