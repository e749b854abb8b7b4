"""Checks of a bundle's manifest and tensor files before any tensor is allocated: a bundle may come from a stranger.

The hash of a file proves that the manifest names this file. It proves nothing about the sizes that the file and the manifest
claim.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, Field, StrictInt, StrictStr, ValidationError, field_validator

from focus_ray.density.reduction import ChannelReduction
from focus_ray.density.registry import DENSITIES
from focus_ray.detect.profile import SHARES
from focus_ray.errors import BundleError
from focus_ray.features.backbones.base import build_meta_backbone
from focus_ray.features.network import FocusNet
from focus_ray.fitting.regions import compute_map_cells
from focus_ray.fitting.settings import Config

MAX_MANIFEST_BYTES = 16 * 2**20  # calibration scores of 700,000 images
MAX_HEADER_BYTES = 2**20  # of a tensor file; the largest backbone's header has 40 KiB
MAX_DIMENSIONS = 8
FRAMES_AT_ONCE = 32  # decoded images of a full batch, by default
_FILE_NAME = r"^[A-Za-z0-9_-]+\.safetensors$"
_MAX_COUNT = 2**40
_VALUE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F16": 2, "BF16": 2, "I16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8}
_FLOAT_BYTES = 4  # floats narrower than float32 are widened while a bundle is read
_TRIANGLE_SUFFIX = (
    "precision_factor"  # end of a tensor's name: the file holds a triangle of each matrix, memory the full matrix
)

_Size = Annotated[StrictInt, Field(ge=1, le=_MAX_COUNT)]


class _FileEntry(BaseModel):
    """The manifest's entry of a tensor file: name, hash and size, with the allowed types and ranges."""

    name: Annotated[StrictStr, Field(pattern=_FILE_NAME)]
    sha256: Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{64}$")]
    num_bytes: Annotated[StrictInt, Field(ge=0, le=_MAX_COUNT)]


class _MomentsEntry(BaseModel):
    """The manifest's entry "moments": number of images, size of the anomaly map in cells, and number of channels."""

    count: Annotated[StrictInt, Field(ge=0, le=_MAX_COUNT)]
    height: _Size
    width: _Size
    channels: _Size


class _Manifest(BaseModel):
    """The entries of a manifest with their allowed types and ranges. Further entries are allowed and not checked."""

    created_at: StrictStr
    category: StrictStr
    config: dict[str, Any]
    data: dict[str, Any]
    moments: _MomentsEntry
    calibration: dict[str, Any]
    metrics: dict[str, Any]
    files: dict[str, _FileEntry]

    @field_validator("created_at")
    @classmethod
    def _check_time(cls, value: str) -> str:
        """Returns the text unchanged. Raises: ValueError: it is not a time in ISO format."""
        datetime.fromisoformat(value)
        return value

    @field_validator("category")
    @classmethod
    def _check_folder_name(cls, value: str) -> str:
        """Returns the text unchanged. Raises: ValueError: it cannot be the name of a folder."""
        if not value or value in (".", "..") or re.search(r"[/\\\x00-\x1f\x7f]", value):
            raise ValueError("a category names a folder, so it has no slash and no control character")
        return value


class StoredTensor(NamedTuple):
    """Shape of a tensor in a file, and the number of bytes that each of its values takes in the file."""

    shape: tuple[int, ...]
    value_bytes: int

    @property
    def num_values(self) -> int:
        """Number of values in the tensor."""
        return math.prod(self.shape)


Header = Mapping[str, StoredTensor]


def check_manifest_entries(manifest: Mapping[str, Any], uri: str) -> None:
    """Checks types and ranges of a manifest's entries.

    Args: uri: address of the bundle, for messages.

    Raises: BundleError: an entry is missing or cannot be used; the message names the entry.
    """
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        entry = ".".join(map(str, first["loc"]))
        raise BundleError(
            f"{uri}: the entry {entry!r} of the manifest cannot be used: {first['msg']}; got {first['input']!r:.80}"
        ) from None


def read_header(content: bytes, uri: str) -> dict[str, StoredTensor]:
    """Returns name -> shape and value size, for the tensors in a safetensors file. Reads no values.

    Args:
        content: the bytes of the complete file.
        uri: address of the bundle, for messages.

    Raises: BundleError: the header is too long or malformed, or the tensors do not fill the file exactly.
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(MAX_HEADER_BYTES, len(content) - 8):
        raise BundleError(
            f"{uri}: a tensor file has a header of {length} bytes, expected at most {MAX_HEADER_BYTES}: fetch the bundle again"
        )
    try:
        tree = json.loads(content[8 : 8 + length])
        tree.pop("__metadata__", None)
        tensors = {name: _parse_tensor_entry(entry, len(content)) for name, entry in tree.items()}
        spans = sorted((int(start), int(end)) for start, end in (entry["data_offsets"] for entry in tree.values()))
        sizes = sum(tensor.num_values * tensor.value_bytes for tensor in tensors.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BundleError(f"{uri}: the header of a tensor file is damaged: {error!r:.200}") from None
    # every tensor must start where the previous one ends: no gaps, no overlaps, nothing after the last tensor
    starts, ends = [0, *(end for _, end in spans)], [*(start for start, _ in spans), len(content) - 8 - length]
    if starts != ends or sizes != ends[-1]:
        raise BundleError(f"{uri}: the tensors in a header do not fill their file of {len(content)} bytes exactly")
    return tensors


def _parse_tensor_entry(entry: Mapping[str, Any], file_bytes: int) -> StoredTensor:
    """Returns shape and value size of the tensor that a header entry describes. file_bytes: size of the file.

    Raises: ValueError, TypeError, KeyError: the entry is malformed.
    """
    shape = tuple(entry["shape"])
    if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size <= file_bytes for size in shape):
        raise ValueError(f"shape {shape[:MAX_DIMENSIONS]}")
    tensor = StoredTensor(shape, _VALUE_BYTES[entry["dtype"]])
    start, end = entry["data_offsets"]
    if end - start != tensor.num_values * tensor.value_bytes:
        raise ValueError(f"{entry['dtype']} {shape} at offsets {start} to {end}")
    return tensor


def check_tensor_shapes(config: Config, moments: Mapping[str, int], network: Header, density: Header, uri: str) -> None:
    """Checks that the anomaly map and the tensors of a bundle have the shapes that the configuration requires.

    Tensors with unknown names are not checked here.

    Args:
        moments: the manifest's entry "moments", with height and width of the density's anomaly map, in cells.
        network, density: headers of the network file and of the density file.
        uri: address of the bundle, for messages.

    Raises: BundleError: the map has another size, or a tensor another shape. The message names the first such tensor.
    """
    cells = compute_map_cells(config)
    grid = config.model.density_tile_grid
    size = len(cells.tops) // grid[0], len(cells.lefts) // grid[1]
    if (moments["height"], moments["width"]) != size:
        raise BundleError(f"{uri}: the map has {moments['height']} x {moments['width']} cells, expected {size}")
    with torch.device("meta"):  # shapes without memory
        net = FocusNet(config.model, build_meta_backbone(config.model.backbone))
        reduction = ChannelReduction(net.backbone.spec.channels, config.density, config.train.seed)
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    expected |= {f"reduction.{name}": tuple(tensor.shape) for name, tensor in reduction.state_dict().items()}
    height, width = size[0] * grid[0], size[1] * grid[1]
    expected |= {"profile.weight": (height, width), "profile.typical": (len(SHARES),)}
    expected |= {"same_part_distance": (1,), "region": config.model.resized_image_px}
    for name, tensor in {**network, **density}.items():
        if name in expected and tensor.shape != expected[name]:
            raise BundleError(f"{uri}: tensor {name} has the shape {tensor.shape}, expected {expected[name]}")
    try:
        DENSITIES[config.density.kind].check_tensor_shapes(config.density, _get_shapes(density))
    except ValueError as error:
        raise BundleError(f"{uri}: {error}") from None


def check_moments_shapes(moments: Mapping[str, int], header: Header, uri: str) -> None:
    """Checks that the moments file has mean and scatter in the shapes that the manifest states.

    Args:
        moments: the manifest's entry "moments".
        header: header of the moments file.
        uri: address of the bundle, for messages.

    Raises: BundleError: a tensor is missing or has another shape.
    """
    num_locations, channels = moments["height"] * moments["width"], moments["channels"]
    # a scatter matrix is symmetric, so the file holds its lower triangle
    expected = {"mean": (num_locations, channels), "scatter": (num_locations, channels * (channels + 1) // 2)}
    for name, shape in expected.items():
        if name not in header or header[name].shape != shape:
            raise BundleError(f"{uri}: the moments file has no tensor {name} of the shape {shape}")


def check_memory_limit(config: Config, network: Header, density: Header, max_bytes: int, uri: str) -> None:
    """Checks that the tensors of a model, and the temporary memory of each large step of scoring, fit into `max_bytes`.

    The tensors and each step are compared with `max_bytes` separately; they are not added.

    Args:
        network, density: headers of the network file and of the density file.
        uri: address of the bundle, for messages.

    Raises: BundleError: the tensors or a step need more memory. The message names the step.
    """
    height, width = config.model.resized_image_px
    cells, grid = compute_map_cells(config), config.model.density_tile_grid
    rows, columns = len(cells.tops), len(cells.lefts)
    tile = rows // grid[0], columns // grid[1]
    required_bytes = {
        "the tensors": sum(_bound_memory_bytes(name, tensor) for name, tensor in [*network.items(), *density.items()]),
        f"a batch of {FRAMES_AT_ONCE} images of {height} x {width} pixels": height * width * 4 * FRAMES_AT_ONCE,
        # float64, in three copies while they are smoothed
        "the matrices that upsample anomaly maps": 24 * (height * rows + width * columns),
        **DENSITIES[config.density.kind].estimate_scoring_memory_bytes(
            config.density, _get_shapes(density), *tile, FRAMES_AT_ONCE
        ),
    }
    for step, num_bytes in required_bytes.items():
        if num_bytes > max_bytes:
            raise BundleError(
                f"{uri}: {step} would take {num_bytes / 2**20:.0f} MiB of memory, and the limit is {max_bytes / 2**20:.0f} MiB"
            )


def _get_shapes(header: Header) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of the tensors in a header."""
    return {name: tensor.shape for name, tensor in header.items()}


def _bound_memory_bytes(name: str, tensor: StoredTensor) -> int:
    """Returns an upper bound of the memory that a stored tensor takes after reading."""
    value_bytes = max(tensor.value_bytes, _FLOAT_BYTES)
    return tensor.num_values * value_bytes * (2 if name.endswith(_TRIANGLE_SUFFIX) else 1)
